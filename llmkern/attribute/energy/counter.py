"""Energy between two moments, from the ticks of a counter."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llmkern.runfolder import RunFolder


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


def between_ticks(curve: EnergyCurve, power: pd.DataFrame) -> EnergyCurve:
    """Return *curve* with what lies between its ticks as the samples in *power* (of all that it counts) say.

    A sample is the mean power in W since the one before; what the counter moved from tick to tick stays. Between ticks
    without a sample the curve is straight, as it was.
    """
    kept = power[power["sensor"] == "samples"].sort_values("timestamp_ns")
    every = [rows for _, rows in kept.groupby("device") if len(rows) > 1]
    if not every or len(curve) < 2:
        return curve
    times = np.unique(np.concatenate([curve.tick_ns, kept["timestamp_ns"].to_numpy(np.int64)]))
    times = times[(times >= curve.tick_ns[0]) & (times <= curve.tick_ns[-1])]
    rose = np.zeros(len(times))
    for rows in every:
        at_ns = rows["timestamp_ns"].to_numpy(np.int64)
        # The last holds on: where the driver kept none, and after the end.
        place = np.searchsorted(at_ns, times, side="left").clip(max=len(at_ns) - 1)
        rose[1:] += rows["power_mw"].to_numpy(float)[place[1:]] * np.diff(times)
    total = np.cumsum(rose)
    tick = np.searchsorted(times, curve.tick_ns)
    first = np.searchsorted(curve.tick_ns, times, side="right").clip(1, len(curve) - 1) - 1
    own, length = total - total[tick[first]], total[tick[first + 1]] - total[tick[first]]
    joule = curve.tick_j[first] + (curve.tick_j[first + 1] - curve.tick_j[first]) * own / np.maximum(length, 1e-12)
    return EnergyCurve(times, np.where(length > 0, joule, curve.at(times)) * 1e3)


def counter_of(run: RunFolder, sensor: str, device: int | None) -> EnergyCurve | None:
    """Return the counter of *sensor* on *device* (None: summed over devices), None with fewer than two ticks."""
    energy = run.table("energy")
    rows = energy[energy["sensor"] == sensor]
    if device is not None:
        rows = rows[rows["device"] == device]
    else:
        # Packages are read one after the other in one sweep; their sum needs a value of each at the same time.
        devices = sorted(rows["device"].unique())
        first = rows[rows["device"] == devices[0]].sort_values("timestamp_ns") if devices else rows
        total = first["energy_mj"].astype(float)
        for other in devices[1:]:
            part = rows[rows["device"] == other].sort_values("timestamp_ns")
            total = total + np.interp(first["timestamp_ns"], part["timestamp_ns"], part["energy_mj"])
        rows = first.assign(energy_mj=total)
    if len(rows) < 2:
        return None
    return EnergyCurve(rows["timestamp_ns"].to_numpy(), rows["energy_mj"].to_numpy())
