"""What of a capture cannot have happened: left out, or cut where that is certain, and told."""

from __future__ import annotations

import numpy as np
import pandas as pd

# Clocks of host and device are aligned to less than this.
_SKEW_NS = 1_000_000


def sound(kernels: pd.DataFrame, launches: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Return *kernels* and *launches* (rows of their tables) that can have happened, and what was done, in sentences.

    A record with no times has 0 for both. Of launches only those that end before they begin are left out.
    """
    told: list[str] = []
    start, end = (kernels[column].to_numpy(np.int64) for column in ("start_ns", "end_ns"))
    first = _first_launch(kernels, launches)
    faults = {
        "without times": (start == 0) & (end == 0),
        "without an end": (start > 0) & (end == 0),
        "that ended before they began": (end < start) & (end > 0),
        "that began before they were launched": (end >= start) & (start > 0) & (start < first - _SKEW_NS),
    }
    kept = np.ones(len(kernels), bool)
    for fault, rows in faults.items():
        if rows.any():
            told.append(f"Left out: {_count(int(rows.sum()), 'GPU record')} {fault}.")
            kept &= ~rows
    kernels = kernels[kept]
    if len(launches):
        backward = launches["end_ns"].to_numpy(np.int64) < launches["start_ns"].to_numpy(np.int64)
        if backward.any():
            told.append(f"Left out: {_count(int(backward.sum()), 'host call')} that ended before they began.")
            launches = launches[~backward]
    kernels, cut = _cut(kernels)
    if cut:
        told.append(
            f"Cut: {_count(cut, 'GPU record')} that lasted beyond the end of the next on the same stream, where work "
            "is serial; each ends where the next begins."
        )
    return kernels, launches, told


def _first_launch(kernels: pd.DataFrame, launches: pd.DataFrame) -> np.ndarray:
    """Return the start of the first launch of each kernel's correlation, the least there is where none is known."""
    if launches.empty:
        return np.full(len(kernels), np.iinfo(np.int64).min // 2)
    known = launches[launches["correlation_id"].to_numpy(np.int64) != 0]
    first = known.groupby(known["correlation_id"].astype(np.int64))["start_ns"].min()
    found = kernels["correlation_id"].fillna(0).astype(np.int64).map(first)
    return found.fillna(np.iinfo(np.int64).min // 2).to_numpy(np.int64)


def _cut(kernels: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Return *kernels* with those cut that outlast the next of their stream, and how many."""
    keys = [column for column in ("device", "context", "stream") if column in kernels]
    stream = kernels["stream"] if "stream" in kernels else pd.Series(dtype=float)
    # Where no stream is told, records of different ones would seem to be of one.
    if len(kernels) < 2 or stream.isna().all() or (pd.to_numeric(stream).fillna(0) == 0).all():
        return kernels, 0
    group = kernels.groupby(keys, dropna=False, sort=False).ngroup().to_numpy()
    start, end = (kernels[column].to_numpy(np.int64) for column in ("start_ns", "end_ns"))
    order = np.lexsort((end, start, group))
    same = group[order][1:] == group[order][:-1]
    outlasts = same & (end[order][:-1] > end[order][1:]) & (start[order][1:] > start[order][:-1])
    # Branches of a graph run side by side under one stream's number.
    graph = pd.to_numeric(kernels["graph_id"]).fillna(0).to_numpy() if "graph_id" in kernels else np.zeros(len(kernels))
    outlasts &= (graph[order][:-1] == 0) & (graph[order][1:] == 0)
    rows = order[:-1][outlasts]
    if not len(rows):
        return kernels, 0
    end = end.copy()
    end[rows] = start[order[1:][outlasts]]
    return kernels.assign(end_ns=end), len(rows)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"
