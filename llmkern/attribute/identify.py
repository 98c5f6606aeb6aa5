"""Joins the kernels of pass *time* with the operators of pass *inspect*, by the order of launches."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache

import numpy as np

from llmkern.attribute.timeline import Timeline, build_timeline
from llmkern.run import RunFolder

NONE = -1
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
    """``op`` holds for each row of the timeline's kernels the row of table ``ops``, NONE where it is not known."""

    op: np.ndarray
    mismatches: list[Mismatch]

    @property
    def share(self) -> float:
        """Return the share of the kernels whose operator is known."""
        return float((self.op != NONE).mean()) if len(self.op) else 0.0


def identify(run: RunFolder, timeline: Timeline, device: int) -> Identified:
    """Return the operator behind each kernel of *timeline*.

    Steps are compared kernel name by kernel name in the order of their launches: a decoded token with the inspected
    token that is most like it, a prefill with the inspected prefill. Where they differ, what stands alike on both sides
    of the difference is identified and the rest is not; nothing is guessed.
    """
    ops = run.table("ops")
    if ops.empty:
        return Identified(np.full(len(timeline.kernels), NONE), [])
    kernels, launches, ranges = (run.table(name) for name in ("kernels", "launches", "ranges"))
    inspected = _steps(build_timeline(kernels, launches, ranges, device, "inspect"))
    starts, ends = ops["start_ns"].to_numpy(), ops["end_ns"].to_numpy()
    order = np.argsort(starts, kind="stable")
    known: dict[str, list[tuple[tuple[str, ...], np.ndarray]]] = {}
    for step in inspected:
        found = np.searchsorted(starts[order], step.issued_ns, side="right") - 1
        inside = (found >= 0) & (step.issued_ns <= ends[order][np.maximum(found, 0)])
        known.setdefault(step.phase, []).append((step.names, np.where(inside, order[np.maximum(found, 0)], NONE)))

    @cache
    def of_sequence(phase: str, names: tuple[str, ...]) -> tuple[np.ndarray, int]:
        return _aligned(names, known.get(phase, []))

    result = np.full(len(timeline.kernels), NONE)
    mismatches = []
    for step in _steps(timeline):
        op, first = of_sequence(step.phase, step.names)
        result[step.rows] = op
        missing = int((op == NONE).sum())
        if first != NONE:
            mismatches.append(Mismatch(step.phase, step.token, first, len(step.names), missing))
    return Identified(result, mismatches)


@dataclass(frozen=True)
class _Step:
    """A prefill or one decoded token: its kernels in the order of their launches."""

    phase: str
    token: int | None
    names: tuple[str, ...]
    issued_ns: np.ndarray
    rows: np.ndarray


def _steps(timeline: Timeline) -> list[_Step]:
    kernels = timeline.kernels.reset_index(drop=True)
    decode = kernels["phase"] == "decode"
    # A prefill is one step, with what generate does before its forward.
    token = kernels["token"].where(decode, NONE).fillna(NONE).astype(int)
    # A few hundred names, repeated over and over: looked up by their codes.
    coded = kernels["name"].astype("category")
    names = coded.cat.categories.to_numpy(object)[coded.cat.codes.to_numpy()] if len(kernels) else np.empty(0, object)
    steps = []
    for _, rows in kernels.groupby([kernels["instance"], token], sort=False):
        # Launches are numbered in their order; kernels of one graph launch share its number and run in their order.
        ordered = rows.sort_values(["correlation_id", "start_ns"], kind="stable")
        number = int(token[ordered.index[0]])
        steps.append(
            _Step(
                str(ordered["phase"].iloc[0]),
                None if number == NONE else number,
                tuple(names[ordered.index]),
                ordered["issued_ns"].to_numpy(),
                ordered.index.to_numpy(),
            )
        )
    return steps


def _aligned(names: tuple[str, ...], known: list[tuple[tuple[str, ...], np.ndarray]]) -> tuple[np.ndarray, int]:
    """Return the operator of each of *names*, and the position of the first difference (NONE: there is none)."""
    for sequence, op in known:
        if sequence == names:
            return op, NONE
    best: np.ndarray = np.full(len(names), NONE)
    for sequence, op in known:
        found = np.full(len(names), NONE)
        matcher = difflib.SequenceMatcher(None, sequence, names, autojunk=False)
        for left, right, size in matcher.get_matching_blocks():
            found[right : right + size] = op[left : left + size]
        if (found != NONE).sum() > (best != NONE).sum():
            best = found
    unknown = np.flatnonzero(best == NONE)
    return best, int(unknown[0]) if len(unknown) else len(names)
