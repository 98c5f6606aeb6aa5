"""What the device did in each phase: kernels with their phase and token step, busy time, gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.runfolder import RunFolder
from llmkern.runfolder.reader import rows_with
from llmkern.runfolder.vocabulary import NONE

_KERNEL_COLUMNS = ["start_ns", "end_ns", "stream", "correlation_id", "name"]
SHAPE_COLUMNS = ["grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z"]
_LAUNCH_COLUMNS = ["start_ns", "end_ns", "correlation_id", "api"]
# Keys that leave fewer entries than this empty for each of them are looked up in a table, others by sorting.
_SPARSE = 8


@dataclass(frozen=True)
class Timeline:
    """The traced generations of one device.

    ``kernels``: rows of table kernels with call (the position of their launch in the host calls by their start, NONE
    where it was not recorded), issued_ns, phase, instance (index into ``phases``) and token (NONE between token steps).
    ``phases``: one row per traced phase: phase, repeat, start_ns, end_ns, wall_ns, tokens, kernels, busy_ns, gap_ns.
    ``gaps``: start_ns, duration_ns, phase, before, after (kernel names), kernel (the position in ``kernels`` of the one
    that ended it).
    ``forwards``: the ranges of the model's forwards by their start.
    ``outside``: kernels that belong to no phase.
    """

    kernels: pd.DataFrame
    phases: pd.DataFrame
    gaps: pd.DataFrame
    forwards: pd.DataFrame
    outside: int

    def units(self, phase: str) -> int:
        """Return how many units of *phase* were traced: prefill calls, or decoded token steps."""
        return max(1, int(self.phases.loc[self.phases["phase"] == phase, "tokens"].sum()))


def read_timeline(
    run: RunFolder,
    device: int,
    pass_name: str = "time",
    calls: pd.DataFrame | None = None,
    columns: Sequence[str] = (),
) -> Timeline:
    """Return the timeline of *pass_name* of *run* on *device*, with more *columns* of its kernels.

    *calls* are its host calls, if they are read already.
    """
    return build_timeline(
        run.table("kernels", [*_KERNEL_COLUMNS, *columns], {"pass": pass_name, "device": device}),
        read_calls(run, pass_name) if calls is None else calls,
        run.table("ranges", where={"pass": pass_name}),
        device,
        pass_name,
    )


def read_calls(run: RunFolder, pass_name: str) -> pd.DataFrame:
    """Return the host calls of *pass_name* of *run* by their start: start_ns, end_ns, correlation_id, api."""
    return by_start(run.table("launches", _LAUNCH_COLUMNS, {"pass": pass_name}))


def build_timeline(
    kernels: pd.DataFrame, launches: pd.DataFrame, ranges: pd.DataFrame, device: int, pass_name: str = "time"
) -> Timeline:
    """Assign every kernel of pass *pass_name* to the phase and token step during which the host launched it.

    A kernel whose launch was not recorded (pass ``time`` records none) counts by its own start: a generation reads
    every token back, so the device has run dry where a step begins. Gaps are the time within a phase in which no
    kernel, copy or memset ran on any stream of *device*, between its first and its last.
    """
    kernels, launches, ranges = (
        rows_with(t, "pass", pass_name) if "pass" in t else t for t in (kernels, launches, ranges)
    )
    kernels = by_start(rows_with(kernels, "device", device) if "device" in kernels else kernels)
    launches = by_start(launches) if len(launches) else launches
    phases = _of_category(ranges, "phase")
    tokens = _of_category(ranges, "token")
    call, issued_ns = _issued(kernels, launches)
    instance = containing(issued_ns, phases).astype(np.int32, copy=False)
    token = containing(issued_ns, _until_next(tokens, phases))
    if "correlation_id" in kernels:
        token = _by_launch(token, call, instance, kernels["correlation_id"].to_numpy(), tokens, phases)
    kernels = _one_after_another(kernels).assign(
        call=call,
        issued_ns=issued_ns,
        instance=instance,
        phase=_phase_of(phases, instance),
        token=np.append(tokens["token"].fillna(NONE).to_numpy(np.int32), np.int32(NONE))[token],
    )
    inside = instance >= 0
    outside = len(inside) - int(np.count_nonzero(inside))
    if outside:
        kernels = kernels[inside].reset_index(drop=True)
        instance = instance[inside]
    # Nanoseconds since 1970 do not fit a float's 53 bits; nanoseconds since the first kernel do.
    base_ns = int(kernels["start_ns"].iloc[0]) if len(kernels) else 0
    start = kernels["start_ns"].to_numpy() - base_ns
    end = kernels["end_ns"].to_numpy() - base_ns
    previous_end = _previous_end(instance, start, end)
    # Arrays of millions of rows are used again and again: a new one costs more than what is computed in it.
    idle = start - previous_end
    idle[previous_end < 0] = 0
    gaps = _gaps(kernels, idle)
    np.maximum(idle, 0, out=idle)
    # Before the first kernel there is none that could still run: its previous end is below every start.
    np.maximum(previous_end, start, out=previous_end)
    busy = np.subtract(end, previous_end, out=previous_end)
    np.maximum(busy, 0, out=busy)
    count = len(phases)
    phases = phases.assign(
        wall_ns=phases["end_ns"] - phases["start_ns"],
        tokens=_tokens_in(phases),
        kernels=np.bincount(instance, minlength=count),
        busy_ns=_summed(instance, busy, count),
        gap_ns=_summed(instance, idle, count),
    )
    return Timeline(kernels, phases, gaps, tokens, outside)


def _by_launch(
    token: np.ndarray,
    call: np.ndarray,
    instance: np.ndarray,
    correlation: np.ndarray,
    tokens: pd.DataFrame,
    phases: pd.DataFrame,
) -> np.ndarray:
    """Return the token step (row of *tokens*) of each kernel: by its launch where each step is one launch of a graph.

    Then the host is ahead of the device by whole tokens, and when a kernel began says nothing where no host call was
    recorded; but the launches are as many as the steps, and in their order.
    """
    if tokens.empty or (call >= 0).any():
        return token
    own = containing(tokens["start_ns"].to_numpy(), phases)
    for number in range(len(phases)):
        steps, rows = np.flatnonzero(own == number), np.flatnonzero(instance == number)
        launches, which = np.unique(correlation[rows], return_inverse=True)
        if 1 < len(steps) == len(launches) < len(rows) and (launches != 0).all():
            token = token.copy() if token.flags.writeable else np.array(token)
            token[rows] = steps[which]
    return token


def _one_after_another(kernels: pd.DataFrame) -> pd.DataFrame:
    """Return *kernels* with those of one stream beginning where the one before them ended.

    A kernel that was launched early (programmatic dependent launch) is there before its predecessor has ended, and
    waits; what it adds to the time of its stream begins with that end.
    """
    if len(kernels) < 2 or "stream" not in kernels:
        return kernels
    start, end = kernels["start_ns"].to_numpy(), kernels["end_ns"].to_numpy()
    stream = kernels["stream"].to_numpy()
    if (start[1:] >= end[:-1]).all():
        return kernels
    first = start.copy()
    # Stream 0 is what another tool did not tell: records of several may be there.
    for number in np.unique(stream[stream != 0]):
        rows = np.flatnonzero(stream == number)
        before, late = end[rows[:-1]], rows[1:]
        # What ended before its predecessor did ran beside it (a branch of a graph).
        first[late] = np.where(before < end[late], np.maximum(start[late], before), start[late])
    return kernels.assign(start_ns=first)


def by_start(frame: pd.DataFrame) -> pd.DataFrame:
    """Return *frame* sorted by start_ns and numbered from 0."""
    starts = frame["start_ns"].to_numpy()
    # A recorder hands out nearly everything in order; ten million rows are not sorted for nothing.
    if (starts[1:] < starts[:-1]).any():
        frame = frame.iloc[np.argsort(starts, kind="stable")]
    return frame.reset_index(drop=True)


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return for each of *wanted* (integers) its first position in *keys*, NONE for one that is not there."""
    if not len(keys) or not len(wanted):
        return np.full(len(wanted), NONE)
    least, most = int(keys.min()), int(keys.max())
    if most - least < _SPARSE * len(keys) + 1_000_000 and len(keys) < np.iinfo(np.int32).max:
        table = np.full(most - least + 2, NONE, np.int32)
        # The first of equal keys is written last.
        table[(keys - least)[::-1]] = np.arange(len(keys), dtype=np.int32)[::-1]
        place = wanted - least
        if int(place.min()) < 0 or int(place.max()) > most - least:
            place[(wanted < least) | (wanted > most)] = most - least + 1
        found: np.ndarray = table[place]
        return found
    order = np.argsort(keys, kind="stable")
    position = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    return np.where(keys[order[position]] == wanted, order[position], NONE)


def _summed(instance: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Return the sum of *values* for each of *count* instances."""
    if (instance[1:] < instance[:-1]).any():
        return np.bincount(instance, values, minlength=count)
    edges = np.searchsorted(instance, np.arange(count + 1))
    sums = np.zeros(count)
    some = edges[1:] > edges[:-1]
    sums[some] = np.add.reduceat(values, edges[:-1][some]) if some.any() else 0.0
    return sums


def _of_category(ranges: pd.DataFrame, category: str) -> pd.DataFrame:
    rows = ranges[ranges["category"] == category]
    return rows.sort_values("start_ns", kind="stable").reset_index(drop=True)


def _tokens_in(phases: pd.DataFrame) -> np.ndarray:
    """Tokens that a phase computed: one in prefill, the others in decode."""
    return np.where(phases["phase"] == "prefill", 1, phases["new_tokens"].fillna(1) - 1).astype(int)


def _until_next(tokens: pd.DataFrame, phases: pd.DataFrame) -> pd.DataFrame:
    """Return the token steps lengthened to the start of the next, or to the end of their phase.

    What runs between two forwards (sampling, stopping criteria) belongs to the token before.
    """
    if tokens.empty or phases.empty:
        return tokens
    start = tokens["start_ns"].to_numpy()
    following = np.append(start[1:], np.iinfo(np.int64).max)
    own = containing(start, phases)
    phase_end = np.where(own >= 0, phases["end_ns"].to_numpy()[np.maximum(own, 0)], tokens["end_ns"].to_numpy())
    return tokens.assign(end_ns=np.minimum(following, phase_end))


def _issued(kernels: pd.DataFrame, launches: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each kernel's launch in *launches*, and the host time in ns at which it was launched."""
    own = kernels["start_ns"].to_numpy()
    if launches.empty:
        return np.full(len(own), NONE, np.int32), own
    wanted = kernels["correlation_id"].to_numpy()
    call = find(launches["correlation_id"].to_numpy(), wanted).astype(np.int32)
    # Tools write 0 where they do not know: no launch is that of another such record.
    call[wanted == 0] = NONE
    issued_ns = launches["start_ns"].to_numpy()[call]
    unknown = call < 0
    return call, np.where(unknown, own, issued_ns) if unknown.any() else issued_ns


def containing(times_ns: np.ndarray, spans: pd.DataFrame) -> np.ndarray:
    """Return the index of the span (sorted, not overlapping) that holds each time, NONE for none."""
    if spans.empty:
        return np.full(len(times_ns), NONE)
    starts, ends = spans["start_ns"].to_numpy(), spans["end_ns"].to_numpy()
    if len(times_ns) > len(spans) and (times_ns[1:] >= times_ns[:-1]).all():
        # Millions of times in order: few edges are looked for among them instead of each of them among the edges.
        first = np.searchsorted(times_ns, starts, side="left")
        beyond = np.minimum(np.searchsorted(times_ns, ends, side="right"), np.append(first[1:], len(times_ns)))
        beyond = np.maximum(first, beyond)
        lengths = np.column_stack([beyond - first, np.append(first[1:], len(times_ns)) - beyond]).ravel()
        which = np.column_stack([np.arange(len(starts)), np.full(len(starts), NONE)]).ravel()
        result: np.ndarray = np.repeat(np.append(NONE, which).astype(np.int32), np.append(first[0], lengths))
        return result
    index = np.searchsorted(starts, times_ns, side="right") - 1
    inside = (index >= 0) & (times_ns <= ends[np.maximum(index, 0)])
    return np.where(inside, index, NONE)


def _phase_of(phases: pd.DataFrame, instance: np.ndarray) -> pd.Categorical:
    names = phases["phase"].astype("category").cat
    codes = np.append(names.codes.to_numpy(), np.int8(NONE))
    return pd.Categorical.from_codes(codes[instance], categories=names.categories)


def _previous_end(instance: np.ndarray, start_ns: np.ndarray, end_ns: np.ndarray) -> np.ndarray:
    """Return for each kernel the latest end of all before it in its phase, NONE for the first; times are from 0."""
    order = None
    if (instance[1:] < instance[:-1]).any():
        order = np.argsort(instance, kind="stable")
        instance, start_ns, end_ns = instance[order], start_ns[order], end_ns[order]
    previous = np.empty(len(end_ns), np.int64)
    previous[:1] = NONE
    if len(end_ns) > 1:
        np.maximum.accumulate(end_ns[:-1], out=previous[1:])
        new = np.flatnonzero(instance[1:] != instance[:-1]) + 1
        if (previous[new] > start_ns[new]).any():
            # A phase began while the one before still ran: each is lifted above everything in those before it.
            lift = instance.astype(np.int64) * (int(end_ns.max()) + 1)
            previous[1:] = np.maximum.accumulate(end_ns + lift)[:-1] - lift[:-1]
        previous[new] = NONE
    if order is None:
        return previous
    result = np.empty_like(previous)
    result[order] = previous
    return result


def _gaps(kernels: pd.DataFrame, idle_ns: np.ndarray) -> pd.DataFrame:
    open_ = np.flatnonzero(idle_ns > 0)
    duration_ns = idle_ns[open_]
    names = kernels["name"].astype("category").cat
    codes = names.codes.to_numpy()
    # The kernel before is the one that started last before; in a phase's first kernel no gap ends.
    before, after = (pd.Categorical.from_codes(codes[at], categories=names.categories) for at in (open_ - 1, open_))
    return pd.DataFrame(
        {
            "start_ns": kernels["start_ns"].to_numpy()[open_] - duration_ns,
            "duration_ns": duration_ns.astype(float),
            "phase": kernels["phase"].array[open_],
            "before": before,
            "after": after,
            "kernel": open_,
        },
        # Columns as they are: ten million rows are not copied into one block.
        copy=False,
    )
