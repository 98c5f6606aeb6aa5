"""A native report of Nsight Systems, new or merged into a capture, by the writer that comes with Nsight Systems.

The writer is its Python module nsys_writer, whose sessions have the interface of nvtx.writer. Times are UTC
nanoseconds, which is llmkern's clock.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nvtx.writer import WriterError

from llmkern.errors import RecordingError, UsageError
from llmkern.exchange.overlay import Overlay
from llmkern.runfolder.vocabulary import DOMAIN, PASS
from llmkern.text import quantity, short_name

SUFFIX = ".nsys-rep"
# ARGB, as nsys draws ranges; the colours of the causes are those of the HTML page.
_COLOURS = {"launch_bound": 0xFFD1495B, "sync_stall": 0xFFEDAE49, "dependency": 0xFF8F6A9F}
_GREY = 0xFF9AA0A6


def write_report(overlay: Overlay, path: Path, merge: Path | None = None) -> Path:
    """Write *overlay* as the report *path*, with everything of the capture *merge* if one is given, and return it.

    Gaps carry their cause and joules, phases and token steps their joules; power and energy are counters. Kernels are
    ranges per stream in a new report; a capture has them already. Raises UsageError where Nsight Systems' writer is not
    installed or *merge* cannot be used, RecordingError where the writer fails.
    """
    if merge is not None:
        if not merge.exists():
            raise UsageError(f"{merge} does not exist: give --merge the .nsys-rep of the capture.")
        if merge.resolve() == path.resolve():
            raise UsageError(f"{path} is the capture itself, which the writer would cut off: choose another --out.")
    writer = _writer()
    try:
        more = {} if merge is None else {"report_merge": str(merge)}
        with writer.Session(name=str(path), time_base="UTC", **more) as session:
            domain = session.get_domain(DOMAIN)
            _gaps(session, domain, overlay)
            _ranges(session, domain, overlay)
            if merge is None:
                _kernels(session, domain, overlay)
            _counters(session, domain, overlay)
    except (WriterError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise RecordingError(
            f"Nsight Systems' writer failed on {path} ({error}): check its version, or leave --merge out and let --out "
            "end in .sqlite."
        ) from error
    return path


def is_report(_file: Path) -> bool:
    """Return False: nothing tells a report that llmkern wrote from a capture under its annotation."""
    return False


def _writer() -> Any:
    try:
        return importlib.import_module("nsys_writer")
    except ImportError as error:
        raise UsageError(
            f"a native {SUFFIX} needs the module nsys_writer of Nsight Systems, which is not installed here: put it on "
            "PYTHONPATH and name its libNvtxwBackend.so in NSYS_WRITER_BACKEND, or let --out end in .sqlite."
        ) from error


def _gaps(session: Any, domain: Any, overlay: Overlay) -> None:
    gaps = overlay.gaps.sort_values("start_ns")
    with session.create_stream("idle gaps", domain=domain) as stream:
        columns = ["start_ns", "end_ns", "cause", "op", "module", "energy_j"]
        for start, end, cause, op, module, joule in _rows(gaps, columns):
            behind = f", {op} in {module}" if isinstance(op, str) and isinstance(module, str) else ""
            message = f"{cause}{_told(joule)}{behind}"
            color = _COLOURS.get(str(cause), _GREY)
            stream.write_startend(start, end, message=message, color=color, category="gap")


def _ranges(session: Any, domain: Any, overlay: Overlay) -> None:
    """Write phases, token steps and layers of the traced passes, with the joules of what ran between their marks."""
    spent = pd.concat([overlay.kernels[["start_ns", "energy_j"]], overlay.gaps[["start_ns", "energy_j"]]]).dropna()
    spent = spent.sort_values("start_ns")
    starts, total = spent["start_ns"].to_numpy(), np.append(0.0, spent["energy_j"].cumsum().to_numpy())
    own = overlay.ranges[overlay.ranges["category"] != PASS]
    own = own.sort_values(["start_ns", "end_ns"], ascending=[True, False])
    with session.create_stream("phases and token steps", domain=domain) as stream:
        for start, end, name, category in _rows(own, ["start_ns", "end_ns", "name", "category"]):
            first, last = np.searchsorted(starts, [start, end])
            joule = float(total[last] - total[first]) if last > first else float("nan")
            named = category if isinstance(category, str) else "range"
            stream.write_pushpop(start, end, message=f"{name}{_told(joule)}", category=named)


def _kernels(session: Any, domain: Any, overlay: Overlay) -> None:
    for number, rows in overlay.kernels.groupby("stream"):
        with session.create_stream(f"kernels of stream {number}", domain=domain) as stream:
            names = {name: domain.get_registered_string(short_name(str(name))) for name in rows["name"].unique()}
            for start, end, name, what in _rows(rows.sort_values("start_ns"), ["start_ns", "end_ns", "name", "what"]):
                category = what if isinstance(what, str) else "kernel"
                stream.write_startend(start, end, message=names[name], category=category)


def _counters(session: Any, domain: Any, overlay: Overlay) -> None:
    for counter in overlay.counters:
        if not len(counter.value):
            continue
        registered = domain.get_counter(f"{counter.name} [{counter.unit}]", float)
        with session.create_stream(counter.name, domain=domain) as stream:
            stream.write_counter_batch(registered, counter.value, timestamps=counter.timestamp_ns)


def _rows(frame: pd.DataFrame, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield *columns* of each row as plain Python values, which is what the writer takes."""
    return zip(*(frame[column].tolist() for column in columns), strict=True)


def _told(joule: float) -> str:
    return f", {quantity(joule, 'J')}" if joule == joule else ""
