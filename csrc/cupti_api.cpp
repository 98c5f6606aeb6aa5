#include "cupti_api.h"

#include <cstddef>

namespace llmkern {
namespace {

// CUPTI appends to its records. The decoder reads these fields only, which have not moved since CUDA 12.0, so that one
// build reads the records of every CUPTI from there on.
static_assert(offsetof(CUpti_ActivityKernel9, name) == offsetof(CUpti_ActivityKernel10, name));
static_assert(offsetof(CUpti_ActivityKernel9, graphNodeId) == offsetof(CUpti_ActivityKernel10, graphNodeId));
static_assert(offsetof(CUpti_ActivityKernel9, graphId) == offsetof(CUpti_ActivityKernel10, graphId));
static_assert(offsetof(CUpti_ActivityKernel8, name) == offsetof(CUpti_ActivityKernel10, name));
static_assert(offsetof(CUpti_ActivityKernel8, graphId) == offsetof(CUpti_ActivityKernel10, graphId));
static_assert(offsetof(CUpti_ActivityMemcpy5, graphId) == offsetof(CUpti_ActivityMemcpy6, graphId));
static_assert(offsetof(CUpti_ActivityMemcpyPtoP3, correlationId) == offsetof(CUpti_ActivityMemcpyPtoP4, correlationId));
static_assert(offsetof(CUpti_ActivityMemset3, correlationId) == offsetof(CUpti_ActivityMemset4, correlationId));
static_assert(offsetof(CUpti_ActivityOverhead2, start) == offsetof(CUpti_ActivityOverhead3, start));

constexpr uint32_t kOldestVersion = 18;  // CUDA 12.0

std::vector<std::string> with_sonames(std::vector<std::string> candidates) {
  candidates.insert(candidates.end(), {"libcupti.so.13", "libcupti.so.12", "libcupti.so"});
  return candidates;
}

}  // namespace

CuptiApi::CuptiApi(const std::vector<std::string>& candidates, const std::string& file)
    : library(
          file.empty() ? "libcupti.so" : "", file.empty() ? with_sonames(candidates) : std::vector<std::string>{file},
          "install the CUPTI of your CUDA version ('pip install nvidia-cuda-cupti'); a CUDA build of torch brings it."),
      get_version(library.need<decltype(get_version)>("cuptiGetVersion")),
      get_result_string(library.need<decltype(get_result_string)>("cuptiGetResultString")),
      get_error_message(library.find<decltype(get_error_message)>("cuptiGetErrorMessage")),
      get_timestamp(library.need<decltype(get_timestamp)>("cuptiGetTimestamp")),
      subscribe(library.need<decltype(subscribe)>("cuptiSubscribe")),
      unsubscribe(library.need<decltype(unsubscribe)>("cuptiUnsubscribe")),
      enable_callback(library.need<decltype(enable_callback)>("cuptiEnableCallback")),
      get_callback_name(library.need<decltype(get_callback_name)>("cuptiGetCallbackName")),
      enable(library.need<decltype(enable)>("cuptiActivityEnable")),
      disable(library.need<decltype(disable)>("cuptiActivityDisable")),
      register_callbacks(library.need<decltype(register_callbacks)>("cuptiActivityRegisterCallbacks")),
      get_next_record(library.need<decltype(get_next_record)>("cuptiActivityGetNextRecord")),
      get_num_dropped_records(library.need<decltype(get_num_dropped_records)>("cuptiActivityGetNumDroppedRecords")),
      flush_all(library.need<decltype(flush_all)>("cuptiActivityFlushAll")),
      set_attribute(library.need<decltype(set_attribute)>("cuptiActivitySetAttribute")),
      set_thread_id_type(library.need<decltype(set_thread_id_type)>("cuptiSetThreadIdType")) {
  get_version(&version);
  if (version < kOldestVersion) {
    throw RecorderError("CUPTI at " + library.path() + " has API version " + std::to_string(version) +
                            ", at least 18 (CUDA 12.0) is needed: install a newer CUDA build of torch.",
                        "CUPTI_TOO_OLD");
  }
}

std::string CuptiApi::error_name(CUptiResult result) const {
  const char* text = nullptr;
  if (get_result_string(result, &text) != CUPTI_SUCCESS || text == nullptr)
    return "CUPTI_ERROR_" + std::to_string(result);
  return text;
}

void CuptiApi::check(CUptiResult result, const char* what) const {
  if (result == CUPTI_SUCCESS) return;
  const std::string name = error_name(result);
  std::string sentence = std::string("CUPTI cannot ") + what + " (" + name + ", code " + std::to_string(result) + ")";
  switch (result) {
    case CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED:
      sentence +=
          ": another profiler (Nsight Systems or Compute, torch.profiler, Proton) is attached to this process, "
          "and CUPTI serves one at a time; run without it.";
      break;
    case CUPTI_ERROR_INSUFFICIENT_PRIVILEGES:
    case CUPTI_ERROR_VIRTUALIZED_DEVICE_INSUFFICIENT_PRIVILEGES:
      sentence +=
          ": profiling is restricted to administrators here; ask for the driver option "
          "NVreg_RestrictProfilingToAdminUsers=0.";
      break;
    case CUPTI_ERROR_NOT_INITIALIZED:
    case CUPTI_ERROR_UNKNOWN:
    case CUPTI_ERROR_INVALID_DEVICE: sentence += ": there is no usable NVIDIA GPU or driver in this process."; break;
    default: sentence += ": see the CUPTI manual for this code.";
  }
  throw RecorderError(sentence, name, result);
}

std::string CuptiApi::callback_name(CUpti_CallbackDomain domain, CUpti_CallbackId id) const {
  const char* text = nullptr;
  if (get_callback_name(domain, id, &text) != CUPTI_SUCCESS || text == nullptr) return {};
  std::string name = text;
  // Runtime names end in the version that introduced them.
  const size_t suffix = name.rfind("_v");
  if (suffix != std::string::npos && name.find_first_not_of("0123456789", suffix + 2) == std::string::npos) {
    name.resize(suffix);
  }
  return name;
}

}  // namespace llmkern
