"""Makes a run folder of a capture, with the energy of a weighed run where one is given."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from llmkern.attribute.attribution import attribute
from llmkern.errors import UsageError
from llmkern.exchange.capture import Capture, with_phases
from llmkern.exchange.from_nsys import MAGIC, read_nsys
from llmkern.exchange.from_torch import GZIP, read_torch
from llmkern.exchange.identity import merged
from llmkern.exchange.sound import sound
from llmkern.runfolder import RunFolder, RunWriter
from llmkern.runfolder import vocabulary as word
from llmkern.runfolder.facts import CapturedDevice, OptionFacts, RecorderFacts, RunFacts, without_home
from llmkern.runfolder.place import check_output, check_run_target
from llmkern.runfolder.schema import to_table

# A report of an hour takes minutes.
_EXPORT_S = 1800
_CAPTURED = ("kernels", "launches", "overheads", "ranges")
# Passes that tell what kernels and gaps cost, as opposed to when they ran.
_ENERGY_PASSES = (word.SELFTEST, word.WEIGH, word.REPLAY, word.INSPECT)


def default_folder(path: Path, energy: Path | None = None) -> Path:
    """Return the run folder that the capture *path* becomes unless another is asked for: never that of the *energy*."""
    folder = Path("runs") / (path.name.strip(".").split(".")[0] or "import")
    if energy is not None and folder.resolve() == energy.resolve():
        return folder.with_name(f"{folder.name}-import")
    return folder


def import_capture(
    path: Path | Sequence[Path],
    out: Path,
    *,
    energy: Path | None = None,
    phases: Sequence[str] = (),
    force: bool = False,
) -> RunFolder:
    """Write the capture *path*, or those of one job as several devices, as run folder *out* and return it.

    *energy* is a weighed run of the same workload whose joules the captured kernels get; *phases* names the ranges that
    are phases (NAME or NAME=PHASE). Raises UsageError for a file that is none of the known formats or torn, and where
    *out* is or lies inside one of the inputs.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    if energy is not None and len(paths) > 1:
        raise UsageError(
            f"--energy has the joules of one board, and these are {len(paths)} files of several: import the one that "
            "was weighed by itself."
        )
    weighed = RunFolder(energy) if energy is not None else None
    check_output(out, [*paths, energy, weighed.path if weighed is not None else None])
    check_run_target(out, force)
    resolved = [file.resolve() for file in paths]
    twice = next((file for file in resolved if resolved.count(file) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice.name} is named twice: give every file of the job once.")
    try:
        captures = [_sound(_read(file), file) for file in paths]
        capture = captures[0] if len(captures) == 1 else merged(captures)
        capture = with_phases(capture, _named(phases, capture))
        facts = _facts(capture, weighed)
        tables = [(name, _table(name, getattr(capture, name))) for name in _CAPTURED if len(getattr(capture, name))]
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise UsageError(
            f"{', '.join(map(str, paths))} holds values that no capture has ({str(error).splitlines()[0]}): export the "
            "capture again."
        ) from error
    writer = RunWriter(out, facts, force=force)
    try:
        for name, table in tables:
            writer.append(name, dict(zip(table.column_names, table.columns, strict=True)))
        if weighed is not None:
            _add_energy(writer, weighed)
        writer.merge()
        run = RunFolder(writer.path)
        frames = [attribute(run.of_device(one.facts.index)).table() for one in capture.devices]
        frame = pd.concat([one for one in frames if len(one)] or frames[:1], ignore_index=True)
        if len(frame):
            writer.put("attribution", {column: frame[column] for column in frame.columns})
        writer.publish()
    except BaseException:
        # The capture is still there: half of a run made of it is worth nothing.
        writer.discard()
        raise
    return RunFolder(out)


def _sound(capture: Capture, path: Path) -> Capture:
    """Return *capture* without what cannot have happened; raises UsageError where nothing is left."""
    kernels, launches, told = sound(capture.kernels, capture.launches)
    if kernels.empty:
        raise UsageError(f"{path} holds no GPU record with times ({' '.join(told)}): capture again.")
    there = set(kernels["device"])
    devices = tuple(device for device in capture.devices if device.facts.index in there)
    return replace(capture, kernels=kernels, launches=launches, devices=devices, told=[*capture.told, *told])


def _named(phases: Sequence[str], capture: Capture) -> dict[str, str]:
    """Return the phase of each range that *phases* names (NAME or NAME=PHASE).

    A name may hold "=" itself: what is left of the last one is the name if the capture has such a range.
    """
    there = set(capture.ranges["name"].astype(str))
    found = {}
    for text in phases:
        if text in there or "=" not in text:
            found[text] = text
            continue
        cuts = [i for i, letter in enumerate(text) if letter == "="]
        cut = next((i for i in reversed(cuts) if text[:i] in there and text[i + 1 :]), cuts[-1])
        found[text[:cut]] = text[cut + 1 :] or text[:cut]
    return found


def _read(path: Path) -> Capture:
    if not path.exists():
        raise UsageError(f"{path} does not exist: give the file that the other tool exported.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give the file that the other tool exported.")
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        raise UsageError(f"{path} is empty: export the capture again.")
    if head.startswith(MAGIC):
        return read_nsys(path)
    # A byte order mark, and every other byte of UTF-16, say nothing.
    text = head.replace(b"\0", b"").removeprefix(b"\xef\xbb\xbf").removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff")
    if head.startswith(GZIP) or text.lstrip()[:1] in (b"{", b"["):
        return read_torch(path)
    if path.suffix == ".nsys-rep":
        return _of_report(path)
    raise UsageError(
        f"{path} is neither an SQLite export of Nsight Systems nor a trace of torch.profiler (.json, .json.gz): export "
        "the capture as one of them."
    )


def _of_report(path: Path) -> Capture:
    """Return the capture in the native report *path*, by nsys itself; UsageError where it is not there or fails."""
    command = ["nsys", "export", "--type", "sqlite", "--force-overwrite", "true", "--output"]
    if shutil.which(command[0]) is None:
        raise UsageError(
            f"{path} is an Nsight Systems report, which only nsys can read, and it is not installed here: run 'nsys "
            f"export --type sqlite {path.name}' where it is and import its result."
        )
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export.sqlite"
        try:
            done = subprocess.run([*command, str(export), str(path)], capture_output=True, text=True, timeout=_EXPORT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UsageError(f"nsys export of {path} did not end ({error}): run it yourself.") from error
        if done.returncode or not export.exists():
            said = next(iter((done.stderr or done.stdout).strip().splitlines()[-1:]), "without a word")
            raise UsageError(
                f"nsys export of {path} failed ({said[:200]}): a report needs an nsys as new as the one that wrote it."
            )
        capture = read_nsys(export)
    return replace(capture, imported=replace(capture.imported, file=path.name), devices=_called(capture, path.name))


def _called(capture: Capture, file: str) -> tuple[CapturedDevice, ...]:
    return tuple(replace(device, file=file) for device in capture.devices)


def _facts(capture: Capture, weighed: RunFolder | None) -> RunFacts:
    tokens = pd.to_numeric(capture.ranges["new_tokens"]).max()
    devices = capture.devices if len(capture.devices) > 1 else ()
    source = replace(capture.imported, missing=tuple(capture.missing), told=tuple(capture.told), devices=devices)
    facts = RunFacts(
        started=capture.started,
        device=capture.device,
        versions=dict(capture.versions),
        imported=source,
        options=OptionFacts(model=source.file, new_tokens=2 if tokens != tokens else max(2, int(tokens))),
        recorders={
            word.TIME: RecorderFacts(source=source.format, kernels=len(capture.kernels), launches=len(capture.launches))
        },
    )
    if weighed is None:
        return facts
    own, other = facts.device, weighed.facts.device
    if own.name not in (other.name, "unknown GPU"):
        raise UsageError(
            f"the capture is of {own.name}, the run with the energy of {other.name}: joules of one board say "
            "nothing of another; weigh the workload on the board of the capture."
        )
    kept = {
        name: getattr(weighed.facts, name)
        for name in ("options", "model", "prompts", "host", "versions", "plan", "own_cost", "sensors", "replays")
    }
    # Attribution joins sensors and kernels by the device's number, which each tool gives by its own lights.
    device = replace(other, index=own.index)
    return replace(facts, **kept, device=device, energy_of=without_home(str(weighed.path)))


def _add_energy(writer: RunWriter, weighed: RunFolder) -> None:
    device, own = writer.facts.device.index, weighed.facts.device.index
    for name in (*_CAPTURED, "ops", "replays", "power", "energy", "clocks"):
        frame = weighed.table(name)
        if "pass" in frame:
            frame = frame[frame["pass"].isin(_ENERGY_PASSES)]
        if "device" in frame:
            # Other sensors number other things: packages of the host, for one.
            other = frame["sensor"] == word.RAPL_COUNTER if "sensor" in frame else pd.Series(False, index=frame.index)
            frame = frame.assign(device=frame["device"].where((frame["device"] != own) | other, device))
        _append(writer, name, frame)


def _append(writer: RunWriter, name: str, frame: pd.DataFrame) -> None:
    if len(frame):
        writer.append(name, {column: _plain(frame[column]) for column in frame.columns})


def _table(name: str, frame: pd.DataFrame) -> pa.Table:
    return to_table(name, {column: _plain(frame[column]) for column in frame.columns})


def _plain(column: pd.Series) -> Any:
    """Return *column* as Arrow takes it: missing values as None, whole numbers whole."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.array
    if column.isna().any() or column.dtype == object:
        return [None if value is None or value != value else value for value in column]
    return column.to_numpy()
