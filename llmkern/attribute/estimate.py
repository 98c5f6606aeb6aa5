"""A number with its doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# From here on the interval of the median needs no assumption: 2nd to 2nd last of 9 samples hold it in 96 % of cases.
LEAST_FOR_MEDIAN = 6
# Two values that happen to agree say nothing of a third.
LEAST_FOR_INTERVAL = 3


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; *low* and *high* are None where one sample allows none."""

    value: float
    low: float | None = None
    high: float | None = None
    samples: int = 1

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate times *factor* (≥ 0)."""
        return Estimate(
            self.value * factor,
            None if self.low is None else self.low * factor,
            None if self.high is None else self.high * factor,
            self.samples,
        )


def from_samples(values: Sequence[float]) -> Estimate:
    """Return the median of independent *values* with its distribution-free 95 % interval (order statistics).

    One window disturbed by the host moves neither. With fewer than six values the order says too little: then it is
    the mean with Student's t, and with fewer than three there is no interval.
    """
    data = np.sort(np.asarray(values, float))
    count = len(data)
    if count >= LEAST_FOR_MEDIAN:
        # The median lies between the k-th and the k-th last value unless fewer than k fall on one side of it.
        k = max(1, int(stats.binom.ppf(0.025, count, 0.5)))
        return Estimate(float(np.median(data)), float(data[k - 1]), float(data[count - k]), count)
    mean = float(data.mean())
    if count < LEAST_FOR_INTERVAL:
        return Estimate(mean, samples=count)
    half = float(stats.t.ppf(0.975, count - 1) * data.std(ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return the ratio of the medians of two independent samples with its bootstrap 95 % interval (10,000 draws)."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    value = float(np.median(x) / np.median(y))
    if len(x) < 2 or len(y) < 2:
        return Estimate(value)
    random = np.random.default_rng(0)
    draws = np.median(random.choice(x, (10_000, len(x))), axis=1) / np.median(
        random.choice(y, (10_000, len(y))), axis=1
    )
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high), min(len(x), len(y)))


def combine(value: float, *half_widths: float | None) -> Estimate:
    """Return *value* with independent half-widths added in quadrature; None among them leaves no interval."""
    if any(h is None for h in half_widths):
        return Estimate(value)
    half = math.sqrt(sum(h * h for h in half_widths if h is not None))
    return Estimate(value, value - half, value + half)
