"""The overlay as plain tables, for anything that reads Parquet or CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from llmkern.errors import RecordingError
from llmkern.exchange.overlay import Overlay

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            file = folder / f"{name}.{kind}"
            if kind == "csv":
                table.to_csv(file, index=False)
            else:
                table.to_parquet(file, index=False)
    except OSError as error:
        raise RecordingError(f"writing to {folder} failed ({error.strerror}): choose another folder.") from error
    return folder
