"""The cause of each gap, by what the host did before it launched the kernel that ended it."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from llmkern.attribute.time.timeline import Timeline, by_start, containing
from llmkern.runfolder.vocabulary import NONE

CAUSES = ("token_boundary", "profiler", "sync_stall", "launch_bound", "dependency", "launch_latency", "unknown")
# A kernel queued in time starts this soon after the one before it (at most 4 µs in recorded runs); later, it was held
# back: by an event of another stream, another device, or a function that the host runs in a stream.
LATENCY_NS = 20_000
# Calls that may hold the host up until the device has done something.
_BLOCKING = re.compile(r"Synchronize|Memcpy|Malloc|MemAlloc|Free")
# The part of a gap that gives it its name.
_LONGER = 0.5
# CUPTI's own work explains a gap that it covers by half.
_PROFILER_SHARE = 0.5


def gap_causes(timeline: Timeline, launches: pd.DataFrame, overheads: pd.DataFrame) -> pd.DataFrame:
    """Return the gaps of *timeline* with ``cause`` and ``api``, the call that blocked the host in a stall.

    In this order: ``token_boundary`` (between two forwards: sampling, stopping criteria, preparing the next),
    ``profiler`` (CUPTI was at work), ``sync_stall`` (the host was blocked in a synchronisation, a read-back or an
    allocation when the device ran dry), ``launch_bound`` (the kernel was issued only after that), ``dependency`` (it
    was queued, but waited for another stream during the longer part of the gap), ``launch_latency`` (queued in time,
    hardware start-up). A kernel whose launch was not recorded leaves ``unknown``.
    """
    gaps, kernels = timeline.gaps, timeline.kernels
    if gaps.empty:
        return gaps.assign(cause=pd.Categorical([], CAUSES), api=pd.Categorical([]))
    calls = by_start(launches)
    ended_by = gaps["kernel"].to_numpy()
    issued_by = kernels["call"].to_numpy()[ended_by]
    recorded = issued_by >= 0
    dry_ns, duration_ns = gaps["start_ns"].to_numpy(), gaps["duration_ns"].to_numpy()
    issue_start = np.append(calls["start_ns"].to_numpy(), 0)[issued_by]
    api = _blocking(calls, dry_ns, issue_start)
    issued_ns = np.append(calls["end_ns"].to_numpy(), 0)[issued_by]
    # What follows within a CUDA graph was issued with its first kernel.
    launched = kernels["correlation_id"].to_numpy()
    late = (issued_ns > dry_ns) & (launched[ended_by] != launched[ended_by - 1])
    # Issued and yet not begun: the rest of the gap. Where it is the longer part it is the cause.
    held_ns = duration_ns - np.clip(np.where(late, issued_ns, 0) - dry_ns, 0, None)
    # From the weakest claim to the strongest: the later overrides.
    cause = np.full(len(gaps), CAUSES.index("launch_latency"), np.int8)
    for name, holds in (
        ("launch_bound", late),
        ("sync_stall", late & (api.codes >= 0)),
        ("dependency", (held_ns > LATENCY_NS) & (held_ns > _LONGER * duration_ns)),
        ("unknown", ~recorded),
        ("profiler", _covered(overheads, dry_ns, duration_ns)),
        ("token_boundary", _at_boundary(kernels, timeline.forwards, ended_by, issue_start, recorded)),
    ):
        cause[holds] = CAUSES.index(name)
    stalled = cause == CAUSES.index("sync_stall")
    api = pd.Categorical.from_codes(np.where(stalled, api.codes, -1), dtype=api.dtype)
    return gaps.assign(cause=pd.Categorical.from_codes(cause, categories=pd.Index(CAUSES)), api=api)


def _blocking(calls: pd.DataFrame, dry_ns: np.ndarray, issue_ns: np.ndarray) -> pd.Categorical:
    """Return the call in which the host was blocked when the device ran dry, until it issued the next kernel."""
    names = calls["api"].astype("category").cat
    blocks = np.array([bool(_BLOCKING.search(str(name))) for name in names.categories], bool)
    waits = np.flatnonzero(blocks[names.codes.to_numpy()]) if len(blocks) else np.empty(0, int)
    if not len(waits):
        return pd.Categorical.from_codes(np.full(len(dry_ns), -1), categories=names.categories)
    start, end = calls["start_ns"].to_numpy()[waits], calls["end_ns"].to_numpy()[waits]
    last = np.searchsorted(start, dry_ns, side="right") - 1
    # Of the calls that began before the device ran dry the last may be short and an earlier one still open.
    latest_end = np.maximum.accumulate(end)
    # Which call it was that ended the latest: the last that raised the maximum.
    holder = np.maximum.accumulate(np.where(end >= latest_end, np.arange(len(end)), 0))
    at = np.maximum(last, 0)
    inside = (last >= 0) & (latest_end[at] >= dry_ns) & (latest_end[at] <= issue_ns)
    codes = np.where(inside, names.codes.to_numpy()[waits[holder[at]]], -1)
    return pd.Categorical.from_codes(codes, categories=names.categories)


def _at_boundary(
    kernels: pd.DataFrame, forwards: pd.DataFrame, ended_by: np.ndarray, issue_ns: np.ndarray, recorded: np.ndarray
) -> np.ndarray:
    """Whether the kernel that ended each gap was launched outside the forward in which the one before it was."""
    if forwards.empty:
        return np.zeros(len(ended_by), bool)
    issued = kernels["issued_ns"].to_numpy()
    own = containing(np.where(recorded, issue_ns, issued[ended_by]), forwards)
    before = containing(issued[ended_by - 1], forwards)
    result: np.ndarray = (own == NONE) | (own != before)
    return result


def _covered(overheads: pd.DataFrame, dry_ns: np.ndarray, duration_ns: np.ndarray) -> np.ndarray:
    """Whether CUPTI's own work covers at least half of each gap."""
    if overheads.empty:
        return np.zeros(len(dry_ns), bool)
    spans = overheads.sort_values("start_ns")
    base_ns = min(int(spans["start_ns"].iloc[0]), int(dry_ns.min()))
    start = (spans["start_ns"] - base_ns).to_numpy(float)
    # Threads overlap: what an earlier span has covered does not count again.
    end = np.maximum.accumulate((spans["end_ns"] - base_ns).to_numpy(float))
    begin = np.maximum(start, np.concatenate([[-np.inf], end[:-1]]))
    edges = np.column_stack([np.minimum(begin, end), end]).ravel()
    sums = np.concatenate([[0.0], np.cumsum(np.diff(edges) * (np.arange(len(edges) - 1) % 2 == 0))])
    left = (dry_ns - base_ns).astype(float)
    covered = np.interp(left + duration_ns, edges, sums) - np.interp(left, edges, sums)
    result: np.ndarray = covered >= _PROFILER_SHARE * duration_ns
    return result
