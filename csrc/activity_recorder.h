// Records the activity of this process through CUPTI: buffers in, columns out.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "activity_decoder.h"
#include "call_tracer.h"

namespace llmkern {

class ActivityRecorder {
 public:
  ActivityRecorder(const std::vector<std::string>& candidates, const std::string& library);
  ~ActivityRecorder();
  ActivityRecorder(const ActivityRecorder&) = delete;
  ActivityRecorder& operator=(const ActivityRecorder&) = delete;

  void start(size_t buffer_bytes, bool host_calls);
  void stop();
  void flush(bool forced);
  // Waits until every buffer handed over so far is decoded.
  void settle();
  // Passes records through the same queue and decoder as CUPTI's.
  void inject(const uint8_t* data, size_t size);
  DeviceColumns drain();
  LaunchColumns drain_calls();
  int64_t backlog() const;
  std::vector<std::string> names() const { return names_.names(); }
  std::map<std::string, int64_t> statistics() const;
  int64_t clock_offset_ns() const;
  const CuptiApi& api() const { return api_; }

 private:
  struct Filled {
    uint8_t* data;
    size_t valid;
    size_t capacity;
  };

  static void CUPTIAPI on_buffer_requested(uint8_t** buffer, size_t* size, size_t* max_records) noexcept;
  static void CUPTIAPI on_buffer_completed(CUcontext context, uint32_t stream, uint8_t* buffer, size_t size,
                                           size_t valid) noexcept;

  void enable_all(bool host_calls);
  void disable_all() noexcept;
  uint8_t* take_buffer(size_t* size);
  void give_buffer(uint8_t* data, size_t used, size_t capacity);
  void enqueue(Filled filled);
  void start_decoder();
  void decode_loop();

  CuptiApi api_;
  NamePool names_;
  CallTracer calls_;
  CUpti_SubscriberHandle subscriber_ = nullptr;
  std::vector<CUpti_ActivityKind> enabled_;
  std::atomic<bool> running_{false};
  std::atomic<size_t> buffer_bytes_{1 << 20};

  mutable std::mutex pool_mutex_;
  std::vector<uint8_t*> pool_;
  std::atomic<int64_t> allocated_{0}, in_flight_{0}, failed_allocations_{0}, dropped_{0};

  mutable std::mutex queue_mutex_;
  std::condition_variable queue_filled_, queue_empty_;
  std::deque<Filled> queue_;
  size_t queued_bytes_ = 0, peak_queued_bytes_ = 0;
  bool decoding_ = false, quit_ = false;
  std::thread decoder_thread_;

  mutable std::mutex columns_mutex_;
  DeviceColumns columns_;
  DecodeCounts counts_;
};

}  // namespace llmkern
