"""What a server's iterations consist of: kernels and gaps, times from recorded ones and joules from weighed ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from llmkern.attribute.requests import Served, with_tokens
from llmkern.estimate import Estimate, from_samples
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import DECODE, PREFILL, TIME

# Recorded iterations whose mean batch is another by more than this factor say nothing of the joules of weighed ones.
_ALIKE = 1.25
_NAMED = 3


@dataclass(frozen=True)
class IterationKind:
    """Iterations that prefill something (*kind* prefill) or only decode, in the mean over them.

    As recorded: their number, batch, launches, *span_s* and *busy_s* of it in kernels, the kernels that take longest
    with their s. As weighed: *joules* of one, of which *gaps_j* are idle floor x the time outside kernels; None where
    there is no energy, or where the weighed ones had another batch.
    """

    kind: str
    count: int
    batch: float
    launches: float
    span_s: Estimate
    busy_s: float
    longest: tuple[tuple[str, float], ...]
    weighed_s: float | None = None
    joules: Estimate | None = None
    gaps_j: Estimate | None = None


def iteration_kinds(run: RunFolder, found: Served) -> list[IterationKind]:
    """Return what the recorded iterations of *run* consist of by kind; none where no kernel was recorded."""
    kernels = run.table("kernels", ["start_ns", "end_ns", "name"], {"pass": TIME}).sort_values("start_ns")
    every = run.table("iterations")
    later = every[every["start_ns"] >= found.end_ns].sort_values("start_ns").reset_index(drop=True)
    if kernels.empty or later.empty:
        return []
    processed = run.table("processed")
    later = with_tokens(later, processed[processed["iteration"].isin(later["iteration"])])
    starts, ends = later["start_ns"].to_numpy(np.int64), later["end_ns"].to_numpy(np.int64)
    place = np.searchsorted(starts, kernels["start_ns"].to_numpy(np.int64), side="right") - 1
    inside = (place >= 0) & (kernels["start_ns"].to_numpy(np.int64) < ends[place.clip(0)])
    kernels, place = kernels[inside], place[inside]
    seconds = _own_s(kernels, ends[place])
    later = later.assign(
        span_s=(ends - starts) / 1e9,
        busy_s=np.bincount(place, weights=seconds, minlength=len(later)),
        launches=np.bincount(place, minlength=len(later)),
    )
    kinds = np.where(later["prefill_tokens"] > 0, PREFILL, DECODE)
    result = []
    for kind in (PREFILL, DECODE):
        own = kinds == kind
        if own.any():
            names = kernels["name"].astype(str)[own[place]]
            result.append(_kind(kind, later[own], _longest(names, seconds[own[place]], int(own.sum())), found))
    return result


def _own_s(kernels: pd.DataFrame, latest_ns: np.ndarray) -> np.ndarray:
    """Return the s of each kernel (by start) in which no earlier one still runs, inside its iteration."""
    starts = kernels["start_ns"].to_numpy(np.int64)
    ends = np.minimum(kernels["end_ns"].to_numpy(np.int64), latest_ns)
    before = np.append(np.int64(0), np.maximum.accumulate(ends)[:-1]) if len(ends) else ends
    found: np.ndarray = np.maximum(ends - np.maximum(starts, before), 0) / 1e9
    return found


def _longest(names: pd.Series, seconds: np.ndarray, count: int) -> tuple[tuple[str, float], ...]:
    sums = pd.Series(seconds).groupby(names.to_numpy()).sum().nlargest(_NAMED) / count
    return tuple((str(name), float(each)) for name, each in sums.items())


def _kind(kind: str, recorded: pd.DataFrame, longest: tuple[tuple[str, float], ...], found: Served) -> IterationKind:
    busy_s = float(recorded["busy_s"].mean())
    plain = IterationKind(
        kind,
        len(recorded),
        float(recorded["batch"].mean()),
        float(recorded["launches"].mean()),
        _mean(recorded["span_s"]),
        busy_s,
        longest,
    )
    weighed = found.iterations
    weighed = weighed[(weighed["prefill_tokens"] > 0) == (kind == PREFILL)]
    if weighed.empty or found.floor_w is None or found.estimated:
        return plain
    alike = 1 / _ALIKE <= plain.batch / max(float(weighed["batch"].mean()), 1e-9) <= _ALIKE
    if kind == PREFILL:
        tokens = recorded["prefill_tokens"].mean() / max(float(weighed["prefill_tokens"].mean()), 1e-9)
        alike = alike and 1 / _ALIKE <= tokens <= _ALIKE
    joules = weighed["energy_j"].dropna()
    if not alike or joules.empty:
        return plain
    spans_s = (weighed["end_ns"] - weighed["start_ns"]) / 1e9
    outside_s = max(0.0, float(spans_s.mean()) - busy_s)
    whole = _mean(joules)
    gaps = found.floor_w.scaled(outside_s).within(whole)
    return replace(plain, weighed_s=float(spans_s.mean()), joules=whole, gaps_j=gaps)


def _mean(values: pd.Series) -> Estimate:
    """Return the mean with the interval of the median around it: parts add up to a whole in the mean only."""
    spread, mean = from_samples(values.to_list()), float(values.mean())
    return Estimate.of(mean, None if spread.draws is None else spread.draws + (mean - spread.value), spread.samples)
