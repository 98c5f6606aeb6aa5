// Turns buffers of CUPTI activity records into columns. Needs no GPU: tests hand it records of their own.
#pragma once

#include <atomic>
#include <string>
#include <unordered_map>

#include "columns.h"
#include "cupti_api.h"

namespace llmkern {

struct DecodeCounts {
  int64_t kernels = 0, copies = 0, overheads = 0, lost_timestamps = 0, unknown_records = 0;
};

// As a person reads it; a name that is none of C++ comes back as it is.
std::string demangle(const char* name);

// For tests: so many records of all decoders from now on run out of memory in their middle.
inline std::atomic<int64_t> failing_records{0};

class ActivityDecoder {
 public:
  ActivityDecoder(const CuptiApi& api, NamePool& names) : api_(api), names_(names) {}

  // Appends the records of one buffer to `columns`. Not thread-safe: one decoder belongs to one thread. May throw where
  // memory runs out; the columns are then to be trimmed.
  void decode(uint8_t* buffer, size_t size, DeviceColumns& columns, DecodeCounts& counts);

 private:
  void add_kernel(const CUpti_Activity* record, KernelColumns& columns, DecodeCounts& counts);
  void add_overhead(const CUpti_Activity* record, OverheadColumns& columns, DecodeCounts& counts);
  int32_t kernel_name(const char* mangled);

  struct Cached {
    std::string mangled;
    int32_t id;
  };

  const CuptiApi& api_;
  NamePool& names_;
  std::unordered_map<const char*, Cached> kernel_names_;
  std::unordered_map<uint64_t, int32_t> other_names_;
};

}  // namespace llmkern
