#include "nvml_sampler.h"

#include <algorithm>
#include <chrono>

#include "clocks.h"

namespace llmkern {
namespace {

using namespace std::chrono_literals;

constexpr int64_t kMs = 1'000'000;
constexpr int64_t kFieldPeriodNs = 250 * kMs;
// Clock, temperature and throttle reasons take some 2 ms together while the GPU works: with rare ticks, rarely as well.
constexpr int64_t kRareFieldPeriodNs = 1000 * kMs;
// The driver keeps 119 samples of 20 ms; asking every second loses none.
constexpr int64_t kSamplePeriodNs = 900 * kMs;
// A counter call takes about 3 ms on an H100: begin so early that one call ends before the tick.
constexpr int64_t kLeadNs = 5 * kMs;
constexpr int64_t kPauseNs = 500'000;
// A tick known less well than this is not used: two reads per 2 s window must stay under half a percent.
constexpr int64_t kWorstUncertaintyNs = 8 * kMs;

// This thread goes by the clock that nobody sets; only what it records has the time of day.
int64_t now_ns() {
  return steady_now_ns();
}

template <typename Call>
double median_cost_us(Call call) {
  std::vector<double> costs;
  for (int i = 0; i < 9; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    costs.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
  }
  std::nth_element(costs.begin(), costs.begin() + 4, costs.end());
  return costs[4];
}

nvml::FieldValue field(unsigned id, unsigned scope) {
  nvml::FieldValue value{};
  value.field_id = id;
  value.scope_id = scope;
  return value;
}

int64_t as_integer(const nvml::FieldValue& f) {
  switch (f.value_type) {
    case nvml::kDouble: return static_cast<int64_t>(f.value.d);
    case nvml::kUnsignedInt: return f.value.ui;
    case nvml::kUnsignedLong: return static_cast<int64_t>(f.value.ul);
    default: return static_cast<int64_t>(f.value.ull);
  }
}

}  // namespace

NvmlSampler::NvmlSampler(std::optional<std::string> uuid, std::optional<unsigned> index, const std::string& library,
                         double tick_period_hint_ms)
    : api_(library), lock_(static_cast<int64_t>(tick_period_hint_ms * kMs)) {
  if (uuid) {
    api_.check(api_.by_uuid(uuid->c_str(), &device_), "find the GPU " + *uuid);
  } else {
    api_.check(api_.by_index(index.value_or(0), &device_), "find GPU " + std::to_string(index.value_or(0)));
  }
  unsigned found = index.value_or(0);
  if (api_.index_of != nullptr) api_.index_of(device_, &found);
  device_index_ = static_cast<int32_t>(found);
  probe();
}

NvmlSampler::~NvmlSampler() {
  stop();
}

void NvmlSampler::probe() {
  const auto note = [this](const char* source, bool present, auto call) {
    const int result = present ? call() : nvml::kNotSupported;
    support_[source] = result == nvml::kSuccess ? std::nullopt : std::optional(api_.error_name(result));
  };
  unsigned long long wide = 0;
  unsigned narrow = 0;
  note("energy_counter", api_.total_energy != nullptr, [&] { return api_.total_energy(device_, &wide); });
  note("power_samples", api_.samples != nullptr, [&] {
    int type = 0;
    return api_.samples(device_, nvml::kTotalPowerSamples, 0, &type, &narrow, nullptr);
  });
  for (const auto& [source, id, scope] : {std::tuple("instant", nvml::kFieldPowerInstant, nvml::kScopeGpu),
                                          std::tuple("average", nvml::kFieldPowerAverage, nvml::kScopeGpu),
                                          std::tuple("memory_average", nvml::kFieldPowerAverage, nvml::kScopeMemory)}) {
    note(source, api_.fields != nullptr, [&, id = id, scope = scope] {
      nvml::FieldValue value = field(id, scope);
      const int result = api_.fields(device_, 1, &value);
      return result == nvml::kSuccess ? value.result : result;
    });
  }
  note("sm_clock", api_.clock != nullptr, [&] { return api_.clock(device_, nvml::kClockSm, &narrow); });
  note("temperature", api_.temperature != nullptr, [&] { return api_.temperature(device_, 0, &narrow); });
  note("throttle", api_.throttle != nullptr, [&] { return api_.throttle(device_, &wide); });
}

bool NvmlSampler::works(const char* source) const {
  return !support_.at(source).has_value();
}

DeviceInfo NvmlSampler::info() const {
  DeviceInfo info;
  char text[128] = {};
  if (api_.name_of(device_, text, sizeof text) == nvml::kSuccess) info.name = text;
  if (api_.uuid_of(device_, text, sizeof text) == nvml::kSuccess) info.uuid = text;
  if (api_.driver_version(text, sizeof text) == nvml::kSuccess) info.driver_version = text;
  if (api_.nvml_version != nullptr && api_.nvml_version(text, sizeof text) == nvml::kSuccess) info.nvml_version = text;
  info.index = device_index_;
  api_.device_count(&info.device_count);
  unsigned a = 0, b = 0;
  int i = 0;
  nvml::Memory memory{};
  const auto ok = [](int result) { return result == nvml::kSuccess; };
  if (api_.cuda_version && ok(api_.cuda_version(&i))) info.cuda_driver_version = i;
  if (api_.persistence && ok(api_.persistence(device_, &i))) info.persistence_mode = i;
  if (api_.power_limit && ok(api_.power_limit(device_, &a))) info.power_limit_mw = a;
  if (api_.power_limits && ok(api_.power_limits(device_, &a, &b))) info.power_limit_max_mw = b;
  if (api_.max_clock && ok(api_.max_clock(device_, nvml::kClockSm, &a))) info.sm_clock_max_mhz = a;
  if (api_.memory && ok(api_.memory(device_, &memory))) info.memory_bytes = static_cast<int64_t>(memory.total);
  if (api_.mig_mode && ok(api_.mig_mode(device_, &a, &b))) info.mig_enabled = a == 1;
  return info;
}

std::map<std::string, double> NvmlSampler::call_costs_us() const {
  std::map<std::string, double> costs;
  unsigned long long wide = 0;
  unsigned narrow = 0;
  const auto add = [&](const char* source, auto call) {
    if (works(source)) costs[source] = median_cost_us(call);
  };
  add("energy_counter", [&] { api_.total_energy(device_, &wide); });
  add("power_samples", [&] {
    nvml::Sample buffer[256];
    unsigned count = std::size(buffer);
    int type = 0;
    api_.samples(device_, nvml::kTotalPowerSamples, 0, &type, &count, buffer);
  });
  for (const auto& [source, id, scope] : {std::tuple("instant", nvml::kFieldPowerInstant, nvml::kScopeGpu),
                                          std::tuple("average", nvml::kFieldPowerAverage, nvml::kScopeGpu),
                                          std::tuple("memory_average", nvml::kFieldPowerAverage, nvml::kScopeMemory)}) {
    add(source, [&, id = id, scope = scope] {
      nvml::FieldValue value = field(id, scope);
      api_.fields(device_, 1, &value);
    });
  }
  add("sm_clock", [&] { api_.clock(device_, nvml::kClockSm, &narrow); });
  add("temperature", [&] { api_.temperature(device_, 0, &narrow); });
  add("throttle", [&] { api_.throttle(device_, &wide); });
  return costs;
}

void NvmlSampler::start() {
  std::lock_guard<std::mutex> control(control_mutex_);
  if (thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = false;
  }
  lock_.reset();
  hunting_ = false;
  last_tick_ns_ = 0;
  last_mj_.reset();
  last_sample_us_ = static_cast<unsigned long long>(wall_now_ns() / 1000);
  thread_ = std::thread(&NvmlSampler::loop, this);
}

void NvmlSampler::stop() {
  std::lock_guard<std::mutex> control(control_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  stopping_.notify_all();
  ticked_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void NvmlSampler::loop() {
  pthread_setname_np(pthread_self(), "llmkern-nvml");
  int64_t counter_at = 0, fields_at = 0, samples_at = now_ns() + kSamplePeriodNs, answered = 0;
  while (true) {
    int64_t now = now_ns();
    if (now >= counter_at) counter_at = follow_counter(now);
    // The cheap reads wait while a tick is near, so that they do not blur it.
    if (now >= fields_at && counter_at - now_ns() > kMs) fields_at = read_fields(now_ns());
    if (now >= samples_at && counter_at - now_ns() > kMs) samples_at = read_samples(now_ns());
    busy_ns_ += now_ns() - now;
    const int64_t wake =
        std::min({counter_at, std::max(fields_at, now + kPauseNs), std::max(samples_at, now + kPauseNs)});
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t rest = wake - now_ns();
    stopping_.wait_for(lock, std::chrono::nanoseconds(std::max<int64_t>(rest, 1)),
                       [&] { return stop_ || hurried_ != answered; });
    if (stop_) break;
    const bool hurry = hurried_ != answered;
    answered = hurried_;
    lock.unlock();
    // Somebody waits for a tick, or wants them more often: do not sleep until the one that was planned.
    if (hurry && !hunting_ && lock_.locked()) counter_at = next_hunt(now_ns());
  }
  // What the driver still keeps belongs to the time before the stop.
  read_samples(now_ns());
}

int64_t NvmlSampler::follow_counter(int64_t now) {
  if (!works("energy_counter")) return now + 3'600'000 * kMs;
  unsigned long long energy_mj = 0;
  const int64_t begin = now_ns();
  const int result = api_.total_energy(device_, &energy_mj);
  const int64_t end = now_ns();
  if (result != nvml::kSuccess) {
    failed(result, "read the energy counter");
    return end + 100 * kMs;
  }
  const int64_t middle = begin + (end - begin) / 2;
  if (!hunting_ || !last_mj_ || energy_mj == *last_mj_) {
    // The first read of a hunt only tells the value before the tick.
    hunting_ = true;
    last_mj_ = energy_mj;
    last_poll_ns_ = middle;
    return end + (lock_.locked() ? kPauseNs : 2 * kMs);
  }
  const int64_t uncertainty = (middle - last_poll_ns_) / 2;
  const int64_t tick = middle - uncertainty;
  last_mj_ = energy_mj;
  last_poll_ns_ = middle;
  if (uncertainty > kWorstUncertaintyNs) return end + kPauseNs;  // this thread was held up: hunt the next one
  if (last_tick_ns_ != 0) lock_.learn(tick - last_tick_ns_);
  last_tick_ns_ = tick;
  record_tick(wall_ns(tick), uncertainty, static_cast<int64_t>(energy_mj));
  if (!lock_.locked()) return end + 2 * kMs;
  hunting_ = false;
  return next_hunt(end);
}

// The time to begin looking for the next wanted tick.
int64_t NvmlSampler::next_hunt(int64_t now) const {
  const int64_t lead = std::min(kLeadNs, lock_.period_ns() / 3);
  int64_t earliest = now + lead + kPauseNs;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_ == 0) earliest = std::max(earliest, last_tick_ns_ + interval_ns_ - lock_.period_ns() / 2);
  }
  const int64_t periods = std::max<int64_t>(1, (earliest - last_tick_ns_ + lock_.period_ns() - 1) / lock_.period_ns());
  return last_tick_ns_ + periods * lock_.period_ns() - lead;
}

void NvmlSampler::set_tick_interval_s(double seconds) {
  interval_ns_ = static_cast<int64_t>(seconds * 1e9);
  std::lock_guard<std::mutex> lock(mutex_);
  ++hurried_;
  stopping_.notify_all();
}

void NvmlSampler::set_field_interval_s(double seconds) {
  field_interval_ns_ = static_cast<int64_t>(seconds * 1e9);
}

void NvmlSampler::record_tick(int64_t time_ns, int64_t uncertainty_ns, int64_t energy_mj) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    energy_.timestamp_ns.push_back(time_ns);
    energy_.device.push_back(device_index_);
    energy_.energy_mj.push_back(energy_mj);
    energy_.uncertainty_ns.push_back(uncertainty_ns);
    latest_tick_ = {time_ns, energy_mj};
    ++ticks_;
    if (lock_.locked()) tick_period_ms_ = static_cast<double>(lock_.period_ns()) / kMs;
  }
  ticked_.notify_all();
}

int64_t NvmlSampler::read_fields(int64_t now) {
  const int64_t wanted_ns = field_interval_ns_;
  const int64_t field_period_ns = wanted_ns > 0 ? wanted_ns : interval_ns_ > 0 ? kRareFieldPeriodNs : kFieldPeriodNs;
  nvml::FieldValue values[3];
  Sensor sensors[3];
  int count = 0;
  const auto add = [&](const char* source, Sensor sensor, unsigned id, unsigned scope) {
    if (!works(source)) return;
    sensors[count] = sensor;
    values[count++] = field(id, scope);
  };
  add("instant", kInstant, nvml::kFieldPowerInstant, nvml::kScopeGpu);
  add("average", kAverage, nvml::kFieldPowerAverage, nvml::kScopeGpu);
  add("memory_average", kMemoryAverage, nvml::kFieldPowerAverage, nvml::kScopeMemory);
  int32_t clock_mhz = -1, temperature_c = -1;
  int64_t throttle = -1;
  unsigned narrow = 0;
  unsigned long long wide = 0;
  if (works("sm_clock") && api_.clock(device_, nvml::kClockSm, &narrow) == nvml::kSuccess) {
    clock_mhz = static_cast<int32_t>(narrow);
  }
  if (works("temperature") && api_.temperature(device_, 0, &narrow) == nvml::kSuccess) {
    temperature_c = static_cast<int32_t>(narrow);
  }
  if (works("throttle") && api_.throttle(device_, &wide) == nvml::kSuccess) throttle = static_cast<int64_t>(wide);
  if (count > 0) {
    const int result = api_.fields(device_, count, values);
    if (result != nvml::kSuccess) {
      failed(result, "read its power fields");
      return now + field_period_ns;
    }
  }
  const int64_t time_ns = wall_ns(now);
  std::lock_guard<std::mutex> lock(mutex_);
  for (int i = 0; i < count; ++i) {
    if (values[i].result != nvml::kSuccess) continue;
    power_.timestamp_ns.push_back(time_ns);
    power_.device.push_back(device_index_);
    power_.sensor.push_back(sensors[i]);
    power_.power_mw.push_back(as_integer(values[i]));
    power_.sm_clock_mhz.push_back(clock_mhz);
    power_.temperature_c.push_back(temperature_c);
    power_.throttle.push_back(throttle);
  }
  return now + field_period_ns;
}

int64_t NvmlSampler::read_samples(int64_t now) {
  if (!works("power_samples")) return now + 3'600'000 * kMs;
  nvml::Sample buffer[512];
  unsigned count = std::size(buffer);
  int type = 0;
  const int result = api_.samples(device_, nvml::kTotalPowerSamples, last_sample_us_, &type, &count, buffer);
  // "Not found" is NVML's word for no new samples.
  if (result == nvml::kNotFound) return now + kSamplePeriodNs;
  if (result != nvml::kSuccess) {
    failed(result, "read its power samples");
    return now + kSamplePeriodNs;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  unsigned long long newest = last_sample_us_;
  for (unsigned i = 0; i < count; ++i) {
    if (buffer[i].timestamp_us <= last_sample_us_) continue;
    newest = std::max(newest, buffer[i].timestamp_us);
    power_.timestamp_ns.push_back(static_cast<int64_t>(buffer[i].timestamp_us) * 1000);
    power_.device.push_back(device_index_);
    power_.sensor.push_back(kSamples);
    power_.power_mw.push_back(buffer[i].value.ui);
    power_.sm_clock_mhz.push_back(-1);
    power_.temperature_c.push_back(-1);
    power_.throttle.push_back(-1);
  }
  last_sample_us_ = newest;
  return now + kSamplePeriodNs;
}

void NvmlSampler::failed(int result, const char* what) {
  std::lock_guard<std::mutex> lock(mutex_);
  last_error_ = std::string("NVML cannot ") + what + " (" + api_.error_name(result) + ")";
}

void NvmlSampler::drain(PowerColumns& power, EnergyColumns& energy) {
  std::lock_guard<std::mutex> lock(mutex_);
  power = std::move(power_);
  energy = std::move(energy_);
  power_ = {};
  energy_ = {};
}

std::optional<std::pair<int64_t, int64_t>> NvmlSampler::wait_for_tick(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t seen = ticks_;
  ++waiting_;
  ++hurried_;
  stopping_.notify_all();
  ticked_.wait_for(lock, std::chrono::duration<double>(timeout_s), [&] { return ticks_ != seen || stop_; });
  --waiting_;
  if (ticks_ == seen) return std::nullopt;
  return latest_tick_;
}

std::optional<double> NvmlSampler::tick_period_ms() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return tick_period_ms_;
}

std::optional<std::string> NvmlSampler::last_error() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return last_error_;
}

}  // namespace llmkern
