"""The cause of each gap, by what the host did before it launched the kernel that ended it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llmkern.attribute.timeline import Timeline

CAUSES = (*("token_boundary", "profiler", "sync_stall", "launch_bound", "dependency", "launch_latency", "unknown"),)
# A kernel queued in time starts this soon after the one before it; later, something else held it back.
LATENCY_NS = 20_000
# Calls that may hold the host up until the device has done something.
_BLOCKING = r"Synchronize|Memcpy|Malloc|MemAlloc|Free"
# CUPTI's own work explains a gap that it covers by half.
_PROFILER_SHARE = 0.5


def gap_causes(
    timeline: Timeline, launches: pd.DataFrame, ranges: pd.DataFrame, overheads: pd.DataFrame, pass_name: str = "calls"
) -> pd.DataFrame:
    """Return the gaps of *timeline* with ``cause`` and ``api``, the call in which the host was blocked ("": in none).

    In this order: ``token_boundary`` (between two forwards: sampling, stopping criteria, preparing the next),
    ``profiler`` (CUPTI was at work), ``sync_stall`` (the host was blocked in a synchronisation, a read-back or an
    allocation when the device ran dry), ``launch_bound`` (the kernel was issued only after that), ``dependency`` (it
    was queued in time but waited for another stream), ``launch_latency`` (queued in time, hardware start-up). A kernel
    whose launch was not recorded leaves ``unknown``.
    """
    gaps, kernels = timeline.gaps, timeline.kernels
    if gaps.empty:
        return gaps.assign(cause=np.empty(0, object), api=np.empty(0, object))
    calls = launches[launches["pass"] == pass_name].sort_values("start_ns", kind="stable")
    ended_by = gaps["kernel"].to_numpy()
    correlation = kernels["correlation_id"].to_numpy()[ended_by]
    by_id = calls.drop_duplicates("correlation_id").set_index("correlation_id")
    position = by_id.index.get_indexer(correlation)
    recorded = position >= 0
    issue_start = np.where(recorded, by_id["start_ns"].to_numpy()[position] if len(by_id) else 0, 0)
    issue_end = np.where(recorded, by_id["end_ns"].to_numpy()[position] if len(by_id) else 0, 0)
    dry_ns = gaps["start_ns"].to_numpy()
    api = _blocking(calls, dry_ns, issue_start)
    late = issue_end > dry_ns
    stream = kernels["stream"].to_numpy()
    other_stream = stream[ended_by] != stream[np.maximum(ended_by - 1, 0)]
    waited = gaps["duration_ns"].to_numpy() > LATENCY_NS
    cause = np.select(
        [
            _at_boundary(kernels, ranges[ranges["pass"] == pass_name], ended_by, issue_start, recorded),
            _covered(overheads[overheads["pass"] == pass_name], dry_ns, gaps["duration_ns"].to_numpy()),
            ~recorded,
            late & (api != ""),
            late,
            waited & other_stream,
        ],
        ["token_boundary", "profiler", "unknown", "sync_stall", "launch_bound", "dependency"],
        "launch_latency",
    )
    return gaps.assign(cause=cause.astype(object), api=np.where(cause == "sync_stall", api, ""))


def _blocking(calls: pd.DataFrame, dry_ns: np.ndarray, issue_ns: np.ndarray) -> np.ndarray:
    """Return the call in which the host was blocked when the device ran dry, until it issued the next kernel."""
    waits = calls[calls["api"].astype(str).str.contains(_BLOCKING).to_numpy()]
    found = np.full(len(dry_ns), "", object)
    if waits.empty:
        return found
    start, end = waits["start_ns"].to_numpy(), waits["end_ns"].to_numpy()
    last = np.searchsorted(start, dry_ns, side="right") - 1
    # Of the calls that began before the device ran dry the last may be short and an earlier one still open.
    latest_end = np.maximum.accumulate(end)
    inside = (last >= 0) & (latest_end[np.maximum(last, 0)] >= dry_ns) & (latest_end[np.maximum(last, 0)] <= issue_ns)
    holder = np.searchsorted(latest_end, latest_end[np.maximum(last, 0)], side="left")
    labels = waits["api"].astype(str).to_numpy()
    found[inside] = labels[holder[inside]]
    return found


def _at_boundary(
    kernels: pd.DataFrame, ranges: pd.DataFrame, ended_by: np.ndarray, issue_ns: np.ndarray, recorded: np.ndarray
) -> np.ndarray:
    """Whether the kernel that ended each gap was launched outside the forward in which the one before it was."""
    forwards = ranges[ranges["category"] == "token"].sort_values("start_ns")
    if forwards.empty:
        return np.zeros(len(ended_by), bool)
    start, end = forwards["start_ns"].to_numpy(), forwards["end_ns"].to_numpy()

    def forward(times_ns: np.ndarray) -> np.ndarray:
        index = np.searchsorted(start, times_ns, side="right") - 1
        return np.where((index >= 0) & (times_ns <= end[np.maximum(index, 0)]), index, -1)

    issued = kernels["issued_ns"].to_numpy()
    own = forward(np.where(recorded, issue_ns, issued[ended_by]))
    before = forward(issued[np.maximum(ended_by - 1, 0)])
    result: np.ndarray = (own < 0) | (own != before)
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
