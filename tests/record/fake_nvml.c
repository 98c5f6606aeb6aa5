/* A stand-in for libnvidia-ml.so.1 with a known sensor. Behaviour comes from environment variables:
   FAKE_POWER_W (250), FAKE_TICK_MS (100), FAKE_COST_US (0, of a counter call), FAKE_MIG, FAKE_DENY (permission error on
   the counter), FAKE_NO_COUNTER, FAKE_NO_SAMPLES, FAKE_NO_MEMORY_SCOPE, FAKE_NO_THROTTLE, FAKE_BREAK_AFTER (calls). */
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef union { double d; unsigned int ui; unsigned long ul; unsigned long long ull; } value_t;
typedef struct { unsigned long long us; value_t value; } sample_t;
typedef struct { unsigned id, scope; long long us, latency; int type, result; value_t value; } field_t;
enum { OK = 0, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, LOST = 15 };

static double number(const char *name, double otherwise) {
  const char *text = getenv(name);
  return text ? atof(text) : otherwise;
}
static int set(const char *name) { return getenv(name) != NULL; }
static long long now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}
static int devices[2];
static long long counter_calls;

int nvmlInit_v2(void) { return set("FAKE_INIT_DENIED") ? NO_PERMISSION : OK; }
const char *nvmlErrorString(int e) { return e == LOST ? "GPU is lost" : "some error"; }
int nvmlSystemGetDriverVersion(char *v, unsigned n) { strncpy(v, "580.0.fake", n); return OK; }
int nvmlSystemGetNVMLVersion(char *v, unsigned n) { strncpy(v, "13.fake", n); return OK; }
int nvmlSystemGetCudaDriverVersion(int *v) { *v = 13000; return OK; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) {
  if (i > 1) return NOT_FOUND;
  *d = &devices[i];
  return OK;
}
int nvmlDeviceGetHandleByUUID(const char *u, void **d) {
  if (!strcmp(u, "GPU-fake-0")) { *d = &devices[0]; return OK; }
  if (!strcmp(u, "GPU-fake-1")) { *d = &devices[1]; return OK; }
  return NOT_FOUND;
}
static int index_of(void *d) { return (int *)d == &devices[1]; }
int nvmlDeviceGetIndex(void *d, unsigned *i) { *i = index_of(d); return OK; }
int nvmlDeviceGetName(void *d, char *v, unsigned n) { (void)d; strncpy(v, "Fake GPU", n); return OK; }
int nvmlDeviceGetUUID(void *d, char *v, unsigned n) { strncpy(v, index_of(d) ? "GPU-fake-1" : "GPU-fake-0", n); return OK; }
int nvmlDeviceGetTotalEnergyConsumption(void *d, unsigned long long *mj) {
  if (set("FAKE_DENY")) return NO_PERMISSION;
  if (set("FAKE_NO_COUNTER")) return NOT_SUPPORTED;
  ++counter_calls;
  if (set("FAKE_BREAK_AFTER") && counter_calls > (long long)number("FAKE_BREAK_AFTER", 0)) return LOST;
  long long cost_ns = (long long)(number("FAKE_COST_US", 0) * 1e3);
  /* One call that takes long, as when the thread is held up: FAKE_HOLD is its number, 60 ms. */
  if (set("FAKE_HOLD") && counter_calls == (long long)number("FAKE_HOLD", 0)) {
    struct timespec held = {0, 60000000};
    nanosleep(&held, NULL);
  }
  struct timespec rest = {0, cost_ns / 2};
  if (cost_ns) nanosleep(&rest, NULL);
  long long tick_ns = (long long)(number("FAKE_TICK_MS", 100) * 1e6);
  long long at = now_ns() / tick_ns * tick_ns;
  /* Watts x nanoseconds since an arbitrary day, in mJ; device 1 draws twice the power. */
  double since_s = (at - 1700000000LL * 1000000000LL) / 1e9;
  *mj = (unsigned long long)(since_s * number("FAKE_POWER_W", 250) * (1 + index_of(d)) * 1e3);
  if (cost_ns) nanosleep(&rest, NULL);
  return OK;
}
int nvmlDeviceGetSamples(void *d, int kind, unsigned long long last_us, int *type, unsigned *count, sample_t *out) {
  (void)kind;
  if (set("FAKE_NO_SAMPLES")) return NOT_SUPPORTED;
  *type = 1;
  if (out == NULL) { *count = 119; return OK; }
  long long newest = now_ns() / 1000 / 20000, n = 0;
  for (long long k = newest - 118; k <= newest && n < *count; ++k) {
    if ((unsigned long long)k * 20000 <= last_us) continue;
    out[n].us = (unsigned long long)k * 20000;
    out[n].value.ui = (unsigned)(number("FAKE_POWER_W", 250) * 1000) * (1 + index_of(d));
    ++n;
  }
  *count = (unsigned)n;
  return n ? OK : NOT_FOUND;
}
int nvmlDeviceGetFieldValues(void *d, int n, field_t *f) {
  for (int i = 0; i < n; ++i) {
    f[i].result = f[i].scope == 2 && set("FAKE_NO_MEMORY_SCOPE") ? NOT_SUPPORTED : OK;
    f[i].type = 1;
    f[i].value.ui = (unsigned)(number("FAKE_POWER_W", 250) * 1000 * (f[i].scope == 2 ? 0.2 : 1)) * (1 + index_of(d));
  }
  return OK;
}
int nvmlDeviceGetClockInfo(void *d, int t, unsigned *v) { (void)d, (void)t; *v = 1980; return OK; }
int nvmlDeviceGetMaxClockInfo(void *d, int t, unsigned *v) { (void)d, (void)t; *v = 1980; return OK; }
int nvmlDeviceGetTemperature(void *d, int t, unsigned *v) { (void)d, (void)t; *v = 41; return OK; }
int nvmlDeviceGetCurrentClocksEventReasons(void *d, unsigned long long *v) {
  (void)d;
  *v = 4;
  return set("FAKE_NO_THROTTLE") ? NOT_SUPPORTED : OK;
}
int nvmlDeviceGetMigMode(void *d, unsigned *now, unsigned *later) { (void)d; *now = *later = set("FAKE_MIG"); return OK; }
int nvmlDeviceGetEnforcedPowerLimit(void *d, unsigned *v) { (void)d; *v = 700000; return OK; }
int nvmlDeviceGetPowerManagementLimitConstraints(void *d, unsigned *a, unsigned *b) { (void)d; *a = 200000; *b = 700000; return OK; }
