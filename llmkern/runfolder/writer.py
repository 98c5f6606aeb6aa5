"""Writes a run folder: segments in a folder beside the final name, merged at the end, swapped in when complete."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmkern.errors import RecordingError, UsageError
from llmkern.runfolder import vocabulary as word
from llmkern.runfolder.document import encode
from llmkern.runfolder.facts import RunFacts, TableFacts
from llmkern.runfolder.place import FACTS, LOCK, SEGMENTS, check_run_target, folder_beside, swap_in
from llmkern.runfolder.schema import TABLES, to_table

_ROWS_PER_GROUP = 1_000_000


class RunWriter:
    """Records one run for the folder *target*: facts at once, tables as segments, merged by :meth:`merge`.

    Until :meth:`publish` everything lies in :attr:`path`, a folder beside *target*; what *target* holds is not touched
    before. While this process records, a lock says so to readers. Raises UsageError where *target* may not be written
    or replaced (*force*), RecordingError when the disk refuses a write (what was written before stays readable).
    """

    def __init__(self, target: Path, facts: RunFacts, *, force: bool = False) -> None:
        check_run_target(target, force)
        self.target, self._force = target, force
        self.path = folder_beside(target)
        self.facts = facts
        # CPU time in pyarrow's own code, which lets other Python threads run.
        self.released_s = 0.0
        self._facts_lock = threading.Lock()
        self._segments = 0
        self._written: set[str] = set()
        try:
            (self.path / SEGMENTS).mkdir()
            self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error.strerror}): choose another folder with --out."
            ) from error
        with suppress(OSError):
            # Some network disks know no locks; then a reader takes a run that is being recorded for one that was
            # killed.
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.note()

    @property
    def recorded(self) -> bool:
        """Whether anything but facts was written."""
        return self._segments > 0 or bool(self._written)

    def note(self, **changes: Any) -> None:
        """Put *changes* into the facts and write run.json at once, whole or not at all."""
        with self._facts_lock:
            self.facts = replace(self.facts, **changes)
            try:
                temporary = self.path / f"{FACTS}.tmp"
                temporary.write_bytes(encode(self.facts))
                os.replace(temporary, self.path / FACTS)
            except OSError as error:
                raise _disk_error(self.path, error) from error

    def append(self, name: str, columns: Mapping[str, Any]) -> int:
        """Write one segment of table *name* and return its rows; an empty one is not written."""
        table = to_table(name, columns)
        if table.num_rows == 0:
            return 0
        with self._facts_lock:
            self._segments += 1
            number = self._segments
        sink = pa.BufferOutputStream()
        # Cheap compression only: a segment is rewritten when the run ends.
        with pq.ParquetWriter(sink, table.schema, compression="lz4", write_page_checksum=True) as file:
            begin_s = time.thread_time()
            file.write_table(table)
            self.released_s += time.thread_time() - begin_s
        content = sink.getvalue()
        # Its name says what it must hold: a reader can tell a torn segment from a short one.
        final = self.path / SEGMENTS / f"{name}-{number:06d}-{zlib.crc32(content):08x}.parquet"
        temporary = final.with_suffix(".tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, final)
        except OSError as error:
            _unlink(temporary)
            raise _disk_error(self.path, error) from error
        return table.num_rows

    def merge(self, advance: Callable[[], None] = lambda: None) -> None:
        """Merge the segments into one file per table, *advance* after each."""
        for name in TABLES:
            advance()
            parts = sorted((self.path / SEGMENTS).glob(f"{name}-*.parquet"))
            if parts:
                self._write(name, grouped(map(_read_segment, parts), _ROWS_PER_GROUP))
                for part in parts:
                    _unlink(part)
        shutil.rmtree(self.path / SEGMENTS, ignore_errors=True)

    def put(self, name: str, columns: Mapping[str, Any]) -> None:
        """Write the whole table *name* at once, replacing an older one."""
        self._write(name, [to_table(name, columns)])

    def _write(self, name: str, parts: Iterable[pa.Table]) -> None:
        file = self.path / f"{name}.parquet"
        temporary = file.with_suffix(".parquet.tmp")
        rows = 0
        try:
            with pq.ParquetWriter(temporary, TABLES[name], compression="zstd", write_page_checksum=True) as writer:
                for part in parts:
                    writer.write_table(part)
                    rows += part.num_rows
            digest = TableFacts(rows=rows, bytes=temporary.stat().st_size, crc32=crc32_of(temporary))
            os.replace(temporary, file)
        except OSError as error:
            _unlink(temporary)
            raise _disk_error(self.path, error) from error
        self._written.add(name)
        # From here on readers take the file; before, the segments.
        self.note(tables={**self.facts.tables, name: digest})

    def publish(self, **changes: Any) -> Path:
        """Call the run complete, put it in the place of the target and return that.

        What was there before is deleted last. Raises UsageError where something has come there in the meantime.
        """
        self.note(status=word.COMPLETE, **changes)
        self._unlock()
        try:
            check_run_target(self.target, self._force)
            swap_in(self.path, self.target)
        except UsageError as error:
            raise UsageError(f"{error} The finished run is in {self.path}.") from error
        except OSError as error:
            raise RecordingError(
                f"{self.target} cannot be put in place ({error.strerror or error}): the finished run is in {self.path}."
            ) from error
        self.path = self.target
        return self.target

    def give_up(self, status: str, reason: str) -> Path | None:
        """Note why the recording stopped and return the folder that holds it; None where nothing was recorded."""
        if self.facts.status == word.COMPLETE:
            return self.path
        if not self.recorded:
            self._unlock()
            shutil.rmtree(self.path, ignore_errors=True)
            return None
        # The disk may be what failed; the first error is the one to tell.
        with suppress(RecordingError):
            self.note(status=status, reason=reason)
        self._unlock()
        return self.path

    def discard(self) -> None:
        """Delete what was written, unless it is complete; the target was not touched."""
        if self.facts.status != word.COMPLETE:
            self._unlock()
            shutil.rmtree(self.path, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock >= 0:
            _unlink(self.path / LOCK)
            os.close(self._lock)
            self._lock = -1


def is_locked(folder: Path) -> bool:
    """Whether a process is recording into *folder* now."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def crc32_of(file: Path) -> int:
    """Return the CRC-32 of the content of *file*."""
    crc = 0
    with open(file, "rb") as content:
        while chunk := content.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def grouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield *tables* joined into ones of about *rows* rows, so that row groups stay large and memory small."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(t.num_rows for t in pending) >= rows:
            yield pa.concat_tables(pending).unify_dictionaries()
            pending = []
    if pending:
        yield pa.concat_tables(pending).unify_dictionaries()


def _read_segment(file: Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except pa.ArrowException as error:
        raise RecordingError(f"{file} was damaged while the run was recorded ({error}): check the disk.") from error


def _unlink(file: Path) -> None:
    # A disk that refuses a write may refuse this as well, and the write is what has to be told.
    with suppress(OSError):
        file.unlink(missing_ok=True)


def _disk_error(path: Path, error: OSError) -> RecordingError:
    try:
        free = f", {shutil.disk_usage(path if path.exists() else path.parent).free / 2**20:.0f} MiB free"
    except OSError:
        free = ""
    return RecordingError(
        f"writing to {path} failed ({error.strerror or error}{free}): free some space or choose another folder with "
        "--out."
    )
