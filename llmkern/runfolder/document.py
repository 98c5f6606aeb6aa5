"""run.json as text: written, read back with everything checked, and its JSON schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from llmkern.errors import RunFolderError
from llmkern.runfolder import vocabulary as word
from llmkern.runfolder.facts import OLDER_VERSIONS, SCHEMA_VERSION, RunFacts, first_line


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of run.json."""
    return msgspec.json.schema(RunFacts)


def encode(facts: RunFacts) -> bytes:
    """Return *facts* as the text of run.json."""
    return msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n"


def decode(text: bytes, file: Path) -> RunFacts:
    """Return the facts in *text*, the content of *file*.

    Raises RunFolderError with file, place and value for what is no run.json or of a schema that is not known.
    """
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RunFolderError(
            f"{file} cannot be read ({first_line(error)}): it was cut off or changed by hand; restore it, or trace "
            "the run again."
        ) from error
    version = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version not in (SCHEMA_VERSION, *OLDER_VERSIONS):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise RunFolderError(
            f"{file.parent} has run-folder schema {_short(version)}, this llmkern reads schema {SCHEMA_VERSION}: "
            f"{'update llmkern' if newer else 'trace the run again'}."
        )
    try:
        return msgspec.convert(_of_today(found, version), RunFacts)
    except (msgspec.ValidationError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise RunFolderError(
            f"{file} holds a value that no run has ({first_line(error)}): it was changed by hand; restore it, or "
            "trace the run again."
        ) from error


def _of_today(found: dict[str, Any], version: int) -> dict[str, Any]:
    """Return facts of an older schema in the form of this one; what they did not have stays unknown."""
    if version == SCHEMA_VERSION:
        return found
    moved = {"recorder": word.TIME, "inspected": word.INSPECT}
    known = {f for f in RunFacts.__dataclass_fields__ if f not in ("recorders", "labels", "tables")}
    facts = {name: value for name, value in found.items() if name in known}
    facts["schema"] = SCHEMA_VERSION
    recorders = {new: found[old] for old, new in moved.items() if old in found}
    if recorders:
        facts["recorders"] = recorders
    rest = {n: v for n, v in found.items() if n not in known and n not in moved and isinstance(v, str)}
    return {**facts, "labels": rest}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
