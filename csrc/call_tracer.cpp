#include "call_tracer.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "clocks.h"

namespace llmkern {
namespace {

constexpr CUpti_CallbackId kMostCallbackIds = 2000;

// What a thread is inside of; a driver call within a runtime call is the same call seen twice.
struct Nesting {
  int64_t recording = -1;
  int depth = 0;
};
thread_local Nesting nesting;

std::atomic<int64_t> recordings{0}, tracers{0};

size_t index_of(CUpti_CallbackDomain domain) {
  return domain == CUPTI_CB_DOMAIN_DRIVER_API ? 0 : 1;
}

// Whether a host call is one that launches, copies, synchronises or allocates.
bool is_traced_call(const std::string& call) {
  static const char* const prefixes[] = {"cudaLaunch",
                                         "cudaGraphLaunch",
                                         "cudaStreamSynchronize",
                                         "cudaDeviceSynchronize",
                                         "cudaEventSynchronize",
                                         "cudaStreamWaitEvent",
                                         "cudaMemcpy",
                                         "cudaMemset",
                                         "cudaMalloc",
                                         "cudaFree",
                                         "cuLaunch",
                                         "cuGraphLaunch",
                                         "cuStreamSynchronize",
                                         "cuCtxSynchronize",
                                         "cuEventSynchronize",
                                         "cuStreamWaitEvent",
                                         "cuMemcpy",
                                         "cuMemset",
                                         "cuMemAlloc",
                                         "cuMemFree"};
  // Code compiled by nvcc 13 launches through __cudaLaunchKernel.
  const std::string name = call.substr(std::min(call.find_first_not_of('_'), call.size()));
  return std::any_of(std::begin(prefixes), std::end(prefixes),
                     [&](const char* prefix) { return name.compare(0, std::strlen(prefix), prefix) == 0; });
}

}  // namespace

CallTracer::CallTracer(const CuptiApi& api, NamePool& names) : api_(api), names_(names), number_(++tracers) {}

// Call ids and their versions differ between CUDA versions; their names do not, so the library is asked for them.
void CallTracer::name_calls() {
  for (const auto domain : {CUPTI_CB_DOMAIN_DRIVER_API, CUPTI_CB_DOMAIN_RUNTIME_API}) {
    auto& ids = api_names_[index_of(domain)];
    ids.assign(kMostCallbackIds, -1);
    for (CUpti_CallbackId id = 1; id < kMostCallbackIds; ++id) {
      const std::string name = api_.callback_name(domain, id);
      if (!name.empty() && is_traced_call(name)) ids[id] = names_.intern(name);
    }
  }
}

void CallTracer::enable(CUpti_SubscriberHandle subscriber) {
  subscriber_ = subscriber;
  // A call of the recording before may still be on its way out and look its name up.
  if (api_names_[0].empty()) name_calls();
  recording_ = ++recordings;
  for (const auto domain : {CUPTI_CB_DOMAIN_DRIVER_API, CUPTI_CB_DOMAIN_RUNTIME_API}) {
    const auto& ids = api_names_[index_of(domain)];
    for (CUpti_CallbackId id = 1; id < ids.size(); ++id) {
      if (ids[id] < 0) continue;
      api_.check(api_.enable_callback(1, subscriber, domain, id), "trace host calls");
      enabled_.emplace_back(domain, id);
    }
  }
}

void CallTracer::disable() noexcept {
  for (const auto& [domain, id] : enabled_) api_.enable_callback(0, subscriber_, domain, id);
  enabled_.clear();
}

void CallTracer::on_call(CUpti_CallbackDomain domain, CUpti_CallbackId id, const void* data) noexcept {
  if (domain != CUPTI_CB_DOMAIN_DRIVER_API && domain != CUPTI_CB_DOMAIN_RUNTIME_API) return;
  const auto& call = *static_cast<const CUpti_CallbackData*>(data);
  if (call.callbackSite == CUPTI_API_ENTER) {
    begin(call);
    return;
  }
  try {
    end(domain, id, call);
  } catch (...) {
    ++lost_;
  }
}

void CallTracer::begin(const CUpti_CallbackData& data) noexcept {
  // A recording may have begun or ended while this thread was inside a call: count from zero in each.
  if (nesting.recording != recording_) nesting = {recording_, 0};
  if (nesting.depth++ == 0) *data.correlationData = static_cast<uint64_t>(wall_now_ns());
}

void CallTracer::end(CUpti_CallbackDomain domain, CUpti_CallbackId id, const CUpti_CallbackData& data) {
  if (nesting.recording != recording_ || nesting.depth == 0) return;
  if (--nesting.depth > 0) {
    ++nested_;
    return;
  }
  const int64_t end_ns = wall_now_ns();
  const auto& ids = api_names_[index_of(domain)];
  ThreadCalls& own = of_this_thread();
  std::lock_guard<std::mutex> lock(own.mutex);
  own.calls.push_back(
      {static_cast<int64_t>(*data.correlationData), end_ns, data.correlationId, id < ids.size() ? ids[id] : -1});
}

CallTracer::ThreadCalls& CallTracer::of_this_thread() {
  thread_local std::shared_ptr<ThreadCalls> own;
  // By number: another tracer may come to lie where this one was.
  thread_local int64_t owner = 0;
  if (owner != number_) {
    own = std::make_shared<ThreadCalls>();
    own->thread = syscall(SYS_gettid);
    owner = number_;
    std::lock_guard<std::mutex> lock(threads_mutex_);
    threads_.push_back(own);
  }
  return *own;
}

void CallTracer::drain(LaunchColumns& c) {
  const auto process = static_cast<int32_t>(getpid());
  std::lock_guard<std::mutex> lock(threads_mutex_);
  for (const auto& thread : threads_) {
    std::vector<Call> calls;
    {
      std::lock_guard<std::mutex> own(thread->mutex);
      std::swap(calls, thread->calls);
    }
    for (const Call& call : calls) {
      c.start_ns.push_back(call.start_ns);
      c.end_ns.push_back(call.end_ns);
      c.process.push_back(process);
      c.thread.push_back(thread->thread);
      c.correlation_id.push_back(call.correlation_id);
      c.api.push_back(call.api);
    }
    traced_ += static_cast<int64_t>(calls.size());
  }
  // A thread that has ended holds its list no more.
  threads_.erase(std::remove_if(threads_.begin(), threads_.end(),
                                [](const auto& t) { return t.use_count() == 1 && t->calls.empty(); }),
                 threads_.end());
}

}  // namespace llmkern
