#include "testing.h"

#include <cupti.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "activity_decoder.h"
#include "cupti_api.h"
#include "tick_lock.h"

namespace py = pybind11;

namespace llmkern {
namespace {

using Int64s = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Records point at their names; those of a real CUPTI live as long as their module, these as long as the process.
const char* forever(const std::string& name) {
  static std::deque<std::string> kept;
  for (const auto& known : kept) {
    if (known == name) return known.c_str();
  }
  return kept.emplace_back(name).c_str();
}

// A column of `rows` values: the given array, or one value repeated.
class Column {
 public:
  Column(const std::optional<Int64s>& values, size_t rows, int64_t otherwise) : otherwise_(otherwise) {
    if (values) {
      if (static_cast<size_t>(values->size()) != rows) throw py::value_error("columns differ in length");
      kept_ = *values;
      data_ = kept_.data();
    }
  }
  int64_t operator[](size_t i) const { return data_ != nullptr ? data_[i] : otherwise_; }

 private:
  Int64s kept_;
  const int64_t* data_ = nullptr;
  int64_t otherwise_;
};

template <typename Record, typename Fill>
py::bytes build(size_t rows, CUpti_ActivityKind kind, Fill fill) {
  std::vector<Record> records(rows);
  std::memset(records.data(), 0, rows * sizeof(Record));
  for (size_t i = 0; i < rows; ++i) {
    records[i].kind = kind;
    fill(records[i], i);
  }
  return py::bytes(reinterpret_cast<const char*>(records.data()), rows * sizeof(Record));
}

py::bytes kernel_records(const Int64s& start_ns, const Int64s& end_ns, const std::vector<std::string>& names,
                         std::optional<Int64s> name, std::optional<Int64s> correlation_id, std::optional<Int64s> device,
                         std::optional<Int64s> stream, std::optional<Int64s> graph_id,
                         std::optional<Int64s> graph_node_id) {
  const auto rows = static_cast<size_t>(start_ns.size());
  const Column end(end_ns, rows, 0), label(name, rows, 0), correlation(correlation_id, rows, 0), gpu(device, rows, 0),
      queue(stream, rows, 7), graph(graph_id, rows, 0), node(graph_node_id, rows, 0);
  std::vector<const char*> pointers;
  for (const auto& n : names) pointers.push_back(forever(n));
  return build<CUpti_ActivityKernel10>(rows, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, [&](auto& r, size_t i) {
    r.start = static_cast<uint64_t>(start_ns.data()[i]);
    r.end = static_cast<uint64_t>(end[i]);
    r.name = pointers.at(static_cast<size_t>(label[i]));
    r.correlationId = static_cast<uint32_t>(correlation[i]);
    r.deviceId = static_cast<uint32_t>(gpu[i]);
    r.contextId = 1;
    r.streamId = static_cast<uint32_t>(queue[i]);
    r.graphId = static_cast<uint32_t>(graph[i]);
    r.graphNodeId = static_cast<uint64_t>(node[i]);
    r.gridX = 132, r.gridY = 2, r.gridZ = 1, r.blockX = 256, r.blockY = 1, r.blockZ = 1;
    r.registersPerThread = 64;
    r.staticSharedMemory = 1024;
    r.dynamicSharedMemory = 2048;
  });
}

py::bytes memcpy_records(const Int64s& start_ns, const Int64s& end_ns, const Int64s& bytes, int copy_kind, int src_kind,
                         int dst_kind) {
  return build<CUpti_ActivityMemcpy6>(static_cast<size_t>(start_ns.size()), CUPTI_ACTIVITY_KIND_MEMCPY,
                                      [&](auto& r, size_t i) {
                                        r.start = static_cast<uint64_t>(start_ns.at(i));
                                        r.end = static_cast<uint64_t>(end_ns.at(i));
                                        r.bytes = static_cast<uint64_t>(bytes.at(i));
                                        r.copyKind = static_cast<uint8_t>(copy_kind);
                                        r.srcKind = static_cast<uint8_t>(src_kind);
                                        r.dstKind = static_cast<uint8_t>(dst_kind);
                                      });
}

py::bytes memset_records(const Int64s& start_ns, const Int64s& end_ns, const Int64s& bytes) {
  return build<CUpti_ActivityMemset4>(static_cast<size_t>(start_ns.size()), CUPTI_ACTIVITY_KIND_MEMSET,
                                      [&](auto& r, size_t i) {
                                        r.start = static_cast<uint64_t>(start_ns.at(i));
                                        r.end = static_cast<uint64_t>(end_ns.at(i));
                                        r.bytes = static_cast<uint64_t>(bytes.at(i));
                                      });
}

py::bytes overhead_records(const Int64s& start_ns, const Int64s& end_ns, int kind, int64_t thread) {
  return build<CUpti_ActivityOverhead3>(static_cast<size_t>(start_ns.size()), CUPTI_ACTIVITY_KIND_OVERHEAD,
                                        [&](auto& r, size_t i) {
                                          r.start = static_cast<uint64_t>(start_ns.at(i));
                                          r.end = static_cast<uint64_t>(end_ns.at(i));
                                          r.overheadKind = static_cast<CUpti_ActivityOverheadKind>(kind);
                                          r.objectId.pt.threadId = static_cast<uint32_t>(thread);
                                        });
}

// The least that a client of CUPTI can do: record kernels and throw them away. What this costs a launch, every recorder
// of kernels costs.
class BareCupti {
 public:
  BareCupti(const std::vector<std::string>& candidates, const std::string& library) : api_(candidates, library) {}

  void start() {
    // Buffers that are zeroed off the launching thread, as CUPTI advises.
    size_t size = sizeof(uint8_t);
    uint8_t zeroed = 1;
    api_.set_attribute(CUPTI_ACTIVITY_ATTR_ZEROED_OUT_ACTIVITY_BUFFER, &size, &zeroed);
    api_.check(api_.register_callbacks(&requested, &completed), "register its buffers");
    api_.check(api_.enable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "record kernels");
  }

  void stop() {
    api_.disable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    api_.flush_all(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  }

  static int64_t bytes() { return bytes_; }

 private:
  static constexpr size_t kBufferBytes = 1 << 20;

  static void requested(uint8_t** buffer, size_t* size, size_t* max_records) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    *max_records = 0;
    *size = kBufferBytes;
    if (free_.empty()) {
      *buffer = static_cast<uint8_t*>(std::calloc(kBufferBytes, 1));
    } else {
      *buffer = free_.back();
      free_.pop_back();
    }
  }

  static void completed(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) noexcept {
    bytes_ += static_cast<int64_t>(valid);
    std::memset(buffer, 0, valid);
    std::lock_guard<std::mutex> lock(mutex_);
    try {
      free_.push_back(buffer);
    } catch (...) {
      std::free(buffer);
    }
  }

  static inline std::mutex mutex_;
  static inline std::vector<uint8_t*> free_;
  static inline std::atomic<int64_t> bytes_{0};

  CuptiApi api_;
};

}  // namespace

void bind_testing(py::module_& parent) {
  auto m = parent.def_submodule("testing", "Activity buffers built by hand, for tests and load generators.");
  const auto none = py::none();
  m.def(
      "tick_period_ns",
      [](const std::vector<int64_t>& intervals_ns, int64_t hint_ns) {
        TickLock lock(hint_ns);
        for (const int64_t passed_ns : intervals_ns) lock.learn(passed_ns);
        return lock.locked() ? std::optional(lock.period_ns()) : std::nullopt;
      },
      py::arg("intervals_ns"), py::arg("hint_ns"));
  m.def("fail_records", [](int64_t count) { failing_records = count; }, py::arg("count"));
  m.def("kernel_records", &kernel_records, py::kw_only(), py::arg("start_ns"), py::arg("end_ns"), py::arg("names"),
        py::arg("name") = none, py::arg("correlation_id") = none, py::arg("device") = none, py::arg("stream") = none,
        py::arg("graph_id") = none, py::arg("graph_node_id") = none);
  m.def("memcpy_records", &memcpy_records, py::kw_only(), py::arg("start_ns"), py::arg("end_ns"), py::arg("bytes"),
        py::arg("copy_kind"), py::arg("src_kind"), py::arg("dst_kind"));
  m.def("memset_records", &memset_records, py::kw_only(), py::arg("start_ns"), py::arg("end_ns"), py::arg("bytes"));
  m.def("overhead_records", &overhead_records, py::kw_only(), py::arg("start_ns"), py::arg("end_ns"), py::arg("kind"),
        py::arg("thread") = 1);
  py::class_<BareCupti>(m, "BareCupti", "Kernel records by CUPTI and nothing else, for benches.")
      .def(py::init<const std::vector<std::string>&, const std::string&>(),
           py::arg("candidates") = std::vector<std::string>{}, py::arg("library") = "")
      .def("start", &BareCupti::start)
      .def("stop", &BareCupti::stop, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("bytes", [](const BareCupti&) { return BareCupti::bytes(); });
}

}  // namespace llmkern
