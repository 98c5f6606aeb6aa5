"""A number with its doubt: draws of it, from which everything that is derived gets an interval of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

DRAWS = 400
# From here on the interval of the median needs no assumption: 2nd to 2nd last of 9 samples hold it in 96 % of cases.
LEAST_FOR_MEDIAN = 6
# Two values that happen to agree say nothing of a third.
LEAST_FOR_INTERVAL = 3
_ENDS = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; *low* and *high* are None where too few samples allow none.

    *draws* are what it may be as well, DRAWS of them: draw i of every estimate of one run is of the same possible
    world, so that errors which two numbers share cancel or add as they do.
    """

    value: float
    low: float | None = None
    high: float | None = None
    samples: int = 1
    draws: np.ndarray | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, value: float, draws: np.ndarray | None, samples: int = DRAWS) -> Estimate:
        """Return *value* with the 95 % interval of *draws*, which holds it; without draws there is no interval."""
        if draws is None:
            return cls(value, samples=samples)
        low, high = np.percentile(draws, _ENDS)
        return cls(value, float(min(low, value)), float(max(high, value)), samples, draws)

    @property
    def is_known(self) -> bool:
        """Whether there is an interval, and zero is not in it."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate times *factor* (≥ 0)."""
        return Estimate(
            self.value * factor,
            None if self.low is None else self.low * factor,
            None if self.high is None else self.high * factor,
            self.samples,
            None if self.draws is None else self.draws * factor,
        )

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Return *change* of the value and of every draw; without draws only the value is known."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(change(np.array([self.value]))[0])
            return Estimate.of(value, None if self.draws is None else change(self.draws), self.samples)

    def with_(self, other: Estimate, join: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Estimate:
        """Return *join* of this and *other*, value with value and draw with draw."""
        # A draw may be nothing, and a share of it then has no limit.
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(join(np.array([self.value]), np.array([other.value]))[0])
            both = None if self.draws is None or other.draws is None else join(self.draws, other.draws)
        return Estimate.of(value, both, min(self.samples, other.samples))

    def __add__(self, other: Estimate) -> Estimate:
        return self.with_(other, np.add)

    def __sub__(self, other: Estimate) -> Estimate:
        return self.with_(other, np.subtract)

    def __mul__(self, other: Estimate) -> Estimate:
        return self.with_(other, np.multiply)

    def within(self, whole: Estimate | None) -> Estimate:
        """Return the estimate as part of *whole*: in no draw, and not in its value, more than that."""
        if whole is None:
            return self
        if self.draws is None or whole.draws is None:
            return Estimate.of(min(self.value, whole.value), self.draws, self.samples)
        return self.with_(whole, np.minimum)

    def of_another_run(self, number: int = 1) -> Estimate:
        """Return the estimate with its draws in another order (which: *number*), for what shares no error with it."""
        if self.draws is None:
            return self
        shuffled = np.random.default_rng(1 + number).permutation(self.draws)
        return Estimate(self.value, self.low, self.high, self.samples, shuffled)


def from_samples(values: Sequence[float]) -> Estimate:
    """Return the median of independent *values* with its distribution-free 95 % interval (order statistics).

    One window disturbed by the host moves neither. Draws are quantiles of the confidence distribution of the median:
    that it lies below the k-th of n values has the probability of fewer than k heads in n tosses. With fewer than six
    values the order says too little: then it is the mean with Student's t, and with fewer than three there is no
    interval. Estimates from samples of one run go up and down together: the round in which the host was slow takes
    longer and costs more.
    """
    data = np.sort(np.asarray(values, float))
    count = len(data)
    if count >= LEAST_FOR_MEDIAN:
        below = np.cumsum([math.comb(count, heads) / 2**count for heads in range(count)])
        return Estimate.of(float(np.median(data)), np.interp(_levels(), below, data), count)
    mean = float(data.mean())
    if count < LEAST_FOR_INTERVAL:
        return Estimate(mean, samples=count)
    half = student_t(count - 1, _levels()) * float(data.std(ddof=1)) / math.sqrt(count)
    return Estimate.of(mean, mean + half, count)


def student_t(freedom: int, levels: np.ndarray) -> np.ndarray:
    """Return the quantiles *levels* (in 0 to 1) of Student's t with *freedom* degrees of freedom.

    By bisection of its distribution in closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4); SciPy, which has the
    same, takes half a second to import.
    """
    inside = np.abs(2 * np.asarray(levels, float) - 1)
    low, high = np.zeros_like(inside), np.full_like(inside, math.pi / 2)
    for _ in range(60):
        middle = (low + high) / 2
        below = _within(freedom, middle) < inside
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    found: np.ndarray = np.sign(np.asarray(levels) - 0.5) * math.sqrt(freedom) * np.tan((low + high) / 2)
    return found


def _within(freedom: int, angle: np.ndarray) -> np.ndarray:
    """Return how likely |t| is at most sqrt(freedom) tan(angle)."""
    sine, cosine = np.sin(angle), np.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else np.ones_like(angle)), np.zeros_like(angle)
    for power in range(odd, freedom - 1, 2):
        total = total + term
        term = term * cosine**2 * (power + 1) / (power + 2)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def _levels() -> np.ndarray:
    """Return the quantiles that are drawn, evenly spread, in an order that is random and always the same."""
    return np.random.default_rng(3).permutation((np.arange(DRAWS) + 0.5) / DRAWS)


def ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return the ratio of the medians of two independent samples with its bootstrap 95 % interval (10,000 draws)."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    value = float(np.median(x) / np.median(y))
    if min(len(x), len(y)) < LEAST_FOR_INTERVAL:
        return Estimate(value)
    random = np.random.default_rng(0)
    draws = np.median(random.choice(x, (10_000, len(x))), axis=1) / np.median(
        random.choice(y, (10_000, len(y))), axis=1
    )
    low, high = np.percentile(draws, _ENDS)
    return Estimate(value, float(min(low, value)), float(max(high, value)), min(len(x), len(y)))
