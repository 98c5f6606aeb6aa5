// The few functions of NVML that the sampler calls, found at run time; declared here because no CUDA header is needed
// for anything else of it. Names and layouts are those of NVML's public header, stable since driver 470.
#pragma once

#include <cstdint>
#include <string>

#include "shared_library.h"

namespace llmkern::nvml {

using Device = void*;
enum Result : int { kSuccess = 0, kNotSupported = 3, kNoPermission = 4, kNotFound = 6 };
enum ClockType : int { kClockSm = 1 };
enum SampleType : int { kTotalPowerSamples = 0 };
enum ValueType : int { kDouble = 0, kUnsignedInt = 1, kUnsignedLong = 2, kUnsignedLongLong = 3, kSignedLongLong = 4 };

union Value {
  double d;
  int si;
  unsigned int ui;
  unsigned long ul;
  unsigned long long ull;
  signed long long sll;
};

struct Sample {
  unsigned long long timestamp_us;
  Value value;
};
static_assert(sizeof(Sample) == 16);

struct FieldValue {
  unsigned int field_id;
  unsigned int scope_id;
  long long timestamp_us;
  long long latency_us;
  int value_type;
  int result;
  Value value;
};
static_assert(sizeof(FieldValue) == 40);

struct Memory {
  unsigned long long total, free, used;
};

constexpr unsigned kFieldPowerAverage = 185;
constexpr unsigned kFieldPowerInstant = 186;
constexpr unsigned kScopeGpu = 0;
constexpr unsigned kScopeMemory = 2;

struct Api {
  explicit Api(const std::string& file);

  std::string error_name(int result) const;
  // Throws RecorderError with a sentence about `what` unless `result` is success.
  void check(int result, const std::string& what) const;

  SharedLibrary library;
  int (*init)();
  const char* (*error_string)(int);
  int (*driver_version)(char*, unsigned);
  int (*nvml_version)(char*, unsigned);
  int (*cuda_version)(int*);
  int (*device_count)(unsigned*);
  int (*by_index)(unsigned, Device*);
  int (*by_uuid)(const char*, Device*);
  int (*index_of)(Device, unsigned*);
  int (*name_of)(Device, char*, unsigned);
  int (*uuid_of)(Device, char*, unsigned);
  int (*total_energy)(Device, unsigned long long*);
  int (*samples)(Device, int, unsigned long long, int*, unsigned*, Sample*);
  int (*fields)(Device, int, FieldValue*);
  int (*clock)(Device, int, unsigned*);
  int (*max_clock)(Device, int, unsigned*);
  int (*temperature)(Device, int, unsigned*);
  int (*throttle)(Device, unsigned long long*);
  int (*mig_mode)(Device, unsigned*, unsigned*);
  int (*power_limit)(Device, unsigned*);
  int (*power_limits)(Device, unsigned*, unsigned*);
  int (*persistence)(Device, int*);
  int (*memory)(Device, Memory*);
};

}  // namespace llmkern::nvml
