"""Replays that this board has done before, kept per user: what an operator adds does not change from run to run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from llmkern.record.graphs import is_graph

COLUMNS = ["key", "signature", "duty", "launches", "seconds", "dynamic_j", "floor_w"]


def cache_file() -> Path:
    """Return the user's cache file (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llmkern" / "replays.parquet"


def cache_key(device: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    """Return what the joules of an operator depend on besides itself: board, driver, libraries."""
    parts = {k: device.get(k) for k in ("uuid", "name", "driver_version", "power_limit_mw")}
    parts |= {k: versions.get(k) for k in ("torch", "bitsandbytes", "triton")}
    return json.dumps(parts, sort_keys=True)


def load(key: str, file: Path | None = None) -> pd.DataFrame:
    """Return the cached windows of *key*; a cache that cannot be read is an empty one."""
    rows = _read(file or cache_file())
    return rows[rows["key"] == key]


def _read(file: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(file, columns=COLUMNS)
    except Exception:
        # Torn, of an older layout, absent or locked away: the replays are done again and the file is written anew.
        return pd.DataFrame(columns=COLUMNS)


def store(key: str, windows: pd.DataFrame, file: Path | None = None) -> None:
    """Add *windows* (COLUMNS without key) in place of those of the same signatures; a full disk costs only time.

    A CUDA graph has a name in its own process only, and is not kept.
    """
    windows = windows[~windows["signature"].astype(str).map(is_graph).astype(bool)]
    target = file or cache_file()
    old = _read(target)
    replaced = (old["key"] == key) & old["signature"].isin(set(windows["signature"]))
    parts = [part for part in (old[~replaced], windows.assign(key=key)[COLUMNS]) if not part.empty]
    if not parts:
        return
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    # Without the cache the next run takes longer, and that is all.
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(parts, ignore_index=True).to_parquet(temporary)
        os.replace(temporary, target)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
