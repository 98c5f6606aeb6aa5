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
# Half-second means of an idle board are not closer to a line than this, however well a few of them agree.
LEAST_SIGMA_W = 0.2
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
        return FloorDoubt(self.level_sigma_w, self.slope_sigma, max(1, self.samples - 1))

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
    """Fit the floor to the ticks inside the *idle* ranges (start_ns, end_ns).

    *temperature* has timestamp_ns and temperature_c. None when no idle range holds two ticks.
    """
    watts, degrees = [], []
    for start_ns, end_ns in idle[["start_ns", "end_ns"]].itertuples(index=False):
        inside = (curve.tick_ns >= start_ns + SETTLE_S * 1e9) & (curve.tick_ns <= end_ns)
        ns, joule = curve.tick_ns[inside], curve.tick_j[inside]
        # Pairs about half a second apart: the time of one tick is known to a few ms only.
        step = max(1, round(0.5e9 / np.median(np.diff(ns)))) if len(ns) > 1 else 1
        for i in range(0, len(ns) - step, step):
            watts.append((joule[i + step] - joule[i]) / ((ns[i + step] - ns[i]) / 1e9))
            middle_ns = (ns[i] + ns[i + step]) / 2
            degrees.append(_temperature(temperature, middle_ns))
    if not watts:
        return None
    power = np.asarray(watts)
    count = len(power)
    if any(d is None for d in degrees):
        sigma_w = max(_spread(power), LEAST_SIGMA_W)
        return Floor(float(power.mean()), None, sigma_w / math.sqrt(count), 0.0, 0.0, count, None, None)
    celsius = np.asarray(degrees, float)
    distance = celsius - celsius.mean()
    spread_c2 = float((distance**2).sum())
    if celsius.max() - celsius.min() < LEAST_SPREAD_C:
        spread_c2, distance = 0.0, np.zeros(count)
    slope, sigma_w = SLOPE_W_PER_C, max(_spread(power), LEAST_SIGMA_W)
    # The mean of what is assumed and what is measured, by their precisions; twice, because the scatter about the line
    # is known only once there is one.
    for _ in range(2):
        assumed, measured = 1 / SLOPE_SIGMA**2, spread_c2 / sigma_w**2
        along = float((distance * power).sum()) / sigma_w**2
        slope = (along + assumed * SLOPE_W_PER_C) / (assumed + measured)
        residual = power - power.mean() - slope * distance
        sigma_w = max(math.sqrt(float((residual**2).sum()) / max(1, count - 2)), LEAST_SIGMA_W)
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


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _temperature(readings: pd.DataFrame, time_ns: float) -> float | None:
    if readings.empty:
        return None
    return float(np.interp(time_ns, readings["timestamp_ns"], readings["temperature_c"]))


def mean_temperature(readings: pd.DataFrame, spans: pd.DataFrame) -> float | None:
    """Return the mean of the temperature *readings* inside *spans* (start_ns, end_ns), None without any."""
    if readings.empty or spans.empty:
        return None
    times = readings["timestamp_ns"].to_numpy()
    inside = np.zeros(len(times), bool)
    for start_ns, end_ns in spans[["start_ns", "end_ns"]].itertuples(index=False):
        inside |= (times >= start_ns) & (times <= end_ns)
    return float(readings["temperature_c"].to_numpy()[inside].mean()) if inside.any() else None
