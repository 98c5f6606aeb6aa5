"""Energy between two moments from counter ticks, and the idle floor from the windows in which nothing ran."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from llmkern.attribute.estimate import Estimate

# Leakage follows temperature at about this rate on an H100 (measured 0.7-0.8 W/°C); used only as doubt, where the
# floor windows span too few degrees to measure the slope on this board.
DOUBT_W_PER_C = 0.75
# After the last kernel the regulators and the sensor need a moment to come to rest.
SETTLE_S = 0.3
# A line through fewer degrees would be a line through noise.
LEAST_SPREAD_C = 3.0


class EnergyCurve:
    """Cumulative energy of one sensor, exact at its ticks (ns, mJ). Moments outside the ticks give NaN."""

    def __init__(self, tick_ns: np.ndarray, tick_mj: np.ndarray) -> None:
        order = np.argsort(tick_ns, kind="stable")
        self.tick_ns = np.asarray(tick_ns, np.int64)[order]
        self.tick_j = np.asarray(tick_mj, float)[order] / 1e3

    def __len__(self) -> int:
        return len(self.tick_ns)

    def at(self, time_ns: np.ndarray | float) -> np.ndarray:
        """Return the counter in J at *time_ns*, NaN outside the ticks."""
        return np.interp(np.asarray(time_ns), self.tick_ns, self.tick_j, left=np.nan, right=np.nan)

    def window(self, start_ns: int, end_ns: int) -> tuple[int, int, float] | None:
        """Return the ticks that frame a window and the J between them: (tick before, tick after, energy).

        The tick after is one that came at least a full period after the end, if there is one, so that the sensor has
        seen all of the window. None when the ticks do not frame it.
        """
        before = int(np.searchsorted(self.tick_ns, start_ns, side="right")) - 1
        after = int(np.searchsorted(self.tick_ns, end_ns, side="left"))
        if before < 0 or after >= len(self.tick_ns):
            return None
        period_ns = float(np.median(np.diff(self.tick_ns))) if len(self.tick_ns) > 1 else 0.0
        if after + 1 < len(self.tick_ns) and self.tick_ns[after] < end_ns + period_ns:
            after += 1
        return int(self.tick_ns[before]), int(self.tick_ns[after]), float(self.tick_j[after] - self.tick_j[before])


@dataclass(frozen=True)
class Floor:
    """Active-idle power of this board with its context alive, as a line over temperature.

    *reference_w* holds at *reference_c*; without temperatures the slope is None and the power one mean.
    """

    reference_w: float
    reference_c: float | None
    slope_w_per_c: float | None
    residual_w: float
    samples: int
    spread_c2: float
    lowest_c: float | None
    highest_c: float | None

    def at(self, temperature_c: float | None) -> Estimate:
        """Return the floor in W at *temperature_c* with its 95 % interval.

        The interval is that of a regression line's mean; away from the reference without a measured slope it grows
        by DOUBT_W_PER_C per degree.
        """
        t = float(stats.t.ppf(0.975, max(1, self.samples - 2)))
        half = t * self.residual_w / math.sqrt(max(1, self.samples))
        watts = self.reference_w
        if temperature_c is not None and self.reference_c is not None:
            distance = temperature_c - self.reference_c
            if self.slope_w_per_c is not None:
                watts += self.slope_w_per_c * distance
                half = math.hypot(half, t * self.residual_w * abs(distance) / math.sqrt(self.spread_c2))
            else:
                half = math.hypot(half, DOUBT_W_PER_C * abs(distance))
        return Estimate(watts, watts - half, watts + half, self.samples)


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
    if any(d is None for d in degrees):
        return Floor(float(power.mean()), None, None, _spread(power), len(power), 0.0, None, None)
    celsius = np.asarray(degrees, float)
    mean_c, spread_c2 = float(celsius.mean()), float(((celsius - celsius.mean()) ** 2).sum())
    lowest, highest = float(celsius.min()), float(celsius.max())
    if highest - lowest >= LEAST_SPREAD_C and len(power) >= 5:
        slope, _ = np.polyfit(celsius - mean_c, power, 1)
        residual = power - power.mean() - slope * (celsius - mean_c)
        deviation = float(math.sqrt((residual**2).sum() / (len(power) - 2)))
        return Floor(float(power.mean()), mean_c, float(slope), deviation, len(power), spread_c2, lowest, highest)
    return Floor(float(power.mean()), mean_c, None, _spread(power), len(power), spread_c2, lowest, highest)


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
