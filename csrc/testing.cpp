#include "testing.h"

#include <cupti.h>
#include <pybind11/stl.h>

#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <vector>

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

}  // namespace

void bind_testing(py::module_& parent) {
  auto m = parent.def_submodule("testing", "Activity buffers built by hand, for tests and load generators.");
  const auto none = py::none();
  m.def("kernel_records", &kernel_records, py::kw_only(), py::arg("start_ns"), py::arg("end_ns"), py::arg("names"),
        py::arg("name") = none, py::arg("correlation_id") = none, py::arg("device") = none, py::arg("stream") = none,
        py::arg("graph_id") = none, py::arg("graph_node_id") = none);
  m.def("memcpy_records", &memcpy_records, py::kw_only(), py::arg("start_ns"), py::arg("end_ns"), py::arg("bytes"),
        py::arg("copy_kind"), py::arg("src_kind"), py::arg("dst_kind"));
  m.def("memset_records", &memset_records, py::kw_only(), py::arg("start_ns"), py::arg("end_ns"), py::arg("bytes"));
  m.def("overhead_records", &overhead_records, py::kw_only(), py::arg("start_ns"), py::arg("end_ns"), py::arg("kind"),
        py::arg("thread") = 1);
}

}  // namespace llmkern
