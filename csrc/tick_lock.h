// Learns the period of a counter that ticks, from the times between the ticks that were seen. Pure: needs no sensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

namespace llmkern {

// Until the period is known every tick is looked for, and one that was missed (the reading thread was held up) shows as
// an interval of two: so the period is the shortest interval that comes again, and not the middle one.
class TickLock {
 public:
  explicit TickLock(int64_t hint_ns) : period_ns_(hint_ns) {}

  bool locked() const { return locked_; }
  int64_t period_ns() const { return period_ns_; }

  void reset() {
    locked_ = false;
    intervals_ns_.clear();
  }

  // Takes in the time between two ticks that were seen; once locked, ticks may have been left out between them.
  void learn(int64_t passed_ns) {
    // A tick where none was expected: what was taken for the period is more than one.
    if (locked_ && passed_ns < period_ns_ * 3 / 4) reset();
    const int64_t periods = locked_ ? std::max<int64_t>(1, (passed_ns + period_ns_ / 2) / period_ns_) : 1;
    intervals_ns_.push_back(passed_ns / periods);
    if (intervals_ns_.size() > kKept) intervals_ns_.pop_front();
    std::vector<int64_t> sorted(intervals_ns_.begin(), intervals_ns_.end());
    std::sort(sorted.begin(), sorted.end());
    for (auto shortest = sorted.begin(); shortest != sorted.end(); ++shortest) {
      const auto longest = static_cast<int64_t>(static_cast<double>(*shortest) * kSame);
      const auto alike = std::upper_bound(shortest, sorted.end(), longest) - shortest;
      if (alike < kToLock) continue;
      period_ns_ = *(shortest + alike / 2);
      locked_ = true;
      return;
    }
  }

 private:
  static constexpr size_t kKept = 15;
  // Intervals this close to each other are one; a longer one has a missed tick in it.
  static constexpr double kSame = 1.2;
  static constexpr int kToLock = 3;

  int64_t period_ns_;
  std::deque<int64_t> intervals_ns_;
  bool locked_ = false;
};

}  // namespace llmkern
