// Records host calls (launches, copies, synchronisations, allocations) through CUPTI's callbacks, call by call.
//
// Activity records could hold them too, but their per-call enabling records nothing once a CUDA context exists (seen
// with CUPTI 13.0 on an H100), and the whole API holds many small queries that nobody asks for.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "columns.h"
#include "cupti_api.h"

namespace llmkern {

class CallTracer {
 public:
  CallTracer(const CuptiApi& api, NamePool& names);

  // What CUPTI's callback has to be handed on to.
  void on_call(CUpti_CallbackDomain domain, CUpti_CallbackId id, const void* data) noexcept;

  void enable(CUpti_SubscriberHandle subscriber);
  void disable() noexcept;
  void drain(LaunchColumns& columns);
  int64_t traced() const { return traced_; }
  int64_t lost() const { return lost_; }
  // Driver calls that were seen inside a call that is traced itself.
  int64_t nested() const { return nested_; }

 private:
  struct Call {
    int64_t start_ns, end_ns;
    uint32_t correlation_id;
    int32_t api;
  };
  // Calls of one thread; the lock is contended only while they are drained.
  struct ThreadCalls {
    std::mutex mutex;
    std::vector<Call> calls;
    int64_t thread = 0;
  };

  void begin(const CUpti_CallbackData& data) noexcept;
  void end(CUpti_CallbackDomain domain, CUpti_CallbackId id, const CUpti_CallbackData& data);
  ThreadCalls& of_this_thread();
  void name_calls();

  const CuptiApi& api_;
  NamePool& names_;
  CUpti_SubscriberHandle subscriber_ = nullptr;
  std::vector<std::pair<CUpti_CallbackDomain, CUpti_CallbackId>> enabled_;
  // By call id; filled before the first call is traced and never changed afterwards.
  std::vector<int32_t> api_names_[2];
  const int64_t number_;
  std::atomic<int64_t> recording_{0}, traced_{0}, lost_{0}, nested_{0};
  std::mutex threads_mutex_;
  std::vector<std::shared_ptr<ThreadCalls>> threads_;
};

}  // namespace llmkern
