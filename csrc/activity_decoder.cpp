#include "activity_decoder.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace llmkern {

std::string demangle(const char* name) {
  int status = 0;
  std::unique_ptr<char, decltype(&std::free)> plain(abi::__cxa_demangle(name, nullptr, nullptr, &status), &std::free);
  return status == 0 && plain ? plain.get() : name;
}

namespace {

const char* copy_name(uint8_t kind) {
  static const char* const names[] = {"unknown", "HtoD", "DtoH", "HtoA", "AtoH", "AtoA",
                                      "AtoD",    "DtoA", "DtoD", "HtoH", "PtoP"};
  return kind < std::size(names) ? names[kind] : "unknown";
}

const char* memory_name(uint8_t kind) {
  static const char* const names[] = {"unknown", "pageable", "pinned",        "device",
                                      "array",   "managed",  "device static", "managed static"};
  return kind < std::size(names) ? names[kind] : "unknown";
}

const char* overhead_name(CUpti_ActivityOverheadKind kind) {
  switch (kind) {
    case CUPTI_ACTIVITY_OVERHEAD_DRIVER_COMPILER: return "driver compiler";
    case CUPTI_ACTIVITY_OVERHEAD_CUPTI_BUFFER_FLUSH: return "CUPTI buffer flush";
    case CUPTI_ACTIVITY_OVERHEAD_CUPTI_INSTRUMENTATION: return "CUPTI instrumentation";
    case CUPTI_ACTIVITY_OVERHEAD_CUPTI_RESOURCE: return "CUPTI resource";
    case CUPTI_ACTIVITY_OVERHEAD_RUNTIME_TRIGGERED_MODULE_LOADING: return "module loading";
    case CUPTI_ACTIVITY_OVERHEAD_LAZY_FUNCTION_LOADING: return "lazy function loading";
    case CUPTI_ACTIVITY_OVERHEAD_COMMAND_BUFFER_FULL: return "command buffer full";
    case CUPTI_ACTIVITY_OVERHEAD_ACTIVITY_BUFFER_REQUEST: return "activity buffer request";
    case CUPTI_ACTIVITY_OVERHEAD_UVM_ACTIVITY_INIT: return "UVM activity initialisation";
    default: return "unknown";
  }
}

void add_common(KernelColumns& c, Kind kind, int32_t name, uint64_t start, uint64_t end, uint32_t device,
                uint32_t context, uint32_t stream, uint32_t correlation, uint32_t graph, uint64_t node) {
  c.kind.push_back(kind);
  c.name.push_back(name);
  c.start_ns.push_back(static_cast<int64_t>(start));
  if (failing_records > 0 && failing_records.fetch_sub(1) > 0) throw std::bad_alloc();
  c.end_ns.push_back(static_cast<int64_t>(end));
  c.device.push_back(static_cast<int32_t>(device));
  c.context.push_back(static_cast<int32_t>(context));
  c.stream.push_back(stream);
  c.correlation_id.push_back(correlation);
  c.graph_id.push_back(graph);
  c.graph_node_id.push_back(static_cast<int64_t>(node));
}

void add_shape(KernelColumns& c, const int32_t (&grid)[3], const int32_t (&block)[3], int32_t registers,
               int64_t shared_bytes, int64_t copied_bytes) {
  c.grid_x.push_back(grid[0]);
  c.grid_y.push_back(grid[1]);
  c.grid_z.push_back(grid[2]);
  c.block_x.push_back(block[0]);
  c.block_y.push_back(block[1]);
  c.block_z.push_back(block[2]);
  c.registers.push_back(registers);
  c.shared_bytes.push_back(shared_bytes);
  c.copied_bytes.push_back(copied_bytes);
}

}  // namespace

void ActivityDecoder::decode(uint8_t* buffer, size_t size, DeviceColumns& columns, DecodeCounts& counts) {
  CUpti_Activity* record = nullptr;
  while (api_.get_next_record(buffer, size, &record) == CUPTI_SUCCESS) {
    switch (record->kind) {
      case CUPTI_ACTIVITY_KIND_KERNEL:
      case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
      case CUPTI_ACTIVITY_KIND_MEMCPY:
      case CUPTI_ACTIVITY_KIND_MEMCPY2:
      case CUPTI_ACTIVITY_KIND_MEMSET: add_kernel(record, columns.kernels, counts); break;
      case CUPTI_ACTIVITY_KIND_OVERHEAD: add_overhead(record, columns.overheads, counts); break;
      default: ++counts.unknown_records;
    }
  }
}

void ActivityDecoder::add_kernel(const CUpti_Activity* record, KernelColumns& c, DecodeCounts& counts) {
  const auto lost = [&counts](uint64_t start, uint64_t end) {
    // CUPTI writes zeros where it could not get a time; such a row would look like the year 1970.
    const bool is_lost = start == 0 && end == 0;
    counts.lost_timestamps += is_lost;
    return is_lost;
  };
  const int32_t none[3] = {0, 0, 0};
  if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
    const auto* r = reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
    if (lost(r->start, r->end)) return;
    const uint64_t key = 1ull << 32 | r->copyKind << 16 | r->srcKind << 8 | r->dstKind;
    auto at = other_names_.find(key);
    if (at == other_names_.end()) {
      const uint8_t host = r->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOH ? r->dstKind : r->srcKind;
      const std::string name = std::string("memcpy ") + copy_name(r->copyKind) + " (" + memory_name(host) + ")";
      at = other_names_.emplace(key, names_.intern(name)).first;
    }
    add_common(c, kMemcpy, at->second, r->start, r->end, r->deviceId, r->contextId, r->streamId, r->correlationId,
               r->graphId, r->graphNodeId);
    add_shape(c, none, none, 0, 0, static_cast<int64_t>(r->bytes));
    ++counts.copies;
  } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY2) {
    const auto* r = reinterpret_cast<const CUpti_ActivityMemcpyPtoP4*>(record);
    if (lost(r->start, r->end)) return;
    add_common(c, kMemcpy, names_.intern("memcpy PtoP (device)"), r->start, r->end, r->deviceId, r->contextId,
               r->streamId, r->correlationId, r->graphId, r->graphNodeId);
    add_shape(c, none, none, 0, 0, static_cast<int64_t>(r->bytes));
    ++counts.copies;
  } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
    const auto* r = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
    if (lost(r->start, r->end)) return;
    add_common(c, kMemset, names_.intern("memset"), r->start, r->end, r->deviceId, r->contextId, r->streamId,
               r->correlationId, r->graphId, r->graphNodeId);
    add_shape(c, none, none, 0, 0, static_cast<int64_t>(r->bytes));
    ++counts.copies;
  } else {
    const auto* r = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
    if (lost(r->start, r->end)) return;
    add_common(c, kKernel, kernel_name(r->name), r->start, r->end, r->deviceId, r->contextId, r->streamId,
               r->correlationId, r->graphId, r->graphNodeId);
    add_shape(c, {r->gridX, r->gridY, r->gridZ}, {r->blockX, r->blockY, r->blockZ}, r->registersPerThread,
              static_cast<int64_t>(r->staticSharedMemory) + r->dynamicSharedMemory, 0);
    ++counts.kernels;
  }
}

void ActivityDecoder::add_overhead(const CUpti_Activity* record, OverheadColumns& c, DecodeCounts& counts) {
  const auto* r = reinterpret_cast<const CUpti_ActivityOverhead3*>(record);
  c.start_ns.push_back(static_cast<int64_t>(r->start));
  c.end_ns.push_back(static_cast<int64_t>(r->end));
  c.thread.push_back(r->objectId.pt.threadId);
  c.kind.push_back(names_.intern(overhead_name(r->overheadKind)));
  ++counts.overheads;
}

int32_t ActivityDecoder::kernel_name(const char* mangled) {
  if (mangled == nullptr) return names_.intern("unknown kernel");
  const auto at = kernel_names_.find(mangled);
  // A pointer can come back for another name once its module was unloaded.
  if (at != kernel_names_.end() && at->second.mangled == mangled) return at->second.id;
  const int32_t id = names_.intern(demangle(mangled));
  kernel_names_.insert_or_assign(mangled, Cached{mangled, id});
  return id;
}

}  // namespace llmkern
