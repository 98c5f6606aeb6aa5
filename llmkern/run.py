"""The run folder: standard files that the recording half writes and the analysing half reads.

While a run is recorded every table grows by small Parquet segments under ``segments/``; when it ends they are merged
into one file per table. A folder that still has segments was interrupted, and what it holds stays readable.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llmkern.errors import RecordingError, RunFolderError, UsageError

SCHEMA_VERSION = 1

# Names repeat millions of times (a 7B model has ~40 kernel names for ~1300 launches a token).
_LABEL = pa.dictionary(pa.int32(), pa.string())

TABLES: dict[str, pa.Schema] = {
    "kernels": pa.schema(
        [
            ("pass", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("device", pa.int32()),
            ("context", pa.int32()),
            ("stream", pa.int64()),
            ("correlation_id", pa.int64()),
            ("graph_id", pa.int64()),
            ("graph_node_id", pa.int64()),
            ("name", _LABEL),
            ("kind", _LABEL),
            ("grid_x", pa.int32()),
            ("grid_y", pa.int32()),
            ("grid_z", pa.int32()),
            ("block_x", pa.int32()),
            ("block_y", pa.int32()),
            ("block_z", pa.int32()),
            ("registers", pa.int32()),
            ("shared_bytes", pa.int64()),
            ("copied_bytes", pa.int64()),
        ]
    ),
    "launches": pa.schema(
        [
            ("pass", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("process", pa.int32()),
            ("thread", pa.int64()),
            ("correlation_id", pa.int64()),
            ("api", _LABEL),
        ]
    ),
    "overheads": pa.schema(
        [
            ("pass", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("thread", pa.int64()),
            ("kind", _LABEL),
        ]
    ),
    "ranges": pa.schema(
        [
            ("pass", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("thread", pa.int64()),
            ("domain", _LABEL),
            ("name", _LABEL),
            ("category", _LABEL),
            ("depth", pa.int32()),
            ("phase", _LABEL),
            ("token", pa.int32()),
            ("round", pa.int32()),
            ("repeat", pa.int32()),
            ("new_tokens", pa.int32()),
        ]
    ),
    "ops": pa.schema(
        [
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("thread", pa.int64()),
            ("phase", _LABEL),
            ("token", pa.int32()),
            ("op", _LABEL),
            ("module", _LABEL),
            ("layer", pa.int32()),
            ("shapes", _LABEL),
            ("dtypes", _LABEL),
            ("signature", _LABEL),
            ("moved_bytes", pa.int64()),
            ("flops", pa.int64()),
        ]
    ),
    "replays": pa.schema(
        [
            ("signature", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("launches", pa.int64()),
            ("duty", pa.float64()),
            ("captured", pa.bool_()),
            # Filled where the window was measured in an earlier run on this board.
            ("seconds", pa.float64()),
            ("dynamic_j", pa.float64()),
            ("floor_w", pa.float64()),
        ]
    ),
    "power": pa.schema(
        [
            ("timestamp_ns", pa.int64()),
            ("device", pa.int32()),
            ("sensor", _LABEL),
            ("power_mw", pa.int64()),
            ("sm_clock_mhz", pa.int32()),
            ("temperature_c", pa.int32()),
            ("throttle", pa.int64()),
        ]
    ),
    "energy": pa.schema(
        [
            ("timestamp_ns", pa.int64()),
            ("device", pa.int32()),
            ("sensor", _LABEL),
            ("energy_mj", pa.int64()),
            ("uncertainty_ns", pa.int64()),
        ]
    ),
    "attribution": pa.schema(
        [
            ("device", pa.int32()),
            ("phase", _LABEL),
            ("unit", _LABEL),
            ("kind", _LABEL),
            ("name", _LABEL),
            ("launches", pa.float64()),
            ("duration_ns", pa.float64()),
            ("floor_j", pa.float64()),
            ("dynamic_j", pa.float64()),
            ("energy_j", pa.float64()),
            ("low_j", pa.float64()),
            ("high_j", pa.float64()),
        ]
    ),
}


def to_table(name: str, columns: Mapping[str, Any]) -> pa.Table:
    """Return *columns* (arrays, lists or scalars to repeat) as a table of the schema of *name*.

    Raises KeyError when a column of the schema is missing.
    """
    schema = TABLES[name]
    rows = max((len(v) for v in columns.values() if hasattr(v, "__len__") and not isinstance(v, str)), default=0)
    arrays = []
    for field in schema:
        value = columns[field.name]
        if isinstance(value, str) or not hasattr(value, "__len__"):
            value = pa.repeat(pa.scalar(value, _plain(field.type)), rows)
        elif not isinstance(value, pa.Array | pa.ChunkedArray):
            value = pa.array(value, None if isinstance(value, pd.Categorical) else _plain(field.type))
        arrays.append(value if value.type == field.type else value.cast(field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


class RunWriter:
    """Writes a run folder: ``run.json`` at once, tables as segments, merged by :meth:`finish`.

    Raises UsageError when the folder exists and *force* is not given, RecordingError when the disk refuses a write
    (what was written before stays readable).
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], *, force: bool = False) -> None:
        self.path = path
        if path.exists():
            if not force:
                raise UsageError(
                    f"{path} exists and is not overwritten: choose another folder with --out, or add --force."
                )
            if any(path.iterdir()) and not (path / "run.json").exists():
                raise UsageError(
                    f"{path} holds files but no run.json, so it is not a run folder and --force leaves it alone: "
                    "choose another folder with --out."
                )
            shutil.rmtree(path)
        self._lock = threading.Lock()
        # CPU time in pyarrow's own code, which lets other Python threads run.
        self.released_s = 0.0
        self._segment_count = 0
        self.facts: dict[str, Any] = {"schema": SCHEMA_VERSION, "status": "recording", **facts}
        try:
            (path / "segments").mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be created ({error.strerror}): choose another folder with --out."
            ) from error
        self.write_facts()

    def write_facts(self, **more: Any) -> None:
        """Merge *more* into the facts and write ``run.json`` atomically."""
        with self._lock:
            self.facts.update(more)
            text = json.dumps(self.facts, indent=2, default=_jsonable)
            try:
                temporary = self.path / "run.json.tmp"
                temporary.write_text(text + "\n")
                os.replace(temporary, self.path / "run.json")
            except OSError as error:
                raise _disk_error(self.path, error) from error

    def append(self, name: str, columns: Mapping[str, Any]) -> int:
        """Write one segment of table *name* and return its rows; an empty one is not written."""
        table = to_table(name, columns)
        if table.num_rows == 0:
            return 0
        with self._lock:
            self._segment_count += 1
            final = self.path / "segments" / f"{name}-{self._segment_count:06d}.parquet"
        temporary = final.with_suffix(".tmp")
        try:
            # Cheap compression only: a segment is rewritten when the run ends.
            with pq.ParquetWriter(temporary, table.schema, compression="lz4") as file:
                begin_s = time.thread_time()
                file.write_table(table)
                self.released_s += time.thread_time() - begin_s
            os.replace(temporary, final)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _disk_error(self.path, error) from error
        return table.num_rows

    def write_table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Write the whole table *name* at once, without segments (for results such as the attribution)."""
        write_table(self.path, name, columns)

    def finish(self, advance: Callable[[], None] = lambda: None, status: str = "complete", **more: Any) -> None:
        """Merge the segments into one file per table, *advance* after each, and record *status* in ``run.json``."""
        segments = self.path / "segments"
        for name, schema in TABLES.items():
            advance()
            parts = sorted(segments.glob(f"{name}-*.parquet"))
            if not parts:
                continue
            merged = self.path / f"{name}.parquet.tmp"
            try:
                with pq.ParquetWriter(merged, schema, compression="zstd") as writer:
                    for group in grouped(map(pq.read_table, parts), rows=1_000_000):
                        writer.write_table(group)
                os.replace(merged, self.path / f"{name}.parquet")
                for part in parts:
                    part.unlink()
            except OSError as error:
                merged.unlink(missing_ok=True)
                raise _disk_error(self.path, error) from error
        shutil.rmtree(segments, ignore_errors=True)
        self.write_facts(status=status, **more)


def write_table(folder: Path, name: str, columns: Mapping[str, Any]) -> None:
    """Write table *name* of a run folder as one file, replacing an older one."""
    temporary = folder / f"{name}.parquet.tmp"
    try:
        pq.write_table(to_table(name, columns), temporary, compression="zstd")
        os.replace(temporary, folder / f"{name}.parquet")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(folder, error) from error


def grouped(tables: Iterable[pa.Table], rows: int) -> Iterable[pa.Table]:
    """Yield *tables* joined into ones of about *rows* rows, so that row groups stay large and memory small."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        if sum(t.num_rows for t in pending) >= rows:
            yield pa.concat_tables(pending).unify_dictionaries()
            pending = []
    if pending:
        yield pa.concat_tables(pending).unify_dictionaries()


def _disk_error(path: Path, error: OSError) -> RecordingError:
    try:
        free = f", {shutil.disk_usage(path if path.exists() else path.parent).free / 2**20:.0f} MiB free"
    except OSError:
        free = ""
    return RecordingError(
        f"writing to {path} failed ({error.strerror or error}{free}): free some space or choose another folder with "
        "--out; what was recorded before can be read with 'llmkern report'."
    )


def _jsonable(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong in run.json")


class RunFolder:
    """A run folder opened for reading; :attr:`complete` is False when its recording was interrupted.

    Raises RunFolderError when it is missing, torn or of another schema version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / "run.json"
        try:
            self.facts: dict[str, Any] = json.loads(file.read_text())
        except FileNotFoundError:
            raise RunFolderError(
                f"{path} is not a run folder (no run.json in it): give the folder that llmkern trace wrote."
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RunFolderError(
                f"{file} cannot be read ({error}): the recording was cut off at its start; trace the run again."
            ) from error
        version = self.facts.get("schema") if isinstance(self.facts, dict) else None
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            raise RunFolderError(
                f"{path} has run-folder schema {version}, this llmkern reads schema {SCHEMA_VERSION}: "
                f"{'update llmkern' if newer else 'trace the run again'}."
            )

    @property
    def complete(self) -> bool:
        return self.facts.get("status") == "complete"

    def has(self, name: str) -> bool:
        """Whether table *name* has any file."""
        return bool(self._files(name))

    def table(
        self, name: str, columns: list[str] | None = None, where: Mapping[str, object] | None = None
    ) -> pd.DataFrame:
        """Return table *name* (its *columns*, the rows *where* a column has a value); an absent table has no rows.

        Segments of an interrupted run are read as well; a torn last segment is left out. Raises RunFolderError for a
        file that is not Parquet or lacks columns.
        """
        parts = []
        chosen = [(column, "==", value) for column, value in (where or {}).items()] or None
        for file in self._files(name):
            try:
                parts.append(pq.read_table(file, columns=columns, filters=chosen))
            except (pa.ArrowInvalid, OSError) as error:
                if file.parent.name == "segments":
                    continue
                raise RunFolderError(
                    f"{file} is torn or not a Parquet file ({error}): trace the run again, or read the other tables."
                ) from error
        wanted = columns or TABLES[name].names
        if not parts:
            empty = TABLES[name].empty_table().select(wanted)
            return empty.to_pandas()
        table = pa.concat_tables(parts).unify_dictionaries()
        missing = [c for c in wanted if c not in table.column_names]
        if missing:
            raise RunFolderError(
                f"{self.path / name}.parquet lacks the columns {', '.join(missing)}: it was not written by llmkern "
                f"schema {SCHEMA_VERSION}."
            )
        # Millions of rows: column by column, each freed as it is converted.
        return table.to_pandas(split_blocks=True, self_destruct=True)

    def _files(self, name: str) -> list[Path]:
        merged = self.path / f"{name}.parquet"
        # Merging replaces the file before it deletes the segments: where both exist, the segments are in it already.
        return [merged] if merged.exists() else sorted((self.path / "segments").glob(f"{name}-*.parquet"))
