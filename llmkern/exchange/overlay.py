"""What llmkern knows of a run, laid over its timeline: one model for every tool that it is written for.

Joules are those of the traced run as it was: a kernel draws the power of its operator for as long as it ran, a gap the
idle floor. The recorder lengthens gaps, so that their sum is above what the account says of the weighed run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.time.operators import Identified
from llmkern.attribute.time.per_unit import labelled
from llmkern.attribute.time.timeline import build_timeline, by_start, read_calls
from llmkern.errors import UsageError
from llmkern.runfolder.facts import RunFacts
from llmkern.runfolder.schema import TABLES
from llmkern.runfolder.vocabulary import DOMAIN, NONE, PASS, TRACED

PASSES = TRACED
_POWERS = {
    "samples": "power, driver's samples",
    "instant": "power, instant",
    "average": "power, 1 s average",
    "memory_average": "HBM power, 1 s average",
}
# A cumulative counter is drawn, not read to the last digit.
_MOST_POINTS = 2_000


@dataclass(frozen=True)
class Counter:
    """Values of *unit* over time; times in ns."""

    name: str
    unit: str
    timestamp_ns: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class Overlay:
    """Kernels, gaps, host calls, ranges and counters of the traced passes; times in CLOCK_REALTIME ns.

    ``kernels``: columns of table kernels and phase, instance (which prefill or decode of its pass), token, op, module,
    layer, what (the kind of work), energy_j.
    ``gaps``: pass, start_ns, end_ns, phase, token, cause, op, module, what (of the kernel that ended it), energy_j.
    ``launches``, ``overheads`` and ``ranges``: as in the run folder; a range of category ``pass`` holds each pass.
    """

    title: str
    device: dict[str, Any]
    process: int
    kernels: pd.DataFrame
    gaps: pd.DataFrame
    launches: pd.DataFrame
    overheads: pd.DataFrame
    ranges: pd.DataFrame
    counters: list[Counter]

    @property
    def start_ns(self) -> int:
        """Return the start of the earliest event."""
        frames = (self.kernels, self.launches, self.ranges)
        return min(int(frame["start_ns"].min()) for frame in frames if len(frame))

    @property
    def end_ns(self) -> int:
        frames = (self.kernels, self.launches, self.ranges)
        return max(int(frame["end_ns"].max()) for frame in frames if len(frame))


def overlay(attribution: Attribution, passes: tuple[str, ...] = PASSES) -> Overlay:
    """Return the overlay of the *passes* that were recorded; raises UsageError when none of them has a kernel."""
    run, index = attribution.run, attribution.run.facts.device.index
    ops = attribution.ops
    watts = _watts(attribution)
    kernels, gaps, launches, overheads, ranges, counters = [], [], [], [], [], []
    for name in passes:
        rows = by_start(run.table("kernels", where={"pass": name, "device": index}))
        if rows.empty:
            continue
        calls = read_calls(run, name)
        marks = run.table("ranges", where={"pass": name})
        timeline = build_timeline(rows.assign(row=np.arange(len(rows))), calls, marks, index, name)
        identified, caused = _known(attribution, name)
        op = identified.op if identified is not None else np.full(len(timeline.kernels), NONE)
        own = _kernels(rows, timeline.kernels, op, ops, watts)
        kernels.append(own)
        gaps.append(_gaps(timeline.gaps if caused is None else caused, timeline.kernels, own, attribution))
        launches.append(run.table("launches", where={"pass": name}))
        overheads.append(run.table("overheads", where={"pass": name}))
        ranges += [_pass_range(name, (rows, marks, launches[-1])), marks]
        counters += _energies(own, gaps[-1], name)
    if not kernels:
        raise UsageError(f"{run.path} has no kernel in the passes {', '.join(passes)}: nothing was traced.")
    parts = {"kernels": kernels, "gaps": gaps, "launches": launches, "overheads": overheads, "ranges": ranges}
    tables = {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()}
    device = {name: value for name, value in asdict(run.facts.device).items() if value is not None}
    found = Overlay(_title(run.facts), device, _process(launches), **tables, counters=counters)
    return replace(found, counters=[*_powers(run.table("power"), index, found), *counters])


def cut(found: Overlay, phase: str | None = None, tokens: tuple[int, int] | None = None) -> Overlay:
    """Return what of *found* belongs to *phase* and token steps *tokens* (first, last); UsageError where none does."""
    if phase is None and tokens is None:
        return found

    def belongs(frame: pd.DataFrame) -> np.ndarray:
        keep = np.ones(len(frame), bool)
        if phase is not None:
            keep &= (frame["phase"] == phase).to_numpy()
        if tokens is not None:
            keep &= frame["token"].between(*tokens).to_numpy()
        return keep

    kernels, gaps = found.kernels[belongs(found.kernels)], found.gaps[belongs(found.gaps)]
    if kernels.empty:
        told = [] if phase is None else [f"phase {phase}"]
        told += [] if tokens is None else [f"tokens {tokens[0]}:{tokens[1]}"]
        there = ", ".join(str(p) for p in found.kernels["phase"].dropna().unique())
        last = found.kernels["token"].max()
        raise UsageError(f"no kernel belongs to {' and '.join(told)}: the run has {there}, tokens up to {last:.0f}.")
    spans = [_span(own, found.launches) for _, own in kernels.groupby(["pass", "instance"], observed=True)]

    def overlaps(start_ns: np.ndarray, end_ns: np.ndarray) -> np.ndarray:
        keep = np.zeros(len(start_ns), bool)
        for first, last in spans:
            keep |= (start_ns <= last) & (end_ns >= first)
        return keep

    frames = {name: getattr(found, name) for name in ("launches", "overheads", "ranges")}
    frames = {
        name: frame[overlaps(frame["start_ns"].to_numpy(), frame["end_ns"].to_numpy())]
        for name, frame in frames.items()
    }
    counters = []
    for counter in found.counters:
        keep = overlaps(counter.timestamp_ns, counter.timestamp_ns)
        counters.append(replace(counter, timestamp_ns=counter.timestamp_ns[keep], value=counter.value[keep]))
    return replace(found, kernels=kernels, gaps=gaps, **frames, counters=counters)


def _span(kernels: pd.DataFrame, launches: pd.DataFrame) -> tuple[int, int]:
    """Return from the first launch of *kernels*, or their own start where none is known, to their end."""
    issued = launches[launches["correlation_id"].isin(kernels["correlation_id"])]["start_ns"]
    start_ns = int(kernels["start_ns"].min())
    return min(start_ns, int(issued.min())) if len(issued) else start_ns, int(kernels["end_ns"].max())


def _title(facts: RunFacts) -> str:
    if facts.imported is not None:
        return facts.imported.file
    name = facts.model.name if facts.model is not None else facts.options.model
    return f"{name} {facts.options.precision}".strip()


def _process(launches: list[pd.DataFrame]) -> int:
    known = [int(frame["process"].iloc[0]) for frame in launches if len(frame)]
    return known[0] or 1 if known else 1


def _known(attribution: Attribution, name: str) -> tuple[Identified | None, pd.DataFrame | None]:
    """Return the operators of the kernels of pass *name*, and its gaps by cause where its host calls are known."""
    trace = attribution.host_trace
    if trace is not None and (name == "calls" or trace.timeline is attribution.timeline):
        return trace.identified, trace.caused
    return attribution.identified if name == "time" else None, None


def _watts(attribution: Attribution) -> pd.DataFrame:
    """Return the mean W of each kernel name and operator of each phase while it runs."""
    found = []
    for phase in attribution.accounts:
        rows = attribution.split(phase, ["op_index", "name"])
        watts = rows["energy_j"] / (rows["duration_ns"] / 1e9)
        found.append(rows[["op_index", "name"]].assign(phase=phase, name=rows["name"].astype(object), watts=watts))
    if not found:
        nothing = pd.DataFrame({"op_index": [], "name": [], "phase": [], "watts": []})
        return nothing.astype({"name": object, "phase": object})
    return pd.concat(found, ignore_index=True)


def _kernels(
    rows: pd.DataFrame, placed: pd.DataFrame, op: np.ndarray, ops: pd.DataFrame, watts: pd.DataFrame
) -> pd.DataFrame:
    """Return *rows* with phase, token, what is known of their operator, and energy_j; *placed* are those in a phase."""
    # What is known depends on operator and name alone, of which there are few.
    codes, names = pd.factorize(placed["name"].astype(object))
    key, found = pd.factorize(pd.Series(op.astype(np.int64) * (len(names) + 1) + codes))
    distinct = np.asarray(found, np.int64)
    own = pd.Categorical(np.asarray(names, object)[distinct % (len(names) + 1)])
    labels = labelled(ops, distinct // (len(names) + 1), own).astype({c: object for c in ("op", "module", "kind")})
    known = labels[["op", "module", "layer", "kind"]].rename(columns={"kind": "what"}).iloc[key].reset_index(drop=True)
    power = pd.DataFrame(
        {"phase": placed["phase"].astype(object).to_numpy(), "op_index": op, "name": placed["name"].astype(object)}
    ).merge(watts, how="left", on=["phase", "op_index", "name"])["watts"]
    seconds = (placed["end_ns"] - placed["start_ns"]).to_numpy() / 1e9
    known = known.assign(
        phase=placed["phase"].astype(object).to_numpy(),
        instance=placed["instance"].to_numpy(),
        token=placed["token"].to_numpy(),
        energy_j=power.to_numpy() * seconds,
    )
    known.index = pd.Index(placed["row"].to_numpy())
    # What ran between two phases keeps its row, without a name for it.
    return rows.join(known)


def _gaps(gaps: pd.DataFrame, placed: pd.DataFrame, own: pd.DataFrame, attribution: Attribution) -> pd.DataFrame:
    ended_by = own.loc[placed["row"].to_numpy()[gaps["kernel"].to_numpy()]]
    floor_w = {
        phase: np.nan if account.floor_w is None else account.floor_w.value
        for phase, account in attribution.accounts.items()
    }
    phase = gaps["phase"].astype(object)
    return pd.DataFrame(
        {
            "pass": ended_by["pass"].astype(object).to_numpy(),
            "start_ns": gaps["start_ns"].to_numpy(),
            # In whole numbers: a float holds times since 1970 to 256 ns only.
            "end_ns": gaps["start_ns"].to_numpy(np.int64) + gaps["duration_ns"].to_numpy(np.int64),
            "phase": phase.to_numpy(),
            "token": placed["token"].to_numpy()[gaps["kernel"].to_numpy()],
            "cause": gaps["cause"].astype(object).to_numpy() if "cause" in gaps else "idle",
            "op": ended_by["op"].to_numpy(),
            "module": ended_by["module"].to_numpy(),
            "what": ended_by["what"].to_numpy(),
            "energy_j": phase.map(floor_w).to_numpy(float) * gaps["duration_ns"].to_numpy() / 1e9,
        }
    )


def _pass_range(name: str, parts: tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]) -> pd.DataFrame:
    """Return the range of pass *name* around its kernels, ranges and host calls (*parts*)."""
    start_ns = min(int(frame["start_ns"].min()) for frame in parts if len(frame))
    end_ns = max(int(frame["end_ns"].max()) for frame in parts if len(frame))
    marks = parts[1]
    row = {"pass": name, "start_ns": start_ns, "end_ns": end_ns, "domain": DOMAIN, "name": f"{PASS} {name}"}
    thread = int(marks["thread"].iloc[0]) if len(marks) else 0
    return pd.DataFrame([{**row, "category": PASS, "thread": thread, "depth": 0}]).reindex(
        columns=TABLES["ranges"].names
    )


def _powers(power: pd.DataFrame, device: int, found: Overlay) -> list[Counter]:
    power = power[(power["device"] == device) & power["timestamp_ns"].between(found.start_ns, found.end_ns)]
    counters = []
    for sensor, name in _POWERS.items():
        rows = power[(power["sensor"] == sensor) & power["power_mw"].notna()].sort_values("timestamp_ns")
        if len(rows):
            watts = rows["power_mw"].to_numpy(float) / 1e3
            counters.append(Counter(name, "W", rows["timestamp_ns"].to_numpy(np.int64), watts))
    return counters


def _energies(kernels: pd.DataFrame, gaps: pd.DataFrame, pass_name: str) -> list[Counter]:
    """Return the joules spent in each phase so far, kernel by kernel and gap by gap."""
    counters = []
    columns = ["phase", "end_ns", "energy_j"]
    spent = pd.concat([kernels[columns], gaps[columns]], ignore_index=True).dropna()
    for phase, rows in spent.groupby("phase", sort=False):
        rows = rows.sort_values("end_ns")
        total = rows["energy_j"].cumsum().to_numpy()
        step = max(1, len(rows) // _MOST_POINTS)
        at = np.unique(np.append(np.arange(0, len(rows), step), len(rows) - 1))
        name = f"energy of {phase} in pass {pass_name}"
        counters.append(Counter(name, "J", rows["end_ns"].to_numpy(np.int64)[at], total[at]))
    return counters
