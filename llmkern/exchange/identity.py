"""Whose is what: which process drives which device, and several files of one job as devices of one run.

Every process counts its launches, and every rank its devices, from its own start: where several come together these
numbers mean different things, and are made distinct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from llmkern.errors import UsageError
from llmkern.exchange.capture import Capture
from llmkern.runfolder.facts import CapturedDevice, ImportedFacts

# Clocks of host and device are aligned to less than this.
SKEW_NS = 1_000_000
# Ids beyond it would not fit when they are added up.
_MOST_ID = 2**62
_HOST, _LINKED = ("launches", "overheads", "ranges"), ("kernels", "launches")
_TABLES = ("kernels", *_HOST)


def owners(kernels: pd.DataFrame, launches: pd.DataFrame) -> dict[int, int]:
    """Return by device the process whose host calls launched most of its kernels, where any is known.

    Where several processes count alike, the one whose calls come before the kernels, and the least before them.
    """
    known = launches[launches["correlation_id"] != 0]
    if known["process"].nunique() <= 1:
        return dict.fromkeys(kernels["device"].unique().tolist(), int(known["process"].iloc[0])) if len(known) else {}
    first = known.sort_values("start_ns").drop_duplicates(["correlation_id", "process"])
    pairs = kernels[["device", "correlation_id", "start_ns"]].merge(
        first[["correlation_id", "process", "start_ns"]], on="correlation_id", suffixes=("", "_call")
    )
    delay_ns = pairs["start_ns"] - pairs["start_ns_call"]
    pairs = pairs.assign(delay_ns=delay_ns)[delay_ns >= -SKEW_NS]
    votes = pairs.groupby(["device", "process"])["delay_ns"].agg(["size", "median"]).reset_index()
    best = votes.sort_values(["size", "median"], ascending=[False, True]).drop_duplicates("device")
    return dict(zip(best["device"].tolist(), best["process"].tolist(), strict=True))


def distinct(kernels: pd.DataFrame, launches: pd.DataFrame, process: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return both with correlation ids that mean one launch each; *process* is that of each kernel, -1 if not known.

    They stay as they are where no two processes have one in common.
    """
    launched = launches["correlation_id"].to_numpy(np.int64)
    by_id = launches[launched != 0].groupby("correlation_id")["process"].nunique()
    if not (by_id > 1).any():
        return kernels, launches
    wanted = kernels["correlation_id"].to_numpy(np.int64)
    calls = pd.MultiIndex.from_arrays([launched, launches["process"].to_numpy(np.int64)])
    works = pd.MultiIndex.from_arrays([wanted, process.astype(np.int64)])
    numbers, _ = pd.factorize(calls.append(works))
    numbers = np.asarray(numbers, np.int64) + 1
    own, other = numbers[: len(launches)], numbers[len(launches) :]
    return (
        # Which of several launches it was cannot be told where the process is not known.
        kernels.assign(correlation_id=np.where((wanted == 0) | (process < 0), 0, other)),
        launches.assign(correlation_id=np.where(launched == 0, 0, own)),
    )


def merged(captures: Sequence[Capture]) -> Capture:
    """Return *captures*, files of one job, as one of several devices; raises UsageError where that cannot be.

    They come in the order of their ranks where all tell it, else in the order given.
    """
    captures = _by_rank(captures)
    indexes = [device.facts.index for capture in captures for device in capture.devices]
    alike = len(set(indexes)) < len(indexes)
    free, processes, last_id = iter(range(len(indexes))), _Numbers(), 0
    parts, devices, told = [], [], []
    for capture in captures:
        numbered = {d.facts.index: next(free) if alike else d.facts.index for d in capture.devices}
        renamed = processes.of(capture)
        parts.append(_renumbered(capture, numbered, renamed, last_id))
        last_id = max(
            [last_id, *(int(parts[-1][name]["correlation_id"].max()) for name in _LINKED if len(parts[-1][name]))]
        )
        if last_id >= _MOST_ID:
            raise UsageError("the correlation ids of these files do not fit one run: import them one by one.")
        file = capture.imported.file
        devices += [
            CapturedDevice(
                replace(d.facts, index=numbered[d.facts.index]),
                file if capture.rank is None else f"{file}, rank {capture.rank}",
                tuple(renamed[p] for p in d.processes) or tuple(sorted(set(renamed.values()))),
            )
            for d in capture.devices
        ]
        told += [f"{file}: {sentence}" for sentence in capture.told]
    files = [capture.imported.file for capture in captures]
    told.append(
        f"{len(files)} files are the devices of one run ({', '.join(files[:8])}{', …' if len(files) > 8 else ''}): "
        "each device has its own phases, and times of different files are not compared."
    )
    if alike:
        told.append("The files number their devices alike: here they are numbered in the order of the files.")
    first = captures[0]
    formats = {capture.imported.format for capture in captures}
    tables: dict[str, Any] = {
        name: pd.concat([part[name] for part in parts if len(part[name])] or [parts[0][name]], ignore_index=True)
        for name in _TABLES
    }
    return replace(
        first,
        **tables,
        imported=ImportedFacts(
            file=f"{files[0]} and {len(files) - 1} more",
            format=first.imported.format if len(formats) == 1 else "captures of several formats",
            schema=first.imported.schema,
        ),
        devices=tuple(devices),
        started=min(capture.started for capture in captures),
        missing=list(dict.fromkeys(lack for capture in captures for lack in capture.missing)),
        told=told,
    )


def _by_rank(captures: Sequence[Capture]) -> list[Capture]:
    ranks = [capture.rank for capture in captures]
    if None in ranks:
        return list(captures)
    if len(set(ranks)) < len(ranks):
        twice = next(rank for rank in ranks if ranks.count(rank) > 1)
        names = " and ".join(c.imported.file for c in captures if c.rank == twice)
        raise UsageError(f"{names} are both of rank {twice}: give one file of each rank, of one job.")
    return sorted(captures, key=lambda capture: capture.rank or 0)


def _renumbered(
    capture: Capture, devices: dict[int, int], processes: dict[int | None, int], last_id: int
) -> dict[str, pd.DataFrame]:
    """Return the tables of *capture* with other numbers for devices and processes, and ids after *last_id*."""
    found = {name: getattr(capture, name) for name in _TABLES}
    found["kernels"] = found["kernels"].assign(device=found["kernels"]["device"].map(devices))
    for name in _HOST:
        there = pd.to_numeric(found[name]["process"])
        found[name] = found[name].assign(process=there.map(processes).fillna(processes[None]).astype(np.int64))
    for name in _LINKED:
        ids = found[name]["correlation_id"].fillna(0).astype(np.int64)
        found[name] = found[name].assign(correlation_id=ids.where(ids == 0, ids + last_id))
    return found


class _Numbers:
    """Process numbers that no two files share: what a file calls a process keeps its number while that is free."""

    def __init__(self) -> None:
        self._used: set[int] = set()

    def of(self, capture: Capture) -> dict[int | None, int]:
        """Return the number of each process of *capture*; None stands for rows that name no process."""
        there = pd.concat([pd.to_numeric(getattr(capture, name)["process"]) for name in _HOST]).dropna()
        named = sorted({int(number) for number in there} | {p for d in capture.devices for p in d.processes})
        found: dict[int | None, int] = {number: self._free(number) for number in named}
        found[None] = found[named[0]] if named else self._free(1)
        return found

    def _free(self, wanted: int) -> int:
        number = wanted if wanted not in self._used else max(self._used) % (2**24 - 2) + 1
        while number in self._used:
            number += 1
        self._used.add(number)
        return number
