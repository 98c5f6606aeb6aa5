"""The overlay as plain tables, for anything that reads Parquet or CSV."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd

from llmkern.errors import RecordingError, UsageError
from llmkern.exchange.overlay import Overlay
from llmkern.runfolder.place import folder_beside, swap_in

TABLE_NAMES = ("kernels", "gaps", "launches", "ranges", "counters")
_COUNTERS = ["counter", "unit", "timestamp_ns", "value"]


def write_parquet(overlay: Overlay, path: Path) -> Path:
    """Write kernels, gaps, launches, ranges and counters as Parquet files in the folder *path* and return it."""
    return _write(overlay, path, "parquet")


def write_csv_tables(overlay: Overlay, path: Path) -> Path:
    """Write the same as CSV files in the folder *path* and return it."""
    return _write(overlay, path, "csv")


def _write(overlay: Overlay, folder: Path, kind: str) -> Path:
    counters = [
        pd.DataFrame({"counter": c.name, "unit": c.unit, "timestamp_ns": c.timestamp_ns, "value": c.value})
        for c in overlay.counters
    ]
    tables = {
        "kernels": overlay.kernels,
        "gaps": overlay.gaps,
        "launches": overlay.launches,
        "ranges": overlay.ranges,
        "counters": pd.concat(counters, ignore_index=True) if counters else pd.DataFrame(columns=_COUNTERS),
    }
    beside = folder_beside(folder)
    try:
        for name, table in tables.items():
            file = beside / f"{name}.{kind}"
            if kind == "csv":
                table.to_csv(file, index=False)
            else:
                table.to_parquet(file, index=False)
        swap_in(beside, folder)
    except OSError as error:
        raise RecordingError(f"writing to {folder} failed ({error.strerror}): choose another folder.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def check_table_folder(folder: Path, *, force: bool) -> None:
    """Refuse *folder* where something is that may not be replaced; raises UsageError."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another folder with --out.")
    if not force:
        raise UsageError(f"{folder} exists and is not overwritten: choose another name with --out, or add --force.")
    own = {f"{name}.{kind}" for name in TABLE_NAMES for kind in ("parquet", "csv")}
    foreign = next((entry.name for entry in sorted(folder.iterdir()) if entry.name not in own), None)
    if foreign is not None:
        raise UsageError(
            f"{folder} holds {foreign}, which is no export of llmkern, so --force leaves all of it alone: choose "
            "another folder with --out."
        )
