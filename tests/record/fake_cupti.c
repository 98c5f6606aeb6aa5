/* A stand-in for libcupti.so: one subscriber, buffers and callbacks as the real one has them, and two ways to make
   something happen: fake_emit() puts records into buffers, fake_call() plays a host call.
   FAKE_TAKEN (another subscriber is there), FAKE_DENIED (no permission to record kernels), FAKE_DROPPED (records dropped
   with each buffer), FAKE_VERSION. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef void (*callback_t)(void *, int, uint32_t, const void *);
typedef void (*request_t)(uint8_t **, size_t *, size_t *);
typedef void (*complete_t)(void *, uint32_t, uint8_t *, size_t, size_t);
typedef struct {
  int site;
  const char *function;
  const void *params;
  void *result;
  const char *symbol;
  void *context;
  uint32_t context_uid;
  uint64_t *data;
  uint32_t correlation;
} call_t;

static callback_t callback;
static void *callback_user;
static request_t request;
static complete_t complete;
static uint8_t *buffer;
static size_t buffer_size, buffer_used, record_size = 8;
static unsigned char enabled[3][16];
static int kinds;

static int set(const char *name) { return getenv(name) != NULL; }
static const char *const names[3][5] = {
    {0},
    {0, "cuLaunchKernel", "cuCtxGetCurrent", "cuMemAlloc_v2", 0},
    {0, "cudaLaunchKernel_v7000", "cudaGetDevice_v3020", "__cudaLaunchKernel_v13000", "cudaMemcpyAsync_v3020"},
};

int cuptiGetVersion(uint32_t *v) { *v = set("FAKE_VERSION") ? (uint32_t)atoi(getenv("FAKE_VERSION")) : 130001; return 0; }
int cuptiGetResultString(int r, const char **s) {
  *s = r == 39 ? "CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED" : r == 35 ? "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" : "OTHER";
  return 0;
}
int cuptiGetErrorMessage(int r, const char **s) { return cuptiGetResultString(r, s); }
int cuptiGetTimestamp(uint64_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  *t = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
  return 0;
}
int cuptiSubscribe(void **s, callback_t f, void *user) {
  if (set("FAKE_TAKEN") || callback) return 39;
  callback = f, callback_user = user, *s = &callback;
  return 0;
}
int cuptiUnsubscribe(void *s) { (void)s; callback = NULL; return 0; }
int cuptiEnableCallback(uint32_t on, void *s, int domain, uint32_t id) { (void)s; enabled[domain][id] = on != 0; return 0; }
int cuptiGetCallbackName(int domain, uint32_t id, const char **name) {
  if (id > 4 || !names[domain][id]) return 1;
  *name = names[domain][id];
  return 0;
}
int cuptiActivityEnable(int kind) { if (set("FAKE_DENIED") && kind == 10) return 35; ++kinds; return 0; }
int cuptiActivityDisable(int kind) { (void)kind; --kinds; return 0; }
int cuptiActivityRegisterCallbacks(request_t r, complete_t c) { request = r, complete = c; return 0; }
int cuptiActivitySetAttribute(int a, size_t *n, void *v) { (void)a, (void)n, (void)v; return 0; }
int cuptiSetThreadIdType(int t) { (void)t; return 0; }
int cuptiActivityGetNumDroppedRecords(void *c, uint32_t s, size_t *n) {
  (void)c, (void)s;
  *n = set("FAKE_DROPPED") ? (size_t)atoi(getenv("FAKE_DROPPED")) : 0;
  return 0;
}
int cuptiActivityGetNextRecord(uint8_t *b, size_t valid, uint8_t **record) {
  uint8_t *next = *record ? *record + record_size : b;
  if (next + record_size > b + valid) return 12;
  *record = next;
  return 0;
}
static void hand_over(void) {
  if (!buffer) return;
  uint8_t *full = buffer;
  buffer = NULL;
  complete(NULL, 0, full, buffer_size, buffer_used);
}
int cuptiActivityFlushAll(uint32_t forced) { if (forced) hand_over(); return 0; }

/* How many kinds and callbacks are enabled: none may be left behind. */
int fake_enabled(void) {
  int count = kinds;
  for (int d = 0; d < 3; ++d)
    for (int i = 0; i < 16; ++i) count += enabled[d][i];
  return count;
}
int fake_subscribed(void) { return callback != NULL; }
/* Returns 0 where no buffer could be had. */
int fake_emit(const uint8_t *records, size_t count, size_t size) {
  record_size = size;
  for (size_t i = 0; i < count; ++i) {
    if (!buffer) {
      size_t most = 0;
      request(&buffer, &buffer_size, &most);
      buffer_used = 0;
      if (!buffer) return 0;
      for (size_t k = 0; k < buffer_size; ++k)
        if (buffer[k]) return -1; /* it was promised to be zero */
    }
    memcpy(buffer + buffer_used, records + i * size, size);
    buffer_used += size;
    if (buffer_used + size > buffer_size) hand_over();
  }
  return 1;
}
static void site(int which, int domain, uint32_t id, uint32_t correlation, uint64_t *data) {
  call_t call = {0};
  call.site = which, call.function = names[domain][id], call.correlation = correlation, call.data = data;
  if (callback && enabled[domain][id]) callback(callback_user, domain, id, &call);
}
/* Plays a call, with a driver call inside it where *inner* is not 0. */
void fake_call(int domain, uint32_t id, uint32_t correlation, uint32_t inner) {
  uint64_t outer_data = 0, inner_data = 0;
  site(0, domain, id, correlation, &outer_data);
  if (inner) {
    site(0, 1, inner, correlation + 1000, &inner_data);
    site(1, 1, inner, correlation + 1000, &inner_data);
  }
  site(1, domain, id, correlation, &outer_data);
}
/* Plays one end of a call: *which* is 0 for its entry, 1 for its exit. */
void fake_half_call(int domain, uint32_t id, uint32_t correlation, int which) {
  uint64_t data = 0;
  site(which, domain, id, correlation, &data);
}
