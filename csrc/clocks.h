// The two clocks: the time of day, which records carry, and the one that nobody sets, by which our threads go.
#pragma once

#include <cstdint>
#include <ctime>

namespace llmkern {

inline int64_t read_clock(clockid_t clock) noexcept {
  timespec now{};
  clock_gettime(clock, &now);
  return now.tv_sec * 1'000'000'000ll + now.tv_nsec;
}

inline int64_t wall_now_ns() noexcept {
  return read_clock(CLOCK_REALTIME);
}

inline int64_t steady_now_ns() noexcept {
  return read_clock(CLOCK_MONOTONIC);
}

// A moment of steady_now_ns() as the time of day.
inline int64_t wall_ns(int64_t moment) noexcept {
  return wall_now_ns() - (steady_now_ns() - moment);
}

}  // namespace llmkern
