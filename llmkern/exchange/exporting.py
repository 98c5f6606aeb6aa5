"""Writes a run for another tool: one overlay, one sink per format, all of the same form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmkern.attribute.attribution import attribute
from llmkern.errors import UsageError
from llmkern.exchange.overlay import PASSES, Overlay, cut, overlay
from llmkern.exchange.to_nsys import is_export, write_nsys
from llmkern.exchange.to_nsys_report import SUFFIX, is_report, write_report
from llmkern.exchange.to_perfetto import is_trace, write_perfetto
from llmkern.exchange.to_tables import check_table_folder, write_csv_tables, write_parquet
from llmkern.runfolder import RunFolder
from llmkern.runfolder.place import check_file_target, check_output, placed


@dataclass(frozen=True)
class Sink:
    """A format: *write* takes an overlay and the path, which ends in *suffix* (a folder where that is empty).

    *ours* tells a file that llmkern wrote from others.
    """

    write: Callable[[Overlay, Path], Path]
    suffix: str
    ours: Callable[[Path], bool] = lambda _file: False


@dataclass(frozen=True)
class Request:
    """What of a run is wanted: *passes*, of them a *phase* and token steps (first, last), of device *gpu*."""

    passes: tuple[str, ...] = PASSES
    phase: str | None = None
    tokens: tuple[int, int] | None = None
    gpu: int | None = None


SINKS = {
    "nsys": Sink(write_nsys, ".sqlite", is_export),
    "perfetto": Sink(write_perfetto, ".json.gz", is_trace),
    "parquet": Sink(write_parquet, ""),
    "csv": Sink(write_csv_tables, ""),
}


def export_run(
    path: Path,
    to: str,
    out: Path | None = None,
    request: Request | None = None,
    *,
    merge: Path | None = None,
    force: bool = False,
) -> Path:
    """Write what *request* asks for of run folder *path* in the format *to* and return the file or folder.

    With *merge*, or where *out* ends in .nsys-rep, ``nsys`` is a native report. What is at *out* is replaced when it is
    whole, with *force*, and where llmkern wrote it; else raises UsageError.
    """
    request = request or Request()
    sink = SINKS[to]
    if merge is not None and to != "nsys":
        raise UsageError(f"--merge puts a run into a capture of Nsight Systems: use it with --to nsys, not {to}.")
    if to == "nsys" and (merge is not None or (out is not None and out.suffix == SUFFIX)):
        sink = Sink(lambda found, target: write_report(found, target, merge), SUFFIX, is_report)
    run = RunFolder(path)
    if request.gpu is not None:
        run = run.of_device(request.gpu)
    target = out if out is not None else path.with_name(f"{path.name}-{to}{sink.suffix}")
    check_output(target, [path, run.path, merge])
    if sink.suffix:
        check_file_target(target, sink.ours, force=force)
    else:
        check_table_folder(target, force=force)
    found = cut(overlay(attribute(run), request.passes), request.phase, request.tokens)
    if not sink.suffix:
        return sink.write(found, target)
    with placed(target, sink.ours, force=force) as beside:
        sink.write(found, beside)
    return target


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
