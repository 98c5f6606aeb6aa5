"""The results of the commands as JSON documents; docs/json.md describes them."""

from __future__ import annotations

import json
import math
from typing import Any

import click
import msgspec

from llmkern.attribute.attribution import Attribution
from llmkern.explain import Explanation
from llmkern.explain.compare import Difference
from llmkern.explain.statement import answer
from llmkern.report.tables import (
    difference_facts,
    difference_tables,
    finding_facts,
    prediction_facts,
    records,
    run_tables,
)

SCHEMA = 1
# Told in full under names of their own.
_NOT_TABLES = ("findings", "predictions")


def report_document(explanation: Explanation, uncertain: list[str]) -> dict[str, Any]:
    """Return the report of a run; energies in J, times in s or, in columns that say so, ns."""
    tables = run_tables(explanation)
    return {
        "schema": SCHEMA,
        "document": "report",
        "run": run_facts(explanation.attribution),
        "answer": answer(explanation),
        "findings": [finding_facts(finding) for finding in explanation.findings],
        "predictions": [prediction_facts(prediction) for prediction in explanation.predictions],
        "uncertain": uncertain,
        "tables": {name: records(table) for name, table in tables.items() if name not in _NOT_TABLES},
    }


def difference_document(before: Attribution, after: Attribution, differences: list[Difference]) -> dict[str, Any]:
    """Return the comparison of two runs, per token."""
    tables = difference_tables(differences)
    return {
        "schema": SCHEMA,
        "document": "diff",
        "before": run_facts(before),
        "after": run_facts(after),
        "phases": [difference_facts(difference) for difference in differences],
        "tables": {name: records(table) for name, table in tables.items() if name != "phases"},
    }


def run_facts(attribution: Attribution) -> dict[str, Any]:
    """Return what a run was of: folder, status, workload, device, versions."""
    facts: dict[str, Any] = msgspec.to_builtins(attribution.run.facts)
    kept = ("started", "command", "options", "model", "prompts", "device", "host", "versions", "elapsed_s", "reason")
    told = {name: facts[name] for name in kept if facts.get(name) not in (None, "", {})}
    found: dict[str, Any] = finite({"folder": str(attribution.run.path), "status": attribution.run.status, **told})
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
