"""An evaluation as JSON, and one that was kept as the baseline of the next."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmkern.errors import LlmkernError, UsageError
from llmkern.evaluate.job import to_json
from llmkern.evaluate.verdict import Statement

SCHEMA = 1


class RegressionError(LlmkernError):
    """A candidate is wrong, or slower than its baseline allows: for a developer's CI."""

    exit_code = 1


def document(statement: Statement) -> dict[str, Any]:
    """Return all of *statement* as what JSON knows; units are in the names."""
    evaluation = statement.evaluation
    return {
        "schema": SCHEMA,
        "document": "evaluation",
        "device": evaluation.device,
        "versions": evaluation.versions,
        "request": to_json(evaluation.request),
        "verdicts": [asdict(verdict) for verdict in statement.verdicts],
        "roof": None if evaluation.roof is None else to_json(evaluation.roof),
        "cases": [
            {
                **to_json(line.row),
                "own": line.own,
                "right": line.right,
                "judgement": line.judgement,
                "cold_us": None if line.cold_us is None else asdict(line.cold_us),
                "warm_us": line.warm_us,
                "share_of_sheet": line.share_of_sheet,
                "share_of_read": line.share_of_read,
                "joules_per_gb": line.joules_per_gb,
            }
            for line in statement.lines
        ],
        "fits": [asdict(fit) for fit in statement.fits],
        "in_model": to_json(list(statement.in_model)),
        "failed": evaluation.failed,
        "doubts": list(statement.doubts),
    }


def read_baseline(path: Path) -> dict[tuple[str, str], float]:
    """Return the cold µs of each (candidate, case) in a document that --json printed. Raises UsageError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(
            f"--baseline {path} cannot be read as JSON ({error}): give a file that --json wrote."
        ) from error
    if not isinstance(data, dict) or data.get("document") != "evaluation" or data.get("schema") != SCHEMA:
        raise UsageError(f"--baseline {path} is no evaluation of schema {SCHEMA}: give a file that --json wrote.")
    found = {}
    for row in data["cases"]:
        case = row["case"]
        if row.get("cold_us") is not None:
            key = f"{case['format']} {case['n']}x{case['k']} M={case['m']}"
            found[row["candidate"], key] = float(row["cold_us"]["value"])
    return found


def check_baseline(statement: Statement, baseline: dict[tuple[str, str], float], fail_above: float) -> list[str]:
    """Return a sentence per case of the user's candidates that differs from *baseline*.

    Raises RegressionError where one is slower by more than *fail_above* (a share) and than its own spread.
    """
    told, slower = [], []
    for line in statement.lines:
        before = baseline.get((line.row.candidate, line.row.case.key))
        if not line.own or line.cold_us is None or before is None:
            continue
        now = line.cold_us.value
        change = now / before - 1
        sentence = f"{line.row.candidate}, {line.row.case.key}: {now:.2f} µs, {change:+.1%} against {before:.2f}"
        told.append(sentence)
        if change > fail_above and line.cold_us.low > before:
            slower.append(sentence)
    if not told:
        raise UsageError("--baseline has none of these candidates and cases: evaluate the same ones.")
    if slower:
        raise RegressionError(f"slower than the baseline by more than {fail_above:.1%}: {'; '.join(slower)}.")
    return told
