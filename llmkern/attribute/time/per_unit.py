"""What one unit of each phase launched and waited for: kernels summed by name and operator, gaps by what ended them.

A run launches the same few thousand kernels over and over; everything behind this file works on their sums.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.time.kinds import kinds
from llmkern.attribute.time.operators import UNIDENTIFIED, Identified
from llmkern.attribute.time.timeline import Timeline
from llmkern.runfolder.vocabulary import NONE

OP_COLUMNS = ["op", "module", "layer", "shapes", "dtypes", "signature", "moved_bytes", "flops"]
# A kernel that takes less than about twice its own launch (2 to 3 µs on an H100) leaves the device waiting for the
# host even if nothing else delays it.
SHORT_NS = 5_000
# Sums are taken in a table of all keys that there may be if it has at most this many entries for each row (and in all),
# by sorting otherwise.
_MOST_EMPTY, _MOST_KEYS = 4, 1 << 25


def operators(ops: pd.DataFrame) -> pd.DataFrame:
    """Return table ops as everything behind it looks it up: texts as categories, and one more row for NONE.

    Columns: those of OP_COLUMNS, with the number of a layer in module written as ``*``.
    """
    found: dict[str, object] = {}
    for column in ("op", "module", "shapes", "dtypes", "signature"):
        missing = UNIDENTIFIED if column in ("op", "signature") else ""
        codes, texts = pd.factorize(ops[column].astype(object).fillna(missing))
        names = [str(text) for text in texts]
        if column == "module":
            # The layers of a model differ in nothing but their number.
            names = [re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names]
        again, distinct = pd.factorize(np.array([*names, missing], object))
        found[column] = pd.Categorical.from_codes(again[np.append(codes, len(names))], categories=pd.Index(distinct))
    for column, nothing in (("layer", np.nan), ("moved_bytes", 0.0), ("flops", 0.0)):
        found[column] = np.append(ops[column].to_numpy(float), nothing)
    return pd.DataFrame(found)


def tally_kernels(timeline: Timeline, identified: Identified | None, ops: pd.DataFrame) -> pd.DataFrame:
    """Return the kernels of one unit of each phase, a row per name and operator (row of *ops*, see operators).

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
            "phase": _named(phases, codes[0]),
            "name": _named(names, codes[2]),
            "op_index": codes[1] - 1,
            **described(ops, codes[1] - 1),
            "launches": launches,
            "short": short,
            "duration_ns": total_ns,
        }
    )
    frame["calls"] = 0.0
    for phase, rows in frame.groupby("phase", sort=False, observed=True):
        units = timeline.units(str(phase))
        frame.loc[rows.index, ["launches", "short", "duration_ns"]] /= units
        called = identified.calls.get(str(phase)) if identified is not None else None
        if called is not None:
            first = rows[rows["op_index"] != NONE].drop_duplicates("op_index")
            frame.loc[first.index, "calls"] = called[first["op_index"]] / units
    return frame.assign(kind=kinds(frame))


def labelled(ops: pd.DataFrame, op: np.ndarray, names: Any) -> pd.DataFrame:
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
        column: _named(key, code) for column, key, code in zip(("phase", "cause", "name"), keys, codes[:3], strict=True)
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
        column: _named(key, code) for column, key, code in zip(("phase", "before", "after"), keys, codes, strict=True)
    }
    frame = pd.DataFrame({**named, "launches": count, "duration_ns": total_ns})
    units = _units(timeline, frame)
    return frame.assign(launches=frame["launches"] / units, duration_ns=frame["duration_ns"] / units)


def _named(column: Any, codes: np.ndarray) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, categories=column.categories)


def _units(timeline: Timeline, frame: pd.DataFrame) -> np.ndarray:
    phases = frame["phase"].cat
    return np.array([float(timeline.units(str(p))) for p in phases.categories])[phases.codes.to_numpy()]


def described(ops: pd.DataFrame, index: np.ndarray) -> dict[str, Any]:
    """Return op, module, layer, shapes, dtypes and signature of each *index* (row of *ops*); NONE is UNIDENTIFIED."""
    # NONE is -1, and the last row is that of no operator.
    return {c: ops[c].array.take(index) for c in ("op", "module", "layer", "shapes", "dtypes", "signature")}


def summed_by(codes: Sequence[np.ndarray], *weights: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the distinct tuples of *codes* (integers from 0), and for each how often it is there and its *weights*."""
    sizes = [int(c.max()) + 1 if len(c) else 1 for c in codes]
    key = np.zeros(len(codes[0]), np.int64)
    for code, size in zip(codes, sizes, strict=True):
        key *= size
        key += code
    if float(np.prod(sizes, dtype=float)) <= min(_MOST_KEYS, _MOST_EMPTY * len(key) + 1_000):
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
