"""Where results may be written: never over an input, never over what llmkern did not write, never half of one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmkern.errors import RecordingError, UsageError
from llmkern.runfolder.schema import TABLES

FACTS, SEGMENTS, LOCK = "run.json", "segments", "recording.lock"
PARTIAL = ".partial"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(out: Path, inputs: Iterable[Path | None], option: str = "--out") -> None:
    """Refuse an output that is empty, is or lies inside one of *inputs* (None: not given), or holds one of them.

    Raises UsageError.
    """
    if not out.parts:
        raise UsageError(f"{option} is empty, which would be the current folder: give the name of something new.")
    target = out.resolve()
    for given in inputs:
        if given is None:
            continue
        source = given.resolve()
        if target == source or source in target.parents:
            where = "is" if target == source else "lies inside"
            raise UsageError(f"{option} {out} {where} the input {given}: choose a place outside of it.")
        if target in source.parents:
            raise UsageError(f"{option} {out} holds the input {given}: choose another place.")


def check_run_target(target: Path, force: bool, option: str = "--out") -> None:
    """Refuse *target* for a run folder where something is that may not be replaced; raises UsageError."""
    if not target.parts or not target.name:
        raise UsageError(f"{option} '{target}' names no new folder: give the run folder a name.")
    holder = next((parent for parent in target.resolve().parents if (parent / FACTS).is_file()), None)
    if holder is not None:
        raise UsageError(f"{option} {target} lies inside the run folder {holder}: choose a place outside of it.")
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise UsageError(f"{target} is a file or link, no run folder: choose another name with {option}.")
    if not force:
        raise UsageError(
            f"{target} exists and is not overwritten: choose another folder with {option}, or add --force."
        )
    foreign = not_ours(target)
    if foreign is not None:
        raise UsageError(
            f"{target} holds {foreign}, which llmkern did not write, so --force leaves all of it alone: choose another "
            f"folder with {option}."
        )


def not_ours(folder: Path) -> str | None:
    """Return the name of something in *folder* that no run folder has, None where there is nothing like that."""
    own = {FACTS, LOCK, f"{FACTS}.tmp", *(f"{name}.parquet{end}" for name in TABLES for end in ("", ".tmp"))}
    entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.name == SEGMENTS and entry.is_dir() and not entry.is_symlink():
            inner = next((e for e in sorted(entry.iterdir()) if e.suffix not in (".parquet", ".tmp")), None)
            if inner is not None:
                return f"{SEGMENTS}/{inner.name}"
        elif entry.name not in own or not entry.is_file():
            return entry.name
    # An empty folder has nothing to lose; tables without facts may be anybody's.
    return entries[0].name if entries and not (folder / FACTS).is_file() else None


def folder_beside(target: Path) -> Path:
    """Return a new, empty folder beside *target* for what is being recorded; raises UsageError where none can be."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            beside = target.with_name(f"{target.name}{PARTIAL}{'' if number == 1 else f'-{number}'}")
            with suppress(FileExistsError):
                beside.mkdir()
                return beside
    except OSError as error:
        raise UsageError(f"{target} cannot be created ({error.strerror}): choose another folder with --out.") from error
    raise UsageError(f"{target}{PARTIAL}-* are taken: remove those of runs that you do not need.")


def swap_in(beside: Path, target: Path) -> None:
    """Put folder *beside* in the place of *target* at once; what was there is deleted afterwards."""
    if not target.exists():
        os.rename(beside, target)
        return
    if not _exchange(beside, target):
        # Two steps; between them both are there under other names.
        old = target.with_name(f".{target.name}.replaced-{uuid.uuid4().hex[:8]}")
        os.rename(target, old)
        os.rename(beside, target)
        beside = old
    shutil.rmtree(beside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    if rename(*paths, _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextmanager
def placed(target: Path, ours: Callable[[Path], bool], *, force: bool, option: str = "--out") -> Iterator[Path]:
    """Yield the name beside *target* to write to, and put the file there in its place when it is whole.

    What was there is replaced with *force*, and only where *ours* says that llmkern wrote it. Raises UsageError where
    it may not be, RecordingError where the disk refuses.
    """
    check_file_target(target, ours, force=force, option=option)
    beside = target.with_name(f".{uuid.uuid4().hex[:8]}-{target.name}")
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            os.replace(beside, target)
        except OSError as error:
            raise RecordingError(
                f"{target} cannot be written ({error.strerror or error}): choose another file with {option}, or free "
                "some space."
            ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def check_file_target(target: Path, ours: Callable[[Path], bool], *, force: bool, option: str = "--out") -> None:
    """Refuse *target* for a file where something is that may not be replaced; raises UsageError."""
    if not target.parts or not target.name:
        raise UsageError(f"{option} '{target}' names no file: give one.")
    if target.is_dir():
        raise UsageError(f"{target} is a folder: give a file with {option}.")
    if not target.exists():
        return
    if not target.is_file() or target.is_symlink():
        raise UsageError(f"{target} is a device or a link, no file of its own: give another with {option}.")
    if not force:
        raise UsageError(f"{target} exists and is not overwritten: choose another name with {option}, or add --force.")
    if not ours(target):
        raise UsageError(f"{target} was not written by llmkern and is left alone: choose another name with {option}.")


def begins_with(*marks: bytes, within: int = 4096) -> Callable[[Path], bool]:
    """Return a test whether a file holds one of *marks* in its first *within* bytes."""

    def test(file: Path) -> bool:
        try:
            with open(file, "rb") as content:
                head = content.read(within)
        except OSError:
            return False
        return any(mark in head for mark in marks)

    return test
