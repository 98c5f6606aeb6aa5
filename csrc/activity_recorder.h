// Records the activity of this process through CUPTI: buffers in, columns out.
//
// CUPTI's callbacks carry no pointer of ours and may come from any thread, also after a recorder was stopped. They
// enter through the one recorder that is active; closing it waits until the last of them has left, and a buffer that
// comes later is freed. So a recorder can be destroyed and leaves nothing behind.
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
  // Stops, ends the decoding thread and gives all memory back; it cannot be started again.
  void close();
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

  static void CUPTIAPI on_call(void* unused, CUpti_CallbackDomain domain, CUpti_CallbackId id,
                               const void* data) noexcept;
  static void CUPTIAPI on_buffer_requested(uint8_t** buffer, size_t* size, size_t* max_records) noexcept;
  static void CUPTIAPI on_buffer_completed(CUcontext context, uint32_t stream, uint8_t* buffer, size_t size,
                                           size_t valid) noexcept;

  void activate();
  void stop_locked();
  void free_pool();
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
  // Taken by whoever starts, stops or closes; never by a callback.
  std::mutex control_mutex_;
  std::atomic<bool> running_{false};
  bool closed_ = false;
  std::atomic<size_t> buffer_bytes_{1 << 20};

  mutable std::mutex pool_mutex_;
  std::vector<std::pair<uint8_t*, size_t>> pool_;  // zeroed, with their capacities
  std::atomic<int64_t> allocated_{0}, in_flight_{0}, failed_allocations_{0}, failed_decodes_{0}, dropped_{0};

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
