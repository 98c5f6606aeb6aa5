"""What one unit of each phase launched and waited for: kernels summed by name and operator, gaps by what ended them.

A run launches the same few thousand kernels over and over; everything behind this file works on their sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from llmkern.attribute.identify import UNIDENTIFIED, Identified
from llmkern.attribute.kinds import kinds
from llmkern.attribute.timeline import NONE, Timeline

OP_COLUMNS = ["op", "module", "layer", "shapes", "dtypes", "signature", "moved_bytes", "flops"]
# A kernel that takes less than about twice its own launch (2 to 3 µs on an H100) leaves the device waiting for the
# host even if nothing else delays it.
SHORT_NS = 5_000
# Sums over fewer keys than this are taken in a table, over more by sorting.
_MOST_KEYS = 1 << 25


def tally_kernels(timeline: Timeline, identified: Identified | None, ops: pd.DataFrame) -> pd.DataFrame:
    """Return the kernels of one unit of each phase, a row per name and operator (row of *ops*).

    Columns: phase, name, op_index, op, module (the layer's number as ``*``), layer, shapes, dtypes, signature, kind,
    launches, short (of them shorter than SHORT_NS), duration_ns and calls (of the operator, in the first of its rows).
    """
    kernels = timeline.kernels
    names, phases = (kernels[c].astype("category").cat for c in ("name", "phase"))
    op = np.full(len(kernels), NONE) if identified is None else identified.op
    duration_ns = (kernels["end_ns"] - kernels["start_ns"]).to_numpy(float)
    codes, (launches, total_ns, short) = summed_by(
        [phases.codes.to_numpy(), op + 1, names.codes.to_numpy()], duration_ns, duration_ns < SHORT_NS
    )
    frame = pd.DataFrame(
        {
            "phase": phases.categories.to_numpy(object)[codes[0]],
            "name": names.categories.to_numpy(object)[codes[2]],
            "op_index": codes[1] - 1,
            **described(ops, codes[1] - 1),
            "launches": launches,
            "short": short,
            "duration_ns": total_ns,
        }
    )
    frame["calls"] = 0.0
    for phase, rows in frame.groupby("phase", sort=False):
        units = timeline.units(str(phase))
        frame.loc[rows.index, ["launches", "short", "duration_ns"]] /= units
        called = identified.calls.get(str(phase)) if identified is not None else None
        if called is not None:
            first = rows[rows["op_index"] != NONE].drop_duplicates("op_index")
            frame.loc[first.index, "calls"] = called[first["op_index"]] / units
    return frame.assign(kind=kinds(frame))


def labelled(ops: pd.DataFrame, op: np.ndarray, names: np.ndarray) -> pd.DataFrame:
    """Return op, module, layer, shapes, dtypes, signature, name and kind of kernels by their *op* (row of *ops*)."""
    frame = pd.DataFrame({**described(ops, op), "name": names})
    return frame.assign(kind=kinds(frame))


def tally_gaps(
    timeline: Timeline, identified: Identified | None, ops: pd.DataFrame, gaps: pd.DataFrame
) -> pd.DataFrame:
    """Return *gaps* (with cause) of one unit of each phase, a row per cause and kernel that ended them.

    Columns: phase, cause, name, op_index, op, module, layer, shapes, dtypes, signature, kind (of the kernel), launches
    (how many gaps) and duration_ns.
    """
    keys = [gaps[c].astype("category").cat for c in ("phase", "cause", "after")]
    op = np.full(len(gaps), NONE) if identified is None else identified.op[gaps["kernel"].to_numpy()]
    codes, (count, total_ns) = summed_by([*(k.codes.to_numpy() for k in keys), op + 1], gaps["duration_ns"].to_numpy())
    named = {
        column: key.categories.to_numpy(object)[code]
        for column, key, code in zip(("phase", "cause", "name"), keys, codes[:3], strict=True)
    }
    index = {"op_index": codes[3] - 1, **described(ops, codes[3] - 1)}
    frame = pd.DataFrame({**named, **index, "launches": count, "duration_ns": total_ns})
    units = _units(timeline, frame)
    return frame.assign(launches=frame["launches"] / units, duration_ns=frame["duration_ns"] / units, kind=kinds(frame))


def tally_neighbours(timeline: Timeline) -> pd.DataFrame:
    """Return the gaps of one unit of each phase by the kernels around them: phase, before, after, launches, ns."""
    gaps = timeline.gaps
    keys = [gaps[c].astype("category").cat for c in ("phase", "before", "after")]
    codes, (count, total_ns) = summed_by([k.codes.to_numpy() for k in keys], gaps["duration_ns"].to_numpy())
    named = {
        column: key.categories.to_numpy(object)[code]
        for column, key, code in zip(("phase", "before", "after"), keys, codes, strict=True)
    }
    frame = pd.DataFrame({**named, "launches": count, "duration_ns": total_ns})
    units = _units(timeline, frame)
    return frame.assign(launches=frame["launches"] / units, duration_ns=frame["duration_ns"] / units)


def _units(timeline: Timeline, frame: pd.DataFrame) -> pd.Series:
    return frame["phase"].map({p: timeline.units(p) for p in frame["phase"].unique()}).astype(float)


def described(ops: pd.DataFrame, index: np.ndarray) -> dict[str, np.ndarray]:
    """Return op, module, layer, shapes, dtypes and signature of each *index* (row of *ops*); NONE is UNIDENTIFIED."""
    missing = {"op": UNIDENTIFIED, "signature": UNIDENTIFIED}
    found = {}
    for column in ("op", "module", "shapes", "dtypes", "signature"):
        text = ops[column].astype(object).fillna(missing.get(column, "")).astype(str)
        if column == "module":
            # The layers of a model differ in nothing but their number.
            text = text.str.replace(r"\.\d+(?=\.|$)", ".*", regex=True)
        found[column] = np.append(text.to_numpy(object), missing.get(column, ""))[index]
    layer = np.append(ops["layer"].to_numpy(float), np.nan)[index]
    return {**found, "layer": layer}


def summed_by(codes: Sequence[np.ndarray], *weights: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the distinct tuples of *codes* (integers from 0), and for each how often it is there and its *weights*."""
    sizes = [int(c.max()) + 1 if len(c) else 1 for c in codes]
    key = np.zeros(len(codes[0]), np.int64)
    for code, size in zip(codes, sizes, strict=True):
        key *= size
        key += code
    if float(np.prod(sizes, dtype=float)) <= _MOST_KEYS:
        counts = np.bincount(key, minlength=1)
        present = np.flatnonzero(counts)
        sums = [counts[present].astype(float), *(np.bincount(key, w)[present] for w in weights)]
    else:
        present, key = np.unique(key, return_inverse=True)
        sums = [np.bincount(key).astype(float), *(np.bincount(key, w) for w in weights)]
    parts = []
    for size in reversed(sizes):
        present, part = np.divmod(present, size)
        parts.append(part)
    return parts[::-1], sums
