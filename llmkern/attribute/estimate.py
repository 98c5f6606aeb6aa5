"""A number with its doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; *low* and *high* are None where one sample allows none."""

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
    """Return the mean of independent *values* with the two-sided 95 % interval of Student's t."""
    data = np.asarray(values, float)
    mean = float(data.mean())
    if len(data) < 2:
        return Estimate(mean)
    half = float(stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data)))
    return Estimate(mean, mean - half, mean + half, len(data))


def ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return mean(a) / mean(b) of independent samples with Fieller's 95 % interval (E. C. Fieller, 1954).

    The interval is None where *b* does not differ from zero.
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    value = float(x.mean() / y.mean())
    if len(x) < 2 or len(y) < 2:
        return Estimate(value)
    var_x, var_y = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    t = float(stats.t.ppf(0.975, len(x) + len(y) - 2))
    g = t**2 * var_y / y.mean() ** 2
    if g >= 1:
        return Estimate(value, samples=min(len(x), len(y)))
    half = t / abs(y.mean()) * math.sqrt(var_x + value**2 * var_y - g * var_x)
    return Estimate(value, (value - half) / (1 - g), (value + half) / (1 - g), min(len(x), len(y)))


def combine(value: float, *half_widths: float | None) -> Estimate:
    """Return *value* with independent half-widths added in quadrature; None among them leaves no interval."""
    if any(h is None for h in half_widths):
        return Estimate(value)
    half = math.sqrt(sum(h * h for h in half_widths if h is not None))
    return Estimate(value, value - half, value + half)
