"""Opens a run folder for reading. Nothing here ever writes."""

from __future__ import annotations

import copy
import re
import threading
import zlib
from collections.abc import Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llmkern.errors import RunFolderError, UsageError
from llmkern.runfolder import vocabulary as word
from llmkern.runfolder.document import decode
from llmkern.runfolder.facts import MOST_BYTES, RunFacts
from llmkern.runfolder.place import FACTS, PARTIAL, SEGMENTS
from llmkern.runfolder.schema import ADDED, DERIVED, TABLES
from llmkern.runfolder.validate import check, conform
from llmkern.runfolder.writer import crc32_of, is_locked

# Of the tables that may have ten million rows: what an analysis needs, and is kept. More is read if it is asked for.
_NEEDED = {
    "kernels": [
        *("pass", "device", "start_ns", "end_ns", "stream", "correlation_id", "name"),
        *("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z"),
    ],
    "launches": ["pass", "start_ns", "end_ns", "correlation_id", "api"],
}
_SEGMENT = re.compile(r"^(\w+)-(\d{6})(?:-([0-9a-f]{8}))?$")


class RunFolder:
    """A run folder opened for reading; :attr:`complete` is False when its recording was interrupted.

    Where *path* is not there but the folder beside it in which it was being recorded, that one is read. Raises
    RunFolderError when there is none, or it is damaged or of another schema version.
    """

    def __init__(self, path: Path) -> None:
        self.path = _recorded(path)
        file = self.path / FACTS
        try:
            if file.stat().st_size > MOST_BYTES:
                raise RunFolderError(
                    f"{file} has {file.stat().st_size / 2**20:,.0f} MiB, a run.json at most {MOST_BYTES / 2**20:.0f}: "
                    "it was not written by llmkern; give the folder that llmkern trace wrote."
                )
            self.facts: RunFacts = decode(file.read_bytes(), file)
        except (FileNotFoundError, NotADirectoryError):
            raise RunFolderError(
                f"{path} is not a run folder (no {FACTS} in it): give the folder that llmkern trace wrote."
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"{file} cannot be read ({error.strerror or error}): check its permissions."
            ) from error
        # What could not be read and was left out, in sentences.
        self.problems: list[str] = []
        self._verified: set[Path] = set()
        self._kept: dict[tuple[Any, ...], pd.DataFrame] = {}
        # Threads that want the same table wait for the first to read it.
        self._reading = {name: threading.Lock() for name in TABLES}
        self._segments = self._find_segments()
        self.problems += self._missing()

    def of_device(self, index: int) -> RunFolder:
        """Return this run as the account of its device number *index*; raises UsageError where it has no such device.

        Of a capture of several processes it then has the host's side of those that drive this device.
        """
        imported = self.facts.imported
        devices = imported.devices if imported is not None else ()
        found = next((one for one in devices if one.facts.index == index), None)
        if found is None and index == self.facts.device.index:
            return self
        if found is None:
            numbers = sorted({one.facts.index for one in devices} | {self.facts.device.index})
            raise UsageError(f"{self.path} has no GPU {index}: it has {', '.join(map(str, numbers))}.")
        view = copy.copy(self)
        # Joules belong to the board that was weighed.
        view.facts = replace(self.facts, device=self.facts.device if index == self.facts.device.index else found.facts)
        return view

    @property
    def _processes(self) -> tuple[int, ...]:
        """Return the processes whose host calls and ranges belong to this run's device; none: all."""
        if self.facts.imported is None:
            return ()
        index = self.facts.device.index
        return next((one.processes for one in self.facts.imported.devices if one.facts.index == index), ())

    @property
    def complete(self) -> bool:
        return self.facts.status == word.COMPLETE

    @property
    def status(self) -> str:
        """Return recording, complete, failed, interrupted, or killed: its recorder is gone without a word."""
        if self.facts.status == word.RECORDING and not is_locked(self.path):
            return word.KILLED
        return self.facts.status

    def has(self, name: str) -> bool:
        """Whether table *name* has any file."""
        return bool(self._files(name))

    def table(
        self, name: str, columns: list[str] | None = None, where: Mapping[str, object] | None = None
    ) -> pd.DataFrame:
        """Return table *name* (its *columns*, the rows *where* a column has a value); an absent table has no rows.

        Segments of an interrupted run are read as well, every file once: what was read is kept. Raises RunFolderError
        for a file that is damaged, lacks columns or holds values that no run has.
        """
        every = TABLES[name].names
        processes = self._processes if "process" in every else ()
        needed = every if processes else _NEEDED.get(name, every)
        read = needed if {*(columns or every), *(where or ())} <= set(needed) else every
        key = (name, len(read))
        with self._reading[name]:
            if key not in self._kept:
                self._kept[key] = self._table(name, read)
        frame = self._kept[key]
        if processes:
            frame = frame[frame["process"].isin(processes) | frame["process"].isna()]
        if columns is not None:
            # What nobody asks for is not picked out of millions of rows.
            frame = frame[list(dict.fromkeys([*columns, *(where or ())]))]
        for column, value in (where or {}).items():
            frame = rows_with(frame, column, value)
        if where:
            frame = frame.reset_index(drop=True)
        return (frame if columns is None else frame[columns]).copy(deep=False)

    def _table(self, name: str, wanted: list[str]) -> pd.DataFrame:
        parts = [self._read(file, name, wanted) for file in self._files(name)]
        if not parts:
            return TABLES[name].empty_table().select(wanted).to_pandas()
        table = pa.concat_tables(parts).unify_dictionaries()
        if len(parts) > 1:
            check(name, table, self.path / SEGMENTS / f"{name}-*.parquet")
        # Millions of rows: column by column, each freed as it is converted.
        return table.to_pandas(split_blocks=True, self_destruct=True)

    def _read(self, file: Path, name: str, wanted: list[str]) -> pa.Table:
        self._verify(file, name)
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            there = parquet.schema_arrow.names
            later = [column for column in ADDED.get(name, ()) if column not in there]
            lacking = [column for column in wanted if column not in (*there, *later)]
            if lacking:
                raise RunFolderError(
                    f"{file} lacks the columns {', '.join(lacking)}: it was not written by llmkern; restore it, or "
                    "trace the run again."
                )
            table = parquet.read(columns=[column for column in wanted if column not in later])
            for column in later:
                if column in wanted:
                    field = TABLES[name].field(column)
                    table = table.append_column(field, pa.nulls(len(table), field.type))
            table = table.select(wanted)
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
            raise RunFolderError(
                f"{file} is torn or not a Parquet file ({reason}): restore it, or trace the run again."
            ) from error
        table = conform(name, table, file)
        check(name, table, file)
        return table

    def _verify(self, file: Path, name: str) -> None:
        """Raise RunFolderError where the finished *file* is not the one that was written; once per file."""
        known = self.facts.tables.get(name)
        if known is None or file in self._verified or file.parent.name == SEGMENTS:
            return
        try:
            size, crc = file.stat().st_size, crc32_of(file)
        except OSError as error:
            raise RunFolderError(f"{file} cannot be read ({error.strerror or error}).") from error
        if (size, crc) != (known.bytes, known.crc32):
            raise RunFolderError(
                f"{file} is not what was recorded ({size:,} bytes with CRC-32 {crc:08x}; written were {known.bytes:,} "
                f"with {known.crc32:08x}): restore it, or remove it to read the run without it."
            )
        self._verified.add(file)

    def _files(self, name: str) -> list[Path]:
        merged = self.path / f"{name}.parquet"
        if name in self.facts.tables or not self._segments.get(name):
            return [merged] if merged.is_file() else []
        return self._segments[name]

    def _find_segments(self) -> dict[str, list[Path]]:
        """Return the whole segments by table; those that are torn or missing are told, but for the very last."""
        found: dict[str, list[Path]] = {}
        numbers, torn = [], []
        for file in sorted((self.path / SEGMENTS).glob("*.parquet")):
            named = _SEGMENT.match(file.stem)
            if named is None or named[1] not in TABLES:
                self.problems.append(f"{file} has no name that a segment has, and was left out.")
                continue
            numbers.append(int(named[2]))
            if named[1] in self.facts.tables:
                continue
            if _whole(file, named[3]):
                found.setdefault(named[1], []).append(file)
            else:
                torn.append((int(named[2]), file))
        last = max(numbers, default=0)
        self.problems += [
            f"{file} is torn in the middle of the recording, and was left out: up to a second of its table is missing."
            for number, file in torn
            if number != last
        ]
        # Merged tables have given up their segments; without any, numbers run on.
        holes = 0 if self.facts.tables else last - len(numbers)
        if holes > 0:
            self.problems.append(f"{holes} segments of {self.path / SEGMENTS} are missing: so is what they held.")
        return found

    def _missing(self) -> list[str]:
        """Say which tables the facts promise and the folder does not have."""
        counted = self.facts.recorder
        promised = {name for name in self.facts.tables if name not in DERIVED}
        if not self.facts.tables and self.complete and self.facts.imported is None:
            promised |= {"kernels"} if counted is not None and counted.kernels else set()
            promised |= {"energy"} if self.facts.sensors else set()
        rows = {name: table.rows for name, table in self.facts.tables.items()}
        return [
            f"Table {name} is missing{f' ({rows[name]:,} rows were recorded)' if rows.get(name) else ''}: what rests "
            "on it is left out."
            for name in sorted(promised)
            if not self._files(name)
        ]


def rows_with(frame: pd.DataFrame, column: str, value: object) -> pd.DataFrame:
    """Return the rows of *frame* with *value* in *column*: itself where all have it, no copy if they are in a row."""
    same = (frame[column] == value).to_numpy(bool)
    count = int(np.count_nonzero(same))
    if count == len(frame):
        return frame
    first, beyond = int(same.argmax()), len(same) - int(same[::-1].argmax())
    return frame.iloc[first:beyond] if beyond - first == count else frame[same]


def _recorded(path: Path) -> Path:
    if (path / FACTS).is_file() or not path.name:
        return path
    beside = sorted(path.parent.glob(f"{escape(path.name)}{PARTIAL}*"), key=lambda p: p.stat().st_mtime)
    return next((folder for folder in reversed(beside) if (folder / FACTS).is_file()), path)


def _whole(file: Path, crc: str | None) -> bool:
    try:
        if crc is not None:
            return zlib.crc32(file.read_bytes()) == int(crc, 16)
        pq.ParquetFile(file, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError):
        return False
    return True
