// The Python module llmkern._recorder: conversions only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "activity_recorder.h"
#include "nvml_sampler.h"
#include "testing.h"

namespace py = pybind11;
using namespace llmkern;

namespace {

// Hands the vector over to NumPy without a copy.
template <typename T>
py::array_t<T> take(std::vector<T>& values) {
  auto* kept = new std::vector<T>(std::move(values));
  py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

py::dict to_dict(KernelColumns& c) {
  py::dict d;
#define COLUMN(name) d[#name] = take(c.name)
  COLUMN(start_ns), COLUMN(end_ns), COLUMN(device), COLUMN(context), COLUMN(stream), COLUMN(correlation_id);
  COLUMN(graph_id), COLUMN(graph_node_id), COLUMN(name), COLUMN(kind), COLUMN(grid_x), COLUMN(grid_y), COLUMN(grid_z);
  COLUMN(block_x), COLUMN(block_y), COLUMN(block_z), COLUMN(registers), COLUMN(shared_bytes), COLUMN(copied_bytes);
  return d;
}

py::dict to_dict(LaunchColumns& c) {
  py::dict d;
  COLUMN(start_ns), COLUMN(end_ns), COLUMN(process), COLUMN(thread), COLUMN(correlation_id), COLUMN(api);
  return d;
}

py::dict to_dict(OverheadColumns& c) {
  py::dict d;
  COLUMN(start_ns), COLUMN(end_ns), COLUMN(thread), COLUMN(kind);
  return d;
}

py::dict to_dict(PowerColumns& c) {
  py::dict d;
  COLUMN(timestamp_ns), COLUMN(device), COLUMN(sensor), COLUMN(power_mw), COLUMN(sm_clock_mhz), COLUMN(temperature_c);
  COLUMN(throttle);
  return d;
}

py::dict to_dict(EnergyColumns& c) {
  py::dict d;
  COLUMN(timestamp_ns), COLUMN(device), COLUMN(energy_mj), COLUMN(uncertainty_ns);
#undef COLUMN
  return d;
}

template <size_t N>
std::vector<std::string> as_list(const char* const (&names)[N]) {
  return {std::begin(names), std::end(names)};
}

py::dict to_dict(const DeviceInfo& i) {
  py::dict d;
#define ENTRY(name) d[#name] = i.name
  ENTRY(name), ENTRY(uuid), ENTRY(index), ENTRY(driver_version), ENTRY(nvml_version), ENTRY(power_limit_mw);
  ENTRY(power_limit_max_mw), ENTRY(mig_enabled), ENTRY(sm_clock_max_mhz), ENTRY(memory_bytes), ENTRY(persistence_mode);
  ENTRY(cuda_driver_version), ENTRY(device_count);
#undef ENTRY
  return d;
}

}  // namespace

PYBIND11_MODULE(_recorder, m) {
  m.doc() = "Records CUPTI activity and NVML sensors; all times are CLOCK_REALTIME nanoseconds.";
  m.attr("KIND_NAMES") = as_list(kKindNames);
  m.attr("SENSOR_NAMES") = as_list(kSensorNames);

  static py::handle error_type = py::exception<RecorderError>(m, "RecorderError", PyExc_RuntimeError).release();
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const RecorderError& e) {
      py::object error = error_type(e.what());
      error.attr("name") = e.name();
      error.attr("code") = e.code() < 0 ? py::object(py::none()) : py::object(py::int_(e.code()));
      PyErr_SetObject(error_type.ptr(), error.ptr());
    }
  });

  m.def("demangle", [](const std::string& name) { return demangle(name.c_str()); }, py::arg("name"));

  py::class_<ActivityRecorder>(m, "ActivityRecorder")
      .def(py::init<const std::vector<std::string>&, const std::string&>(),
           py::arg("candidates") = std::vector<std::string>{}, py::arg("library") = "")
      .def_property_readonly("version", [](const ActivityRecorder& r) { return r.api().version; })
      .def("start", &ActivityRecorder::start, py::arg("buffer_bytes") = 1 << 20, py::arg("host_calls") = true,
           py::call_guard<py::gil_scoped_release>())
      .def("stop", &ActivityRecorder::stop, py::call_guard<py::gil_scoped_release>())
      .def("close", &ActivityRecorder::close, py::call_guard<py::gil_scoped_release>())
      .def("flush", &ActivityRecorder::flush, py::arg("forced") = false, py::call_guard<py::gil_scoped_release>())
      .def("settle", &ActivityRecorder::settle, py::call_guard<py::gil_scoped_release>())
      .def("inject",
           [](ActivityRecorder& r, const py::bytes& records) {
             const std::string_view view(records);
             py::gil_scoped_release release;
             r.inject(reinterpret_cast<const uint8_t*>(view.data()), view.size());
           })
      .def("drain",
           [](ActivityRecorder& r) {
             DeviceColumns columns;
             LaunchColumns calls;
             {
               py::gil_scoped_release release;
               columns = r.drain();
               calls = r.drain_calls();
             }
             py::dict d;
             d["kernels"] = to_dict(columns.kernels);
             d["launches"] = to_dict(calls);
             d["overheads"] = to_dict(columns.overheads);
             return d;
           })
      .def("backlog", &ActivityRecorder::backlog, py::call_guard<py::gil_scoped_release>())
      .def("names", &ActivityRecorder::names)
      .def("statistics", &ActivityRecorder::statistics, py::call_guard<py::gil_scoped_release>())
      .def("clock_offset_ns", &ActivityRecorder::clock_offset_ns, py::call_guard<py::gil_scoped_release>());

  py::class_<NvmlSampler>(m, "NvmlSampler")
      .def(py::init([](std::optional<std::string> uuid, std::optional<unsigned> index,
                       std::optional<std::string> library, double hint) {
             return std::make_unique<NvmlSampler>(uuid, index, library.value_or("libnvidia-ml.so.1"), hint);
           }),
           py::kw_only(), py::arg("device_uuid") = py::none(), py::arg("index") = py::none(),
           py::arg("library") = py::none(), py::arg("tick_period_hint_ms") = 100.0)
      .def("info", [](const NvmlSampler& s) { return to_dict(s.info()); })
      .def("support", &NvmlSampler::support)
      .def("call_costs_us", &NvmlSampler::call_costs_us, py::call_guard<py::gil_scoped_release>())
      .def("start", &NvmlSampler::start)
      .def("stop", &NvmlSampler::stop, py::call_guard<py::gil_scoped_release>())
      .def("drain",
           [](NvmlSampler& s) {
             PowerColumns power;
             EnergyColumns energy;
             s.drain(power, energy);
             py::dict d;
             d["power"] = to_dict(power);
             d["energy"] = to_dict(energy);
             return d;
           })
      .def("set_tick_interval_s", &NvmlSampler::set_tick_interval_s, py::arg("seconds"))
      .def("set_field_interval_s", &NvmlSampler::set_field_interval_s, py::arg("seconds"))
      .def("wait_for_tick", &NvmlSampler::wait_for_tick, py::arg("timeout_s"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("tick_period_ms", &NvmlSampler::tick_period_ms)
      .def_property_readonly("busy_s", &NvmlSampler::busy_s)
      .def_property_readonly("last_error", &NvmlSampler::last_error);

  bind_testing(m);
}
