#include "nvml_api.h"

namespace llmkern::nvml {

Api::Api(const std::string& file)
    : library(file, {file}, "install the NVIDIA driver, or in a container start it with the 'utility' capability.") {
#define NEED(member, symbol) member = library.need<decltype(member)>(symbol)
#define FIND(member, symbol) member = library.find<decltype(member)>(symbol)
  NEED(init, "nvmlInit_v2");
  NEED(error_string, "nvmlErrorString");
  NEED(driver_version, "nvmlSystemGetDriverVersion");
  FIND(nvml_version, "nvmlSystemGetNVMLVersion");
  FIND(cuda_version, "nvmlSystemGetCudaDriverVersion");
  NEED(device_count, "nvmlDeviceGetCount_v2");
  NEED(by_index, "nvmlDeviceGetHandleByIndex_v2");
  NEED(by_uuid, "nvmlDeviceGetHandleByUUID");
  FIND(index_of, "nvmlDeviceGetIndex");
  NEED(name_of, "nvmlDeviceGetName");
  NEED(uuid_of, "nvmlDeviceGetUUID");
  FIND(total_energy, "nvmlDeviceGetTotalEnergyConsumption");
  FIND(samples, "nvmlDeviceGetSamples");
  FIND(fields, "nvmlDeviceGetFieldValues");
  FIND(clock, "nvmlDeviceGetClockInfo");
  FIND(max_clock, "nvmlDeviceGetMaxClockInfo");
  FIND(temperature, "nvmlDeviceGetTemperature");
  FIND(throttle, "nvmlDeviceGetCurrentClocksEventReasons");
  if (throttle == nullptr) FIND(throttle, "nvmlDeviceGetCurrentClocksThrottleReasons");
  FIND(mig_mode, "nvmlDeviceGetMigMode");
  FIND(power_limit, "nvmlDeviceGetEnforcedPowerLimit");
  FIND(power_limits, "nvmlDeviceGetPowerManagementLimitConstraints");
  FIND(persistence, "nvmlDeviceGetPersistenceMode");
  FIND(memory, "nvmlDeviceGetMemoryInfo");
#undef NEED
#undef FIND
  check(init(), "start");
}

std::string Api::error_name(int result) const {
  switch (result) {
    case kNotSupported: return "NVML_ERROR_NOT_SUPPORTED";
    case kNoPermission: return "NVML_ERROR_NO_PERMISSION";
    case kNotFound: return "NVML_ERROR_NOT_FOUND";
    default: {
      const char* text = error_string(result);
      return "NVML error " + std::to_string(result) + (text != nullptr ? std::string(", ") + text : "");
    }
  }
}

void Api::check(int result, const std::string& what) const {
  if (result == kSuccess) return;
  std::string advice = "see 'nvidia-smi' for the state of the driver.";
  if (result == kNoPermission) {
    advice = "ask the administrator for access to the GPU's management interface.";
  } else if (result == kNotFound) {
    advice = "the GPU is not visible to NVML; a MIG slice or another container may hide it.";
  }
  throw RecorderError("NVML cannot " + what + " (" + error_name(result) + "): " + advice, error_name(result), result);
}

}  // namespace llmkern::nvml
