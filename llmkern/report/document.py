"""The results of the commands as JSON documents; docs/json.md describes them."""

from __future__ import annotations

import json
import math
from typing import Any

import click
import msgspec
import pandas as pd

from llmkern.explain.compare import Difference
from llmkern.explain.statement import Statement
from llmkern.report.records import (
    book_facts,
    difference_facts,
    difference_tables,
    estimate_facts,
    finding_facts,
    phase_facts,
    prediction_facts,
    records,
)
from llmkern.runfolder.facts import RunFacts

SCHEMA = 2


def report_document(statement: Statement, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Return the report of a run with all its *tables*; energies in J, times in s or, in columns that say so, ns."""
    return {
        "schema": SCHEMA,
        "document": "report",
        "run": run_facts(statement.facts, statement.folder, statement.status),
        "answer": list(statement.answer),
        "phases": [phase_facts(phase) for phase in statement.phases],
        "only_weighed": [
            {
                "phase": weight.phase,
                "unit": weight.unit,
                "latency_s": estimate_facts(weight.latency_s),
                "energy_j": estimate_facts(weight.energy_j),
            }
            for weight in statement.only_weighed
        ],
        "findings": [finding_facts(told) for told in statement.findings],
        "predictions": [prediction_facts(prediction) for prediction in statement.predictions],
        "books": book_facts(statement),
        "uncertain": list(statement.doubts),
        "shown": {name: records(rows) for name, rows in statement.shown.items()},
        "tables": {name: records(table) for name, table in tables.items()},
    }


def difference_document(
    runs: list[dict[str, Any]], differences: list[list[Difference]], versus: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the comparison of runs with the first of them; *runs* are what run_facts says, *versus* a line a phase."""
    found: dict[str, Any] = {"schema": SCHEMA, "document": "diff", "before": runs[0]}
    if len(runs) > 2:
        return {**found, "runs": runs[1:], "versus": versus}
    (compared,) = differences
    tables = difference_tables(compared) if compared else {}
    return {
        **found,
        "after": runs[1],
        "versus": versus,
        "phases": [difference_facts(difference) for difference in compared],
        "tables": {name: records(table) for name, table in tables.items() if name != "phases"},
    }


def run_facts(run: RunFacts, folder: str, status: str) -> dict[str, Any]:
    """Return what a run was of: folder, status, workload, device, versions."""
    facts: dict[str, Any] = msgspec.to_builtins(run)
    kept = ("started", "command", "options", "model", "prompts", "device", "host", "versions", "elapsed_s", "reason")
    told = {name: facts[name] for name in kept if facts.get(name) not in (None, "", {})}
    found: dict[str, Any] = finite({"folder": folder, "status": status, **told})
    return found


def finite(value: Any) -> Any:
    """Return *value* with None in the place of every number that is none: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def echo(document: dict[str, Any]) -> None:
    """Print *document* as JSON."""
    click.echo(json.dumps(finite(document), indent=1, allow_nan=False))
