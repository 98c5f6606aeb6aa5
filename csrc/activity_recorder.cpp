#include "activity_recorder.h"

#include <cstdlib>
#include <cstring>

#include "clocks.h"

namespace llmkern {
namespace {

std::atomic<ActivityRecorder*> active{nullptr};
std::atomic<int64_t> inside{0};

// A callback's stay in the active recorder, which is not destroyed while one is there. Whoever takes `active` away
// looks at `inside` afterwards, a callback at `active` after it has raised `inside`: one of the two sees the other.
class Visit {
 public:
  Visit() {
    ++inside;
    recorder = active.load();
  }
  ~Visit() { --inside; }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

  ActivityRecorder* recorder = nullptr;
};

void wait_until_left() {
  while (inside.load() != 0) std::this_thread::yield();
}

constexpr size_t kAlignment = 8;
constexpr size_t kMostPooled = 64;  // zeroed buffers kept; more are freed

// Buffers are zeroed here, off the threads that launch kernels; CUPTI would do it on those.
uint8_t* allocate(size_t bytes) noexcept {
  return static_cast<uint8_t*>(std::calloc(bytes, 1));
}

}  // namespace

ActivityRecorder::ActivityRecorder(const std::vector<std::string>& candidates, const std::string& library)
    : api_(candidates, library), calls_(api_, names_) {}

ActivityRecorder::~ActivityRecorder() {
  close();
}

void ActivityRecorder::start(size_t buffer_bytes, bool host_calls) {
  std::lock_guard<std::mutex> control(control_mutex_);
  if (closed_) throw RecorderError("this recorder is closed: make another one.", "CLOSED");
  if (running_) return;
  buffer_bytes = (buffer_bytes + kAlignment - 1) / kAlignment * kAlignment;
  // Buffers of another size are of no use any more.
  if (buffer_bytes != buffer_bytes_.exchange(buffer_bytes)) free_pool();
  activate();
  try {
    // CUPTI serves one subscriber per process. Asking for the slot is what finds another profiler, which the activity
    // functions alone would silently fight over buffers with.
    api_.check(api_.subscribe(&subscriber_, reinterpret_cast<CUpti_CallbackFunc>(&on_call), nullptr),
               "be subscribed to");
    size_t size = sizeof(uint8_t);
    uint8_t zeroed = 1;
    api_.set_attribute(CUPTI_ACTIVITY_ATTR_ZEROED_OUT_ACTIVITY_BUFFER, &size, &zeroed);
    // Thread ids of the operating system, so that launches and ranges name the same thread. Kernels name none.
    if (host_calls) api_.set_thread_id_type(CUPTI_ACTIVITY_THREAD_ID_TYPE_SYSTEM);
    // No timestamp callback: on CUPTI 12.6-13.0 it can lose kernel times, and the default clock is already ours.
    api_.check(api_.register_callbacks(&on_buffer_requested, &on_buffer_completed), "register its buffers");
    start_decoder();
    if (!host_calls) {
      // A subscriber without callbacks has nothing to gain and may cost launches something.
      api_.unsubscribe(subscriber_);
      subscriber_ = nullptr;
    }
    enable_all(host_calls);
    if (host_calls) calls_.enable(subscriber_);
  } catch (...) {
    disable_all();
    if (subscriber_ != nullptr) api_.unsubscribe(subscriber_);
    subscriber_ = nullptr;
    throw;
  }
  running_ = true;
}

// Takes the place of a recorder that is not running any more.
void ActivityRecorder::activate() {
  ActivityRecorder* before = active.load();
  if (before == this) return;
  if (before != nullptr && before->running_) {
    throw RecorderError("another llmkern recorder is running in this process: stop it first.", "ALREADY_RUNNING");
  }
  active = this;
  wait_until_left();
}

void ActivityRecorder::close() {
  std::lock_guard<std::mutex> control(control_mutex_);
  if (closed_) return;
  stop_locked();
  closed_ = true;
  ActivityRecorder* self = this;
  if (active.compare_exchange_strong(self, nullptr)) wait_until_left();
  {
    std::lock_guard<std::mutex> lock(queue_mutex_);
    quit_ = true;
  }
  queue_filled_.notify_all();
  if (decoder_thread_.joinable()) decoder_thread_.join();
  free_pool();
}

void ActivityRecorder::free_pool() {
  std::lock_guard<std::mutex> lock(pool_mutex_);
  for (const auto& [data, capacity] : pool_) {
    std::free(data);
    --allocated_;
  }
  pool_.clear();
  pool_.shrink_to_fit();
}

void ActivityRecorder::enable_all(bool host_calls) {
  std::vector<std::pair<CUpti_ActivityKind, const char*>> kinds = {
      {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, "record kernels"},
      {CUPTI_ACTIVITY_KIND_MEMCPY, "record copies"},
      {CUPTI_ACTIVITY_KIND_MEMCPY2, "record peer copies"},
      {CUPTI_ACTIVITY_KIND_MEMSET, "record memsets"},
  };
  // It is a cause of gaps, and causes are read beside host calls.
  if (host_calls) kinds.emplace_back(CUPTI_ACTIVITY_KIND_OVERHEAD, "record its own overhead");
  for (const auto& [kind, what] : kinds) {
    api_.check(api_.enable(kind), what);
    enabled_.push_back(kind);
  }
}

void ActivityRecorder::disable_all() noexcept {
  calls_.disable();
  for (const auto kind : enabled_) api_.disable(kind);
  enabled_.clear();
}

void ActivityRecorder::stop() {
  std::lock_guard<std::mutex> control(control_mutex_);
  stop_locked();
}

void ActivityRecorder::stop_locked() {
  if (!running_) return;
  running_ = false;
  disable_all();
  api_.flush_all(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  settle();
  if (subscriber_ != nullptr) api_.unsubscribe(subscriber_);
  subscriber_ = nullptr;
  // `active` stays this recorder until it is closed or the next one starts: CUPTI may still hand back a buffer.
}

void ActivityRecorder::flush(bool forced) {
  if (running_) api_.flush_all(forced ? CUPTI_ACTIVITY_FLAG_FLUSH_FORCED : 0);
}

void ActivityRecorder::on_call(void*, CUpti_CallbackDomain domain, CUpti_CallbackId id, const void* data) noexcept {
  const Visit visit;
  if (visit.recorder != nullptr) visit.recorder->calls_.on_call(domain, id, data);
}

void ActivityRecorder::on_buffer_requested(uint8_t** buffer, size_t* size, size_t* max_records) noexcept {
  *max_records = 0;
  *buffer = nullptr;
  *size = 0;
  const Visit visit;
  if (visit.recorder == nullptr) return;
  try {
    *buffer = visit.recorder->take_buffer(size);
  } catch (...) {
    ++visit.recorder->failed_allocations_;
  }
}

void ActivityRecorder::on_buffer_completed(CUcontext context, uint32_t stream, uint8_t* buffer, size_t size,
                                           size_t valid) noexcept {
  if (buffer == nullptr) return;
  const Visit visit;
  ActivityRecorder* self = visit.recorder;
  if (self == nullptr) {
    // Later than the last recorder.
    std::free(buffer);
    return;
  }
  // Outside our locks: CUPTI holds its own here, and takes them in the other order while it launches.
  size_t dropped = 0;
  if (self->api_.get_num_dropped_records(context, stream, &dropped) == CUPTI_SUCCESS) {
    self->dropped_ += static_cast<int64_t>(dropped);
  }
  try {
    --self->in_flight_;
    self->enqueue({buffer, valid, size});
  } catch (...) {
    ++self->failed_allocations_;
    std::free(buffer);
  }
}

uint8_t* ActivityRecorder::take_buffer(size_t* size) {
  {
    std::lock_guard<std::mutex> lock(pool_mutex_);
    if (!pool_.empty()) {
      const auto [data, capacity] = pool_.back();
      pool_.pop_back();
      ++in_flight_;
      *size = capacity;
      return data;
    }
  }
  const size_t capacity = buffer_bytes_;
  uint8_t* data = allocate(capacity);
  if (data == nullptr) {
    ++failed_allocations_;
    return nullptr;
  }
  ++allocated_;
  ++in_flight_;
  *size = capacity;
  return data;
}

void ActivityRecorder::give_buffer(uint8_t* data, size_t used, size_t capacity) {
  if (capacity == buffer_bytes_) {
    std::memset(data, 0, used);
    std::lock_guard<std::mutex> lock(pool_mutex_);
    if (pool_.size() < kMostPooled) {
      pool_.emplace_back(data, capacity);
      return;
    }
  }
  std::free(data);
  --allocated_;
}

void ActivityRecorder::inject(const uint8_t* data, size_t size) {
  {
    std::lock_guard<std::mutex> control(control_mutex_);
    if (closed_) throw RecorderError("this recorder is closed: make another one.", "CLOSED");
    start_decoder();
  }
  uint8_t* copy = allocate(size);
  if (copy == nullptr) throw std::bad_alloc();
  ++allocated_;
  std::memcpy(copy, data, size);
  enqueue({copy, size, size});
}

void ActivityRecorder::enqueue(Filled filled) {
  {
    std::lock_guard<std::mutex> lock(queue_mutex_);
    queue_.push_back(filled);
    queued_bytes_ += filled.valid;
    peak_queued_bytes_ = std::max(peak_queued_bytes_, queued_bytes_);
  }
  queue_filled_.notify_one();
}

void ActivityRecorder::start_decoder() {
  std::lock_guard<std::mutex> lock(queue_mutex_);
  if (!decoder_thread_.joinable()) decoder_thread_ = std::thread(&ActivityRecorder::decode_loop, this);
}

void ActivityRecorder::decode_loop() {
  pthread_setname_np(pthread_self(), "llmkern-cupti");
  ActivityDecoder decoder(api_, names_);
  std::unique_lock<std::mutex> lock(queue_mutex_);
  while (true) {
    queue_filled_.wait(lock, [this] { return quit_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const Filled filled = queue_.front();
    queue_.pop_front();
    decoding_ = true;
    lock.unlock();
    try {
      std::lock_guard<std::mutex> columns_lock(columns_mutex_);
      try {
        decoder.decode(filled.data, filled.valid, columns_, counts_);
      } catch (...) {
        // Out of memory, most likely: what is left of this buffer is lost and counted, the process goes on.
        ++failed_decodes_;
        columns_.trim();
      }
    } catch (...) {
      ++failed_decodes_;
    }
    try {
      give_buffer(filled.data, filled.valid, filled.capacity);
    } catch (...) {
      std::free(filled.data);
      --allocated_;
    }
    lock.lock();
    decoding_ = false;
    queued_bytes_ -= filled.valid;
    if (queue_.empty()) queue_empty_.notify_all();
  }
}

void ActivityRecorder::settle() {
  std::unique_lock<std::mutex> lock(queue_mutex_);
  queue_empty_.wait(lock, [this] { return queue_.empty() && !decoding_; });
}

DeviceColumns ActivityRecorder::drain() {
  std::lock_guard<std::mutex> lock(columns_mutex_);
  DeviceColumns drained;
  std::swap(drained, columns_);
  return drained;
}

LaunchColumns ActivityRecorder::drain_calls() {
  LaunchColumns drained;
  calls_.drain(drained);
  return drained;
}

int64_t ActivityRecorder::backlog() const {
  size_t queued;
  {
    std::lock_guard<std::mutex> lock(queue_mutex_);
    queued = queued_bytes_;
  }
  std::lock_guard<std::mutex> lock(columns_mutex_);
  return static_cast<int64_t>(columns_.kernels.start_ns.size() + queued / sizeof(CUpti_ActivityKernel10));
}

std::map<std::string, int64_t> ActivityRecorder::statistics() const {
  std::map<std::string, int64_t> found;
  {
    std::lock_guard<std::mutex> lock(columns_mutex_);
    found = {{"kernels", counts_.kernels},
             {"copies", counts_.copies},
             {"overheads", counts_.overheads},
             {"lost_timestamps", counts_.lost_timestamps},
             {"unknown_records", counts_.unknown_records}};
  }
  std::lock_guard<std::mutex> lock(queue_mutex_);
  found["dropped_records"] = dropped_;
  found["failed_allocations"] = failed_allocations_;
  found["failed_decodes"] = failed_decodes_;
  found["buffers_allocated"] = allocated_;
  found["buffers_in_flight"] = in_flight_;
  found["launches"] = calls_.traced();
  found["lost_calls"] = calls_.lost();
  found["nested_calls"] = calls_.nested();
  found["peak_queue_bytes"] = static_cast<int64_t>(peak_queued_bytes_);
  return found;
}

int64_t ActivityRecorder::clock_offset_ns() const {
  uint64_t cupti_ns = 0;
  api_.check(api_.get_timestamp(&cupti_ns), "read its clock");
  return static_cast<int64_t>(cupti_ns) - wall_now_ns();
}

}  // namespace llmkern
