"""Changes run folders behind llmkern's back, as a user or a disk would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from llmkern.runfolder import RunFolder
from llmkern.runfolder.facts import DeviceFacts, RunFacts, TableFacts
from llmkern.runfolder.schema import to_table
from llmkern.runfolder.writer import crc32_of


def least_facts(**more: Any) -> RunFacts:
    """Return facts that say nothing but that there is a CPU."""
    return RunFacts(device=DeviceFacts(kind="cpu", index=0, name="Some CPU"), **more)


def write_table(folder: Path, name: str, columns: Mapping[str, Any]) -> None:
    """Write table *name* of a finished run folder anew, with its checksum."""
    file = folder / f"{name}.parquet"
    pq.write_table(to_table(name, columns), file)
    sign(folder, name)


def sign(folder: Path, name: str) -> None:
    """Put the checksum of table *name* as it is now into the facts, so that only its values can be objected to."""
    facts = json.loads((folder / "run.json").read_text())
    file = folder / f"{name}.parquet"
    rows = pq.read_metadata(file).num_rows
    entry = {"rows": rows, "bytes": file.stat().st_size, "crc32": crc32_of(file)}
    if facts["schema"] > 1:
        facts.setdefault("tables", {})[name] = entry
        (folder / "run.json").write_text(json.dumps(facts))


def with_facts(run: RunFolder, **changes: Any) -> RunFolder:
    """Return *run* with other facts, in memory only."""
    run.facts = replace(run.facts, **changes)
    return run


__all__ = ["TableFacts", "least_facts", "sign", "with_facts", "write_table"]
