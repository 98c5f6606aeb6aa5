// Reads power, energy, clock and temperature of one GPU on a thread of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "nvml_api.h"
#include "tick_lock.h"

namespace llmkern {

inline constexpr const char* kSensorNames[] = {"samples", "instant", "average", "memory_average"};
enum Sensor : int8_t { kSamples = 0, kInstant = 1, kAverage = 2, kMemoryAverage = 3 };

struct PowerColumns {
  std::vector<int64_t> timestamp_ns, power_mw, throttle;  // -1: absent
  std::vector<int32_t> device, sm_clock_mhz, temperature_c;
  std::vector<int8_t> sensor;
};

struct EnergyColumns {
  std::vector<int64_t> timestamp_ns, energy_mj, uncertainty_ns;
  std::vector<int32_t> device;
};

struct DeviceInfo {
  std::string name, uuid, driver_version, nvml_version;
  std::optional<int> index, cuda_driver_version, persistence_mode;
  std::optional<int64_t> power_limit_mw, power_limit_max_mw, sm_clock_max_mhz, memory_bytes;
  std::optional<bool> mig_enabled;
  unsigned device_count = 0;
};

class NvmlSampler {
 public:
  NvmlSampler(std::optional<std::string> uuid, std::optional<unsigned> index, const std::string& library,
              double tick_period_hint_ms);
  ~NvmlSampler();
  NvmlSampler(const NvmlSampler&) = delete;
  NvmlSampler& operator=(const NvmlSampler&) = delete;

  DeviceInfo info() const;
  // For each source nothing when it works, else the error's name.
  const std::map<std::string, std::optional<std::string>>& support() const { return support_; }
  std::map<std::string, double> call_costs_us() const;
  void start();
  void stop();
  void drain(PowerColumns& power, EnergyColumns& energy);
  // Reads about one tick in `seconds` from now on (0: every tick). A read costs milliseconds inside the driver, and
  // launches wait for it; the counter integrates, so that ticks left out lose nothing.
  void set_tick_interval_s(double seconds);
  // Reads power fields, clock and temperature every `seconds`; 0: as often as a run needs them.
  void set_field_interval_s(double seconds);
  // The next tick of the energy counter after the call: (time, mJ); nothing after `timeout_s`.
  std::optional<std::pair<int64_t, int64_t>> wait_for_tick(double timeout_s);
  std::optional<double> tick_period_ms() const;
  // How long calls into NVML have taken since the sampler was made.
  double busy_s() const { return static_cast<double>(busy_ns_) / 1e9; }
  std::optional<std::string> last_error() const;

 private:
  void probe();
  bool works(const char* source) const;
  void loop();
  // Each returns the time, in ns, at which it wants to be called again.
  int64_t follow_counter(int64_t now_ns);
  int64_t read_fields(int64_t now_ns);
  int64_t read_samples(int64_t now_ns);
  void record_tick(int64_t time_ns, int64_t uncertainty_ns, int64_t energy_mj);
  void failed(int result, const char* what);

  nvml::Api api_;
  nvml::Device device_ = nullptr;
  int32_t device_index_ = 0;
  std::map<std::string, std::optional<std::string>> support_;

  int64_t next_hunt(int64_t now_ns) const;

  // State of the counter's phase lock; of the sampler's thread only. Times are of CLOCK_MONOTONIC.
  std::optional<unsigned long long> last_mj_;
  bool hunting_ = false;
  int64_t last_poll_ns_ = 0;
  int64_t last_tick_ns_ = 0;
  TickLock lock_;
  std::atomic<int64_t> interval_ns_{0}, field_interval_ns_{0}, busy_ns_{0};
  unsigned long long last_sample_us_ = 0;

  // Taken by whoever starts or stops; never by the sampler's thread.
  std::mutex control_mutex_;
  mutable std::mutex mutex_;
  std::condition_variable ticked_, stopping_;
  PowerColumns power_;
  EnergyColumns energy_;
  int64_t ticks_ = 0;
  int waiting_ = 0;
  int64_t hurried_ = 0;
  std::pair<int64_t, int64_t> latest_tick_{0, 0};
  std::optional<double> tick_period_ms_;
  std::optional<std::string> last_error_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace llmkern
