"""Joins the kernels of pass *time* with the operators of pass *inspect*, by the order of launches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
import pandas as pd

from llmkern.attribute.time.timeline import SHAPE_COLUMNS, Timeline, read_timeline
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import INSPECT, NONE

UNIDENTIFIED = "not identified"


@dataclass(frozen=True)
class Mismatch:
    """A step of pass *time* whose kernels are not quite those that were inspected."""

    phase: str
    token: int | None
    position: int
    kernels: int
    unidentified: int


@dataclass(frozen=True)
class Identified:
    """``op`` holds for each row of the timeline's kernels the row of table ``ops``, NONE where it is not known.

    ``calls`` counts per phase how often each operator (row of ``ops``) was called.
    """

    op: np.ndarray
    mismatches: list[Mismatch]
    calls: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Return the share of the kernels whose operator is known."""
        return float((self.op != NONE).mean()) if len(self.op) else 0.0


@dataclass(frozen=True)
class Inspected:
    """Pass *inspect*: for each phase its steps, as names (codes of ``categories``) and the rows of ``ops`` behind.

    ``kernels`` are those of all steps in the order of their launches: op (row of ``ops``), name (code), grid and block.
    """

    categories: pd.Index
    steps: dict[str, list[tuple[np.ndarray, np.ndarray]]]
    ops: int
    kernels: pd.DataFrame


def identify(inspected: Inspected, timeline: Timeline) -> Identified:
    """Return the operator behind each kernel of *timeline*.

    Steps are compared kernel name by kernel name in the order of their launches: a decoded token with the inspected
    token that is most like it, a prefill with the inspected prefill. Where they differ, what stands alike on both sides
    of the difference is identified and the rest is not; nothing is guessed.
    """
    names = timeline.kernels["name"].astype("category").cat
    codes = inspected.categories.get_indexer(names.categories)
    # A name that was not inspected is a code that was not.
    new = codes < 0
    codes[new] = len(inspected.categories) + np.arange(new.sum())

    @cache
    def of_sequence(phase: str, names: bytes) -> tuple[np.ndarray, int, np.ndarray]:
        op, first = _aligned(np.frombuffer(names, np.int32), inspected.steps.get(phase, []))
        return op, first, np.unique(op[op != NONE])

    result = np.full(len(timeline.kernels), NONE, np.int32)
    calls: dict[str, np.ndarray] = {}
    mismatches = []
    for step in _steps(timeline.kernels, codes.astype(np.int32)[names.codes.to_numpy()]):
        op, first, distinct = of_sequence(step.phase, step.names.tobytes())
        result[step.rows] = op
        counts = calls.setdefault(step.phase, np.zeros(inspected.ops, np.int64))
        counts[distinct] += 1
        if first != NONE:
            missing = int((op == NONE).sum())
            mismatches.append(Mismatch(step.phase, step.token, first, len(step.names), missing))
    return Identified(result, mismatches, calls)


def read_inspected(run: RunFolder, device: int) -> Inspected | None:
    """Return pass *inspect* of *run*, None without it."""
    ops = run.table("ops", ["start_ns", "end_ns"])
    if ops.empty:
        return None
    starts, ends = ops["start_ns"].to_numpy(), ops["end_ns"].to_numpy()
    order = np.argsort(starts, kind="stable")
    kernels = read_timeline(run, device, INSPECT, columns=SHAPE_COLUMNS).kernels
    names = kernels["name"].astype("category").cat
    known: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    parts = []
    for step in _steps(kernels, names.codes.to_numpy(np.int32)):
        issued_ns = kernels["issued_ns"].to_numpy()[step.rows]
        found = np.maximum(np.searchsorted(starts[order], issued_ns, side="right") - 1, 0)
        inside = (issued_ns >= starts[order][found]) & (issued_ns <= ends[order][found])
        op = np.where(inside, order[found], NONE)
        known.setdefault(step.phase, []).append((step.names, op))
        shapes = {column: kernels[column].to_numpy()[step.rows] for column in SHAPE_COLUMNS}
        parts.append(pd.DataFrame({"op": op, "name": step.names, **shapes}))
    every = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["op", "name", *SHAPE_COLUMNS])
    return Inspected(names.categories, known, len(ops), every.fillna(0).astype(np.int64))


@dataclass(frozen=True)
class _Step:
    """A prefill or one decoded token: its kernels (codes of their names) in the order of their launches."""

    phase: str
    token: int | None
    names: np.ndarray
    rows: np.ndarray | slice


def _steps(kernels: pd.DataFrame, codes: np.ndarray) -> list[_Step]:
    if kernels.empty:
        return []
    phases = kernels["phase"].cat
    phase = phases.codes.to_numpy()
    # A prefill is one step, with what generate does before its forward.
    token = np.where((kernels["phase"] == "decode").to_numpy(), kernels["token"].to_numpy(), NONE)
    number = kernels["instance"].to_numpy(np.int64) * (int(token.max()) + 2) + token + 1
    correlation = kernels["correlation_id"].to_numpy()
    rows = None
    # Launches are numbered in their order; kernels of one graph launch share its number and run in their order.
    if ((number[1:] < number[:-1]) | ((number[1:] == number[:-1]) & (correlation[1:] < correlation[:-1]))).any():
        rows = np.lexsort((correlation, number))
        number, codes = number[rows], codes[rows]
    edges = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [len(number)]])
    steps = []
    for begin, end in pairwise(edges.tolist()):
        inside = slice(begin, end) if rows is None else rows[begin:end]
        first = begin if rows is None else int(rows[begin])
        named = str(phases.categories[phase[first]])
        steps.append(_Step(named, None if token[first] == NONE else int(token[first]), codes[begin:end], inside))
    return steps


def _aligned(names: np.ndarray, known: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, int]:
    """Return the operator of each of *names*, and the position of the first difference (NONE: there is none)."""
    for sequence, op in known:
        if np.array_equal(sequence, names):
            return op, NONE
    # Only for what differs: most steps of most runs do not.
    from rapidfuzz.distance import LCSseq

    best: np.ndarray = np.full(len(names), NONE)
    for sequence, op in known:
        found = np.full(len(names), NONE)
        for part in LCSseq.opcodes(sequence.tolist(), names.tolist()):
            if part.tag == "equal":
                found[part.dest_start : part.dest_end] = op[part.src_start : part.src_end]
        if (found != NONE).sum() > (best != NONE).sum():
            best = found
    unknown = np.flatnonzero(best == NONE)
    return best, int(unknown[0]) if len(unknown) else len(names)
