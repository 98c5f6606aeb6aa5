"""The idle floor, from the windows in which nothing ran."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.attribute.energy.counter import EnergyCurve
from llmkern.estimate import DRAWS, Estimate

# Leakage follows temperature: 0.7-0.8 W/°C measured on an H100. It is what is assumed, with this doubt (one sigma),
# until the floor windows of this board span enough degrees to say better.
SLOPE_W_PER_C = 0.75
SLOPE_SIGMA = 0.25
# After the last kernel the regulators and the sensor need a moment to come to rest.
SETTLE_S = 0.3
# Shorter a rest is no sample: two ticks of 100 ms frame it.
SHORTEST_S = 0.35
# By how much the mean powers of rests scatter about a line (one sigma) where a few of them cannot tell, as if so many
# had: an H100 after work of one kind rests at other powers than after another, at the same degree.
REST_SIGMA_W, REST_FREEDOM = 0.6, 6
# Temperatures come in whole degrees: through fewer of them than this goes no line.
LEAST_SPREAD_C = 3.0


@dataclass(frozen=True)
class FloorDoubt:
    """One sigma of the floor in W where it is known best (Student's t of *freedom*), and of its slope in W/°C."""

    level_w: float = 0.0
    slope_w_per_c: float = 0.0
    freedom: int = 1000

    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """Return errors of level (W) and slope (W/°C), DRAWS each, the same whenever they are asked for."""
        random = np.random.default_rng(1)
        return random.standard_t(self.freedom, DRAWS) * self.level_w, random.normal(0, 1, DRAWS) * self.slope_w_per_c


@dataclass(frozen=True)
class Floor:
    """Active-idle power of this board with its context alive, as a line over temperature.

    *reference_w* holds at *reference_c* to *level_sigma_w* (one sigma, *samples* - 1 degrees of freedom); without
    temperatures it is one mean and *reference_c* is None.
    """

    reference_w: float
    reference_c: float | None
    level_sigma_w: float
    slope_w_per_c: float
    slope_sigma: float
    samples: int
    lowest_c: float | None
    highest_c: float | None

    @property
    def slope_is_measured(self) -> bool:
        """Whether the slope rests on this board more than on what is assumed of any."""
        return self.slope_sigma < SLOPE_SIGMA / 2

    @property
    def doubt(self) -> FloorDoubt:
        return FloorDoubt(self.level_sigma_w, self.slope_sigma, REST_FREEDOM + self.samples - 1)

    def degrees(self, temperature_c: float | None) -> float:
        """Return by how many °C *temperature_c* is above the reference, 0 where either is not known."""
        return 0.0 if temperature_c is None or self.reference_c is None else temperature_c - self.reference_c

    def at(self, temperature_c: float | None) -> Estimate:
        """Return the floor in W at *temperature_c* with its 95 % interval: of the mean, and of the slope beyond it."""
        distance = self.degrees(temperature_c)
        watts = self.reference_w + self.slope_w_per_c * distance
        level, slope = self.doubt.draws()
        return Estimate.of(watts, watts + level + slope * distance, self.samples)


def measure_floor(curve: EnergyCurve, idle: pd.DataFrame, temperature: pd.DataFrame) -> Floor | None:
    """Fit the floor to the ticks inside the *idle* ranges (start_ns, end_ns), each of which is one sample.

    *temperature* has timestamp_ns and temperature_c. None when no idle range holds two ticks.
    """
    watts, degrees = [], []
    for start_ns, end_ns in idle[["start_ns", "end_ns"]].itertuples(index=False):
        inside = (curve.tick_ns >= start_ns + SETTLE_S * 1e9) & (curve.tick_ns <= end_ns)
        ns, joule = curve.tick_ns[inside], curve.tick_j[inside]
        # The time of one tick is known to a few ms only.
        if len(ns) < 2 or ns[-1] - ns[0] < SHORTEST_S * 1e9:
            continue
        watts.append((joule[-1] - joule[0]) / ((ns[-1] - ns[0]) / 1e9))
        degrees.append(_temperature(temperature, (ns[0] + ns[-1]) / 2))
    if not watts:
        return None
    power = np.asarray(watts)
    count = len(power)
    if any(d is None for d in degrees):
        sigma_w = _scatter(power - power.mean(), 1)
        return Floor(float(power.mean()), None, sigma_w / math.sqrt(count), 0.0, 0.0, count, None, None)
    celsius = np.asarray(degrees, float)
    distance = celsius - celsius.mean()
    spread_c2 = float((distance**2).sum())
    if celsius.max() - celsius.min() < LEAST_SPREAD_C:
        spread_c2, distance = 0.0, np.zeros(count)
    slope, sigma_w = SLOPE_W_PER_C, _scatter(power - power.mean(), 1)
    # The mean of what is assumed and what is measured, by their precisions; twice, because the scatter about the line
    # is known only once there is one.
    for _ in range(2):
        assumed, measured = 1 / SLOPE_SIGMA**2, spread_c2 / sigma_w**2
        along = float((distance * power).sum()) / sigma_w**2
        slope = (along + assumed * SLOPE_W_PER_C) / (assumed + measured)
        residual = power - power.mean() - slope * distance
        sigma_w = _scatter(residual, 2 if spread_c2 else 1)
    return Floor(
        float(power.mean()),
        float(celsius.mean()),
        sigma_w / math.sqrt(count),
        slope,
        1 / math.sqrt(assumed + spread_c2 / sigma_w**2),
        count,
        float(celsius.min()),
        float(celsius.max()),
    )


def _scatter(residual: np.ndarray, fitted: int) -> float:
    """Return one sigma of rests in W from their *residual* about what *fitted* numbers say and what is known before."""
    freedom = REST_FREEDOM + max(0, len(residual) - fitted)
    return math.sqrt((REST_FREEDOM * REST_SIGMA_W**2 + float((residual**2).sum())) / freedom)


def _temperature(readings: pd.DataFrame, time_ns: float) -> float | None:
    if readings.empty:
        return None
    return float(np.interp(time_ns, readings["timestamp_ns"], readings["temperature_c"]))


def mean_temperature(readings: pd.DataFrame, spans: pd.DataFrame) -> float | None:
    """Return the mean of the temperature *readings* inside *spans* (start_ns, end_ns), None without any."""
    return mean_reading(readings, spans, "temperature_c")


def mean_reading(readings: pd.DataFrame, spans: pd.DataFrame, column: str) -> float | None:
    """Return the mean of *column* of the *readings* inside *spans* (start_ns, end_ns), None without any."""
    readings = readings[readings[column].notna()]
    if readings.empty or spans.empty:
        return None
    times = readings["timestamp_ns"].to_numpy()
    inside = np.zeros(len(times), bool)
    for start_ns, end_ns in spans[["start_ns", "end_ns"]].itertuples(index=False):
        inside |= (times >= start_ns) & (times <= end_ns)
    return float(readings[column].to_numpy(float)[inside].mean()) if inside.any() else None
