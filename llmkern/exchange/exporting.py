"""Writes a run for another tool: one overlay, one sink per format, all of the same form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmkern.attribute.attribution import attribute
from llmkern.errors import RecordingError, UsageError
from llmkern.exchange.overlay import PASSES, Overlay, cut, overlay
from llmkern.exchange.to_nsys import write_nsys
from llmkern.exchange.to_nsys_report import SUFFIX, write_report
from llmkern.exchange.to_perfetto import write_perfetto
from llmkern.exchange.to_tables import write_csv_tables, write_parquet
from llmkern.run import RunFolder


@dataclass(frozen=True)
class Sink:
    """A format: *write* takes an overlay and the path, which ends in *suffix* (a folder where that is empty)."""

    write: Callable[[Overlay, Path], Path]
    suffix: str


SINKS = {
    "nsys": Sink(write_nsys, ".sqlite"),
    "perfetto": Sink(write_perfetto, ".json.gz"),
    "parquet": Sink(write_parquet, ""),
    "csv": Sink(write_csv_tables, ""),
}


def export_run(
    path: Path,
    to: str,
    out: Path | None = None,
    *,
    passes: tuple[str, ...] = PASSES,
    phase: str | None = None,
    tokens: tuple[int, int] | None = None,
    merge: Path | None = None,
    force: bool = False,
) -> Path:
    """Write run folder *path* in the format *to* and return the file or folder.

    *phase* and *tokens* (first, last step) cut it. With *merge*, or where *out* ends in .nsys-rep, ``nsys`` is a native
    report. Raises UsageError when *out* exists and *force* is not given.
    """
    sink = SINKS[to]
    if merge is not None and to != "nsys":
        raise UsageError(f"--merge puts a run into a capture of Nsight Systems: use it with --to nsys, not {to}.")
    if to == "nsys" and (merge is not None or (out is not None and out.suffix == SUFFIX)):
        sink = Sink(lambda found, target: write_report(found, target, merge), SUFFIX)
    target = out or path.with_name(f"{path.name}-{to}{sink.suffix}")
    if target.exists() and not force:
        raise UsageError(f"{target} exists and is not overwritten: choose another name with --out, or add --force.")
    found = cut(overlay(attribute(RunFolder(path)), passes), phase, tokens)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return sink.write(found, target)
    except OSError as error:
        raise RecordingError(
            f"writing {target} failed ({error.strerror or error}): free some space or choose another place with --out."
        ) from error


def parse_tokens(text: str) -> tuple[int, int]:
    """Return first and last token step of A:B, A: or A; raises UsageError for anything else."""
    first, colon, last = text.partition(":")
    try:
        begin = int(first or 1)
        end = int(last) if last else (10**9 if colon else begin)
    except ValueError:
        begin, end = 0, -1
    if not 0 <= begin <= end:
        raise UsageError(f"--tokens {text} is not A:B with whole numbers 0 ≤ A ≤ B: write for example --tokens 5:6.")
    return begin, end
