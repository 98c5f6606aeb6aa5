"""Energy of a phase between its own range marks, from power samples that are longer than the phase may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

# A sample is the mean power of the time up to it, but it comes a little late: 4 to 8 ms on an H100.
LAGS_NS = np.arange(0, 31, 2) * 1_000_000
# Fewer samples than this say nothing of two phases and what lies between them.
LEAST_SAMPLES = 12
# Less of the time than this between the phases cannot be told from them.
LEAST_REST = 0.001


@dataclass(frozen=True)
class ByRanges:
    """J per run of each phase, one value per window, and the lag in ms that fits the samples best."""

    energy_j: dict[str, list[float]]
    lag_ms: float


def energy_by_ranges(
    sample_ns: np.ndarray, sample_w: np.ndarray, windows: pd.DataFrame, phases: pd.DataFrame
) -> ByRanges | None:
    """Split the energy of *windows* between the phases that ran in them; both have start_ns and end_ns.

    A 26 ms prefill covers one 20 ms sample and parts of two more, so joules cannot be cut at its marks. But it runs
    many times, each time elsewhere relative to the samples: in each window a least-squares fit over all samples finds
    the mean power of each phase from the share of every sample that it covers. None where the samples are too few.
    """
    order = np.argsort(sample_ns, kind="stable")
    # Nanoseconds since 1970 do not fit a float's 53 bits.
    base_ns = int(sample_ns[order[0]]) if len(sample_ns) else 0
    times = (sample_ns[order] - base_ns).astype(float)
    watts = sample_w[order]
    names = sorted(phases["phase"].astype(str).unique())
    spans = {name: _spans(phases[phases["phase"] == name], base_ns) for name in names}
    best: tuple[float, float, list[np.ndarray]] | None = None
    for lag_ns in LAGS_NS:
        left, right = times[:-1] - lag_ns, times[1:] - lag_ns
        squares, found = 0.0, []
        for start, end in zip(*_spans(windows, base_ns), strict=True):
            inside = (left >= start) & (right <= end) & (right > left) & np.isfinite(watts[1:])
            if inside.sum() < LEAST_SAMPLES:
                continue
            a, b = left[inside], right[inside]
            covered = np.stack([_covered(a, b, *spans[name]) for name in names], axis=1)
            rest = (b - a) - covered.sum(axis=1)
            parts = np.column_stack([covered, rest]) if rest.sum() > LEAST_REST * (b - a).sum() else covered
            shares = parts / (b - a)[:, None]
            power_w, *_ = np.linalg.lstsq(shares, watts[1:][inside], rcond=None)
            squares += float(((shares @ power_w - watts[1:][inside]) ** 2).sum())
            # Power and length go together (a slow token draws less), so both are this window's.
            lengths_s = np.array([_mean_length_ns(*spans[name], start, end) for name in names]) / 1e9
            found.append(power_w[: len(names)] * lengths_s)
        if found and (best is None or squares < best[0]):
            best = (squares, lag_ns / 1e6, found)
    if best is None:
        return None
    return ByRanges({name: [float(energy[i]) for energy in best[2]] for i, name in enumerate(names)}, best[1])


def _mean_length_ns(starts: np.ndarray, ends: np.ndarray, first: float, last: float) -> float:
    inside = (starts >= first) & (ends <= last)
    return float((ends - starts)[inside].mean()) if inside.any() else 0.0


def _spans(frame: pd.DataFrame, base_ns: int) -> tuple[np.ndarray, np.ndarray]:
    ordered = frame.sort_values("start_ns")
    return tuple((ordered[c].to_numpy() - base_ns).astype(float) for c in ("start_ns", "end_ns"))  # type: ignore[return-value]


def _covered(left: np.ndarray, right: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return how much of each [left, right] the spans (sorted, not overlapping) cover."""
    before = np.concatenate([[0.0], np.cumsum(ends - starts)])

    def until(moment: np.ndarray) -> np.ndarray:
        count = np.searchsorted(starts, moment, side="right")
        last = np.maximum(count - 1, 0)
        overhang = np.where(count > 0, np.maximum(0.0, ends[last] - moment), 0.0)
        return before[count] - overhang

    return until(right) - until(left)
