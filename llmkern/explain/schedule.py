"""A model of host and device that runs a recorded phase again with something changed.

The host issues kernels one after the other, each after the time it took to come to it; it may have to wait for the
device before. The device starts a kernel when it was issued and the one before is done. That is all there is, and with
the recorded times it gives back the recorded latency; with other times, what the latency would be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from llmkern.attribute.time.host_calls import WAITS, HostTrace
from llmkern.attribute.time.timeline import containing
from llmkern.runfolder.vocabulary import NONE

# Enough kernels for a few token steps, few enough to be run again a hundred times.
MOST_KERNELS = 12_000
# Where a run has no kernels that follow each other closely: what an H100 needs from one to the next in a queue.
GAP_NS = 1_000.0


@dataclass(frozen=True)
class Schedule:
    """Some steps of one phase in the order of their launches; arrays per kernel, times in ns.

    ``launched``: by a call of its own, not as part of a graph. ``before_ns`` and ``after_ns``: the host's time from the
    launch before to this one, up to and after a wait; ``call_ns``: in the launch itself. ``waits``: whether the host
    waited for the device in between, and ``return_ns`` how long after the device was done it went on. ``latency_ns``
    from a launch to the start on an idle device, ``gap_ns`` between kernels that are queued. ``op``: row of ops;
    ``name``: code of the kernel's name; ``inside``: in a forward, not between two. ``waits_inside``: every wait before
    the kernel was in a forward too, which its launch alone does not say. ``lead_ns``: the host's time from the phase's
    start to what is before its first launch, ``trail_ns``: from when it and the device were done with the last kernel
    to the phase's end.
    """

    steps: int
    op: np.ndarray
    name: np.ndarray
    inside: np.ndarray
    launched: np.ndarray
    before_ns: np.ndarray
    after_ns: np.ndarray
    call_ns: np.ndarray
    waits: np.ndarray
    return_ns: np.ndarray
    duration_ns: np.ndarray
    waits_inside: np.ndarray
    latency_ns: float
    gap_ns: float
    lead_ns: float = 0.0
    trail_ns: float = 0.0

    def latency_s(self, host_factor: float = 1.0) -> float:
        """Return the seconds per step, with the host's own times multiplied by *host_factor*."""
        if not len(self.op):
            return 0.0
        before, after, call = (ns * host_factor for ns in (self.before_ns, self.after_ns, self.call_ns))
        # Between two waits the host only adds up its own times, and the device is as late as the kernel that held it up
        # most; so each stretch from one wait to the next is a sum and a maximum, and only these follow each other.
        at_launch = np.cumsum(before + after) + np.append(0.0, np.cumsum(call)[:-1])
        queued = np.cumsum(self.duration_ns + self.gap_ns)
        held_up = np.where(self.launched, at_launch + self.latency_ns + self.duration_ns - queued, -np.inf)
        first = np.flatnonzero(np.append(True, self.waits[1:]))
        last = np.append(first[1:], len(queued)) - 1
        back = np.where(self.waits, self.return_ns, 0.0)[first]
        stretches = (
            before[first],
            back,
            after[first] - at_launch[first],
            np.maximum.reduceat(held_up, first),
            queued[last],
            at_launch[last] + call[last],
        )
        host, device, ahead = self.lead_ns * host_factor, 0.0, 0.0
        for until, returned, offset, most, done, issued in zip(*(s.tolist() for s in stretches), strict=True):
            offset += max(host + until, device) + returned
            ahead = max(ahead, offset + most)
            device = ahead + done
            host = offset + issued
        return (max(host, device) + self.trail_ns * host_factor) / 1e9 / self.steps

    def host_times(self, factor: float) -> Schedule:
        """Return the schedule with all of the host's own times multiplied by *factor*; waits keep theirs."""
        fields = ("before_ns", "after_ns", "call_ns", "lead_ns", "trail_ns")
        return replace(self, **{field: getattr(self, field) * factor for field in fields})

    def without(self, gone: np.ndarray) -> Schedule:
        """Return the schedule without the kernels *gone*, their host time and their waits."""
        kept = ~gone
        fields = (
            "op",
            "name",
            "inside",
            "launched",
            "before_ns",
            "after_ns",
            "call_ns",
            "waits",
            "return_ns",
            "duration_ns",
            "waits_inside",
        )
        return replace(self, **{field: getattr(self, field)[kept] for field in fields})


def schedule(trace: HostTrace, phase: str) -> Schedule | None:
    """Return a few steps of *phase* from the middle of what was traced, None where it was not."""
    kernels, phases = trace.timeline.kernels, trace.timeline.phases
    instances = np.flatnonzero((phases["phase"] == phase).to_numpy())
    rows = np.flatnonzero((kernels["instance"] == instances[0]).to_numpy()) if len(instances) else np.empty(0, int)
    if not len(rows):
        return None
    steps = 1
    if phase == "decode":
        token = kernels["token"].to_numpy()[rows]
        known = np.unique(token[token != NONE])
        # A capture of another tool may know no steps: then its first decode is one.
        if len(known):
            steps = int(np.clip(MOST_KERNELS * len(known) // len(rows), 1, len(known)))
            chosen = known[(len(known) - steps) // 2 :][:steps]
            rows = rows[np.isin(token, chosen)]
    correlation = kernels["correlation_id"].to_numpy()[rows]
    rows = rows[np.lexsort((kernels["start_ns"].to_numpy()[rows], correlation))]
    correlation = kernels["correlation_id"].to_numpy()[rows]
    calls = trace.calls
    call = kernels["call"].to_numpy()[rows]
    if (call < 0).mean() > 0.5:
        return None
    start, end = (kernels[c].to_numpy()[rows].astype(float) for c in ("start_ns", "end_ns"))
    base = start[0]
    start, end = start - base, end - base
    # One launch of a graph issues many kernels: the host pays for the first of them.
    new = np.append(True, np.diff(correlation) != 0) & (call >= 0)
    issue = np.where(call >= 0, calls["start_ns"].to_numpy()[call] - base, start)
    done = np.where(call >= 0, calls["end_ns"].to_numpy()[call] - base, start)
    issue, done = np.maximum.accumulate(issue), np.maximum.accumulate(done)
    previous = np.append(issue[0], done[:-1])
    own = np.where(new, np.maximum(0.0, issue - previous), 0.0)
    forwards = trace.timeline.forwards
    waits, waits_inside, before, back = _waits(calls, issue, previous, own, end, base, forwards)
    # The middle steps of a phase have no edges of their own.
    whole = len(rows) == (kernels["instance"] == instances[0]).sum()
    edges = [phases[c].iloc[instances[0]] - base for c in ("start_ns", "end_ns")]
    lead = max(0.0, issue[0] - edges[0]) if whole else 0.0
    trail = max(0.0, edges[1] - max(done[-1], float(end.max()))) if whole else 0.0
    idle = np.append(True, issue[1:] > np.maximum.accumulate(end)[:-1])
    queued = np.append(False, done[1:] < end[:-1])
    close = (start[1:] - np.maximum.accumulate(end)[:-1])[queued[1:]]
    return Schedule(
        steps,
        trace.identified.op[rows] if trace.identified is not None else np.full(len(rows), NONE),
        kernels["name"].astype("category").cat.codes.to_numpy()[rows],
        containing((issue + base).astype(np.int64), forwards) != NONE,
        new,
        np.where(waits, before, 0.0),
        np.where(waits, np.maximum(0.0, own - before - back[1]), own),
        np.where(new, done - issue, 0.0),
        waits,
        back[0],
        end - start,
        waits_inside,
        float(np.median(np.maximum(0.0, (start - issue)[idle]))),
        float(np.median(np.maximum(0.0, close))) if len(close) >= 20 else GAP_NS,
        lead,
        trail,
    )


def _waits(
    calls: pd.DataFrame,
    issue: np.ndarray,
    previous: np.ndarray,
    own: np.ndarray,
    end: np.ndarray,
    base: float,
    forwards: pd.DataFrame,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return which kernels the host waited before and which of them only in a forward.

    Then its time up to the wait, and (return, whole time of the wait).
    """
    names = calls["api"].astype("category").cat
    blocking = np.array([bool(re.search(WAITS, str(name))) for name in names.categories], bool)
    rows = calls[blocking[names.codes.to_numpy()]] if len(blocking) else calls.iloc[:0]
    begin, finish = (rows[c].to_numpy() - base for c in ("start_ns", "end_ns"))
    place = np.searchsorted(issue, begin, side="right")
    fits = (place > 0) & (place < len(issue))
    in_forward = containing(rows["start_ns"].to_numpy(np.int64), forwards) != NONE
    waits, inside = np.zeros(len(issue), bool), np.ones(len(issue), bool)
    before, returned, whole = (np.zeros(len(issue)) for _ in range(3))
    latest = np.maximum.accumulate(end)
    for i, first, last, within in zip(place[fits], begin[fits], finish[fits], in_forward[fits], strict=True):
        if not waits[i]:
            before[i] = max(0.0, first - previous[i])
        waits[i] = True
        inside[i] &= within
        whole[i] += last - first
        returned[i] += last - min(last, max(first, latest[i - 1]))
    before = np.minimum(before, own)
    return waits, waits & inside, before, (returned, np.minimum(whole, own - before))
