// Columns of decoded records, in the spelling of the run folder, and the pool of names that they index.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace llmkern {

struct KernelColumns {
  std::vector<int64_t> start_ns, end_ns, stream, correlation_id, graph_id, graph_node_id, shared_bytes, copied_bytes;
  std::vector<int32_t> device, context, name, grid_x, grid_y, grid_z, block_x, block_y, block_z, registers;
  std::vector<int8_t> kind;
};

// Cuts columns to the shortest of them: a row that was only begun is no row.
template <typename... Column>
void trim_to_shortest(Column&... columns) {
  const size_t rows = std::min({columns.size()...});
  (columns.resize(rows), ...);
}

struct LaunchColumns {
  std::vector<int64_t> start_ns, end_ns, thread, correlation_id;
  std::vector<int32_t> process, api;
};

struct OverheadColumns {
  std::vector<int64_t> start_ns, end_ns, thread;
  std::vector<int32_t> kind;
};

// What the device and CUPTI itself did, as decoded from activity buffers.
struct DeviceColumns {
  KernelColumns kernels;
  OverheadColumns overheads;

  void trim() {
    auto& k = kernels;
    trim_to_shortest(k.start_ns, k.end_ns, k.stream, k.correlation_id, k.graph_id, k.graph_node_id, k.shared_bytes,
                     k.copied_bytes, k.device, k.context, k.name, k.grid_x, k.grid_y, k.grid_z, k.block_x, k.block_y,
                     k.block_z, k.registers, k.kind);
    auto& o = overheads;
    trim_to_shortest(o.start_ns, o.end_ns, o.thread, o.kind);
  }
};

inline constexpr const char* kKindNames[] = {"kernel", "memcpy", "memset"};
enum Kind : int8_t { kKernel = 0, kMemcpy = 1, kMemset = 2 };

// Names with stable ids; ids are never reused, so a reader may cache the list.
class NamePool {
 public:
  int32_t intern(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto [at, inserted] = ids_.try_emplace(name, static_cast<int32_t>(names_.size()));
    if (inserted) names_.push_back(name);
    return at->second;
  }

  std::vector<std::string> names() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return names_;
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<std::string, int32_t> ids_;
  std::vector<std::string> names_;
};

}  // namespace llmkern
