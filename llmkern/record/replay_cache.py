"""Replays that this board has done before, kept per user: what an operator adds does not change from run to run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llmkern.record.graphs import is_graph
from llmkern.runfolder.facts import DeviceFacts, ModelFacts

COLUMNS = ["key", "signature", "kernel", "duty", "launches", "seconds", "dynamic_j", "floor_w", "clock_mhz"]
_TEXTS = ("key", "signature", "kernel")


def cache_file() -> Path | None:
    """Return the user's cache file (XDG_CACHE_HOME, else ~/.cache), None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "llmkern" / "replays.parquet"
    except RuntimeError:
        return None


def cache_key(device: DeviceFacts, versions: Mapping[str, str | None], model: ModelFacts | None) -> str:
    """Return what the joules of an operator depend on besides itself: board, driver, libraries, values of the weights.

    Weights that are zero or random draw other power than those of a trained model.
    """
    parts = {k: getattr(device, k) for k in ("uuid", "name", "driver_version", "power_limit_mw")}
    parts |= {k: versions.get(k) for k in ("torch", "bitsandbytes", "triton")}
    return json.dumps({**parts, "weights": model.weights_key if model is not None else ""}, sort_keys=True)


def load(key: str, file: Path | None = None) -> pd.DataFrame:
    """Return the cached windows of *key*; a cache that cannot be read is an empty one."""
    rows = _read(file or cache_file())
    return rows[rows["key"] == key]


def _read(file: Path | None) -> pd.DataFrame:
    empty = pd.DataFrame({c: pd.Series(dtype=object if c in _TEXTS else float) for c in COLUMNS})
    if file is None:
        return empty
    try:
        rows = pq.read_table(file, columns=COLUMNS, page_checksum_verification=True).to_pandas()
        numbers = rows[[c for c in COLUMNS if c not in _TEXTS]].astype(float)
        texts = rows[list(_TEXTS)].astype(object)
        texts["kernel"] = texts["kernel"].where(texts["kernel"].notna(), None)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError):
        # Torn, of an older layout, absent or locked away: the replays are done again and the file is written anew.
        return empty
    sound = (numbers[["launches", "seconds"]] > 0).all(axis=1) & numbers["duty"].between(0, 1, inclusive="right")
    sound &= numbers[["dynamic_j", "floor_w"]].abs().lt(1e9).all(axis=1) & (numbers["floor_w"] >= 0)
    return pd.concat([texts, numbers], axis=1)[COLUMNS][sound]


def store(key: str, windows: pd.DataFrame, file: Path | None = None) -> None:
    """Add *windows* (COLUMNS without key) in place of those of the same operators and kernels; a full disk costs time.

    A CUDA graph has a name in its own process only, and is not kept. Several runs that end at once wait for each other.
    """
    windows = windows[~windows["signature"].astype(str).map(is_graph).astype(bool)]
    target = file or cache_file()
    if target is None or windows.empty:
        return
    # Without the cache the next run takes longer, and that is all.
    with suppress(OSError, pa.ArrowException), _locked(target):
        old = _read(target)
        ours = set(_pairs(windows))
        replaced = (old["key"] == key) & np.array([pair in ours for pair in _pairs(old)], bool)
        parts = [part for part in (old[~replaced], windows.assign(key=key)[COLUMNS]) if not part.empty]
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            merged = pa.Table.from_pandas(pd.concat(parts, ignore_index=True), preserve_index=False)
            pq.write_table(merged, temporary, write_page_checksum=True)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _pairs(windows: pd.DataFrame) -> list[tuple[str, str]]:
    """Return operator and kernel of each of *windows*."""
    return list(zip(windows["signature"].astype(str), windows["kernel"].fillna("").astype(str), strict=True))


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
