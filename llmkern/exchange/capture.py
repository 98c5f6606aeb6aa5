"""What a capture of another tool holds, in the terms of a run folder, before it becomes one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from llmkern.errors import UsageError
from llmkern.runfolder.facts import CapturedDevice, DeviceFacts, ImportedFacts
from llmkern.runfolder.schema import TABLES
from llmkern.runfolder.vocabulary import DOMAIN, PASS, PHASES

# What a capture without any phase is taken for: one phase from its first kernel to its last.
WHOLE = "capture"
# What vLLM's workers call a step: requests in prefill and in decode, each with its tokens in brackets.
_VLLM = re.compile(r"^execute_context_(\d+)\(\d+\)_generation_(\d+)\(\d+\)$")
_TOKEN = re.compile(r"^token (\d+)$")


@dataclass(frozen=True)
class Capture:
    """Tables of a run folder, in CLOCK_REALTIME ns, all columns present.

    *imported* says which file they come from, *devices* every device with work, the one with most first, and which
    processes drive it where there are several; *missing* says in words what it did not hold, *told* in sentences what
    was done to what it holds. *rank* is the file's in a job of several.
    """

    kernels: pd.DataFrame
    launches: pd.DataFrame
    overheads: pd.DataFrame
    ranges: pd.DataFrame
    imported: ImportedFacts
    devices: tuple[CapturedDevice, ...]
    started: str
    versions: Mapping[str, str | None]
    missing: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    rank: int | None = None

    @property
    def device(self) -> DeviceFacts:
        """Return the device that the run is shown for."""
        return self.devices[0].facts


def rows_of(table: str, columns: Mapping[str, Any] | pd.DataFrame) -> pd.DataFrame:
    """Return *columns* as rows of *table*; those that are not given are empty."""
    frame = pd.DataFrame(columns).reindex(columns=TABLES[table].names)
    # Nanoseconds since 1970 do not fit a float, which a table without rows would make of others that join it.
    times = [column for column in ("start_ns", "end_ns") if column in frame and frame[column].notna().all()]
    return frame.astype(dict.fromkeys(times, np.int64))


def with_phases(capture: Capture, names: Mapping[str, str]) -> Capture:
    """Return *capture* with pass, phase, token and new_tokens filled in, ready to be attributed.

    Ranges of llmkern's own domain say what they are. Of others those called as in *names* (name → phase) are phases, by
    default those called ``prefill`` or ``decode`` and the steps of a vLLM engine; each is one unit of its phase. Where
    there is none, the time from the first kernel to the last is one phase. Raises UsageError when *names* names a range
    that is not there.
    """
    ranges = capture.ranges
    for name in names:
        if not (ranges["name"] == name).any():
            known = ", ".join(str(n) for n in ranges["name"].value_counts().index[:5]) or "none at all"
            raise UsageError(f"the capture has no range {name!r} (it has {known}): name one of them with --phase.")
    groups: dict[tuple[int, ...], list[int]] = {}
    for one in capture.devices:
        groups.setdefault(one.processes, []).append(one.facts.index)
    if len(groups) == 1:
        return _placed(capture, names)
    parts = [_placed(_of_group(capture, *group), names) for group in groups.items()]
    tables: dict[str, Any] = {
        name: pd.concat([getattr(part, name) for part in parts], ignore_index=True) for name in _TABLES
    }
    return replace(capture, **tables, told=list(dict.fromkeys(text for part in parts for text in part.told)))


_TABLES = ("kernels", "launches", "overheads", "ranges")


def _of_group(capture: Capture, processes: tuple[int, ...], devices: list[int]) -> Capture:
    """Return what of *capture* is of *devices* and of the *processes* that drive them."""
    host = {name: getattr(capture, name) for name in _TABLES[1:]}
    tables: dict[str, Any] = {name: frame[frame["process"].isin(processes)] for name, frame in host.items()}
    tables["kernels"] = capture.kernels[capture.kernels["device"].isin(devices)]
    return replace(capture, **tables, devices=tuple(d for d in capture.devices if d.facts.index in devices))


def _placed(capture: Capture, names: Mapping[str, str]) -> Capture:
    """Return *capture*, of devices that the same processes drive, with its phases."""
    ranges = capture.ranges
    own = ranges["domain"] == DOMAIN
    if not names and not (own & (ranges["category"] == "phase")).any():
        names = {name: name for name in PHASES} | _steps_of_vllm(ranges["name"])
    category, phase = ranges["category"].astype(object), ranges["phase"].astype(object)
    foreign = ranges["name"].isin(list(names)) & ~own
    category[foreign] = "phase"
    phase[foreign] = ranges["name"][foreign].map(names)
    phases = own & (category == "phase") & phase.isna()
    phase[phases] = ranges["name"][phases]
    token = pd.to_numeric(ranges["token"])
    steps = own & (category == "token") & token.isna()
    token[steps] = pd.to_numeric(ranges["name"][steps].astype(str).str.extract(_TOKEN)[0])
    ranges = ranges.assign(category=category, phase=phase, token=token)
    if not (ranges["category"] == "phase").any():
        whole = _whole(capture.kernels, capture.launches)
        if capture.devices[0].processes:
            whole = whole.assign(process=capture.devices[0].processes[0])
        ranges = pd.concat([ranges, whole], ignore_index=True)
    ranges, told = _disjoint(_counted(ranges))
    passes = ranges[ranges["category"] == PASS].sort_values("start_ns")
    tables: dict[str, Any] = {
        name: _by_pass(frame, passes)
        for name, frame in (
            ("kernels", capture.kernels),
            ("launches", capture.launches),
            ("overheads", capture.overheads),
            ("ranges", ranges),
        )
    }
    return replace(capture, **tables, told=[*capture.told, *told])


def _steps_of_vllm(names: pd.Series) -> dict[str, str]:
    """Return the phase of each range in *names* that is a step of vLLM: prefill, decode, or mixed of both."""
    found = {}
    for name in names.astype(str).unique():
        step = _VLLM.match(name)
        if step:
            context, generation = int(step[1]), int(step[2])
            found[name] = "mixed" if context and generation else "prefill" if context else "decode"
    return found


def _disjoint(ranges: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return *ranges* with no phase inside or across another, and sentences that say what became of those.

    Of ranges of one phase, one in the other (recursion, a wrapper that annotates too), the outermost counts. Where
    phases overlap otherwise (two requests in flight) the later begins when the earlier ends.
    """
    rows = ranges[ranges["category"] == "phase"].sort_values(["start_ns", "end_ns"], ascending=[True, False])
    inner: list[Any] = []
    moved: dict[Any, int | None] = {}
    until, phase = -1, None
    for index, start_ns, end_ns, name in zip(rows.index, rows["start_ns"], rows["end_ns"], rows["phase"], strict=True):
        if start_ns >= until:
            until, phase = end_ns, name
        elif end_ns <= until:
            inner.append(index)
            if name != phase:
                moved[index] = None
        else:
            moved[index] = until
            until, phase = end_ns, name
    told = []
    nested = len([index for index in inner if index not in moved])
    if nested:
        told.append(f"Of ranges of one phase inside each other the outermost counts: {nested:,} inner ones do not.")
    if moved:
        told.append(
            f"Phases overlap ({len(moved):,} of {len(rows):,}): kernels in such a time count to the phase that began "
            "first, and what each phase took by itself cannot be told."
        )
    ranges = ranges.assign(start_ns=ranges["start_ns"].astype(np.int64))
    for index, start_ns in moved.items():
        if start_ns is not None:
            ranges.loc[index, "start_ns"] = start_ns
    category = ranges["category"].where(~ranges.index.isin(inner), None)
    return ranges.assign(category=category), told


def _whole(kernels: pd.DataFrame, launches: pd.DataFrame) -> pd.DataFrame:
    """Return one phase of everything: from the first kernel's launch, which decides where it belongs, to the end."""
    start_ns, end_ns = int(kernels["start_ns"].min()), int(kernels["end_ns"].max())
    known = launches[launches["correlation_id"].isin(kernels["correlation_id"]) & (launches["correlation_id"] != 0)]
    if len(known):
        start_ns, end_ns = min(start_ns, int(known["start_ns"].min())), max(end_ns, int(known["start_ns"].max()))
    row = {"start_ns": [start_ns], "end_ns": [end_ns], "thread": [0], "name": [WHOLE], "category": ["phase"]}
    return rows_of("ranges", {**row, "phase": [WHOLE], "depth": [0]})


def _counted(ranges: pd.DataFrame) -> pd.DataFrame:
    """Return *ranges* with new_tokens: of a decode the token steps inside it and one, of anything else 1 or 2.

    A phase without steps of its own is one unit, which for all but a prefill means two new tokens.
    """
    steps = np.sort(ranges.loc[(ranges["category"] == "token") & (ranges["token"] > 0), "start_ns"].to_numpy())
    own = (ranges["category"] == "phase").to_numpy() & ranges["new_tokens"].isna().to_numpy()
    start, end = ranges["start_ns"].to_numpy(), ranges["end_ns"].to_numpy()
    inside = np.searchsorted(steps, end) - np.searchsorted(steps, start)
    counted = np.where(ranges["phase"] == "prefill", 1, np.maximum(inside, 1) + 1)
    return ranges.assign(new_tokens=np.where(own, counted, pd.to_numeric(ranges["new_tokens"])))


def _by_pass(frame: pd.DataFrame, passes: pd.DataFrame) -> pd.DataFrame:
    """Return *frame* with the pass within whose range each row starts; without such ranges everything is ``time``."""
    if passes.empty:
        return frame.assign(**{"pass": "time"})
    starts, ends = passes["start_ns"].to_numpy(), passes["end_ns"].to_numpy()
    at = np.searchsorted(starts, frame["start_ns"].to_numpy(), side="right") - 1
    inside = (at >= 0) & (frame["start_ns"].to_numpy() <= ends[np.maximum(at, 0)])
    names = passes["name"].astype(str).str.removeprefix(f"{PASS} ").to_numpy(object)
    found = frame.assign(**{"pass": names[np.maximum(at, 0)]})[inside]
    return found[found["category"] != PASS] if "category" in found else found
