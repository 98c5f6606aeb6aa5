"""Plain values of what is stated, for JSON and CSV, and the CSV files themselves."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from llmkern.errors import RecordingError, UsageError
from llmkern.estimate import Estimate
from llmkern.explain.compare import Difference, change
from llmkern.explain.statement import Part, PhaseStatement, Statement, Told
from llmkern.explain.whatif import Prediction
from llmkern.text import visible


def phase_facts(phase: PhaseStatement) -> dict[str, Any]:
    """Return *phase* as plain values."""
    return {field.name: _told(getattr(phase, field.name)) for field in fields(phase)}


def _told(value: Any) -> Any:
    if isinstance(value, Estimate):
        return estimate_facts(value)
    if isinstance(value, Part):
        return {"energy_j": estimate_facts(value.energy_j), "share": value.share}
    if isinstance(value, dict):
        return {name: _told(inner) for name, inner in value.items()}
    return value


def finding_facts(told: Told) -> dict[str, Any]:
    """Return a finding as plain values."""
    finding = told.finding
    facts = {name: getattr(finding, name) for name in ("name", "phase", "unit", "claim", "time_s")}
    words = {name: getattr(finding, name) for name in ("formula", "assumption", "next_step")}
    energy_j = estimate_facts(finding.energy_j)
    return {**facts, "energy_j": energy_j, "share": told.share, **words, "evidence": records(finding.evidence)}


def prediction_facts(prediction: Prediction) -> dict[str, Any]:
    """Return *prediction* as plain values."""
    facts = {field.name: _told(getattr(prediction, field.name)) for field in fields(prediction)}
    return {**facts, "saves": prediction.saves}


def book_facts(statement: Statement) -> list[dict[str, Any]]:
    """Return the books of *statement* as plain values."""
    return [{"name": b.name, "sentence": b.sentence, "values": _told(b.values)} for b in statement.books]


def difference_facts(difference: Difference) -> dict[str, Any]:
    """Return the totals of *difference* as plain values, per token or unit."""
    checked = difference.checked
    facts: dict[str, Any] = {
        "phase": difference.phase,
        "per": difference.per,
        **{name: estimate_facts(getattr(difference, name)) for name in ("before_s", "after_s", "before_j", "after_j")},
        "change_s": estimate_facts(change(difference.before_s, difference.after_s)),
        "change_j": estimate_facts(change(difference.before_j, difference.after_j)),
    }
    if checked is not None:
        facts["checked"] = {
            "prediction": prediction_facts(checked.prediction),
            "measured_latency_s": estimate_facts(checked.latency_s),
            "measured_energy_j": estimate_facts(checked.energy_j),
            "latency_error": checked.latency_error,
            "energy_error": checked.energy_error,
        }
    return facts


def estimate_facts(estimate: Estimate | None) -> dict[str, Any] | None:
    """Return value, low and high of *estimate*, None without one."""
    return None if estimate is None else {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of *frame* as JSON can have them: numbers, texts, None for what is missing."""
    return [{str(k): _plain(v) for k, v in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        # NumPy's numbers are no Python numbers to a JSON writer.
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def statement_tables(statement: Statement) -> dict[str, pd.DataFrame]:
    """Return phases, findings, predictions and books of *statement* as tables, a column for each number."""
    findings = [_flat({k: v for k, v in finding_facts(f).items() if k != "evidence"}) for f in statement.findings]
    return {
        "phases": pd.DataFrame([_flat(phase_facts(phase)) for phase in statement.phases]),
        "findings": pd.DataFrame(findings),
        "predictions": pd.DataFrame([_flat(prediction_facts(p)) for p in statement.predictions]),
        "books": pd.DataFrame(
            [
                {"book": book["name"], "name": name, "value": value, "sentence": book["sentence"]}
                for book in book_facts(statement)
                for name, value in _flat(book["values"]).items()
            ]
        ),
        "doubts": pd.DataFrame({"doubt": list(statement.doubts)}),
    }


def difference_tables(differences: list[Difference]) -> dict[str, pd.DataFrame]:
    """Return the tables of a comparison by name."""
    return {
        "phases": pd.DataFrame([_flat(difference_facts(d)) for d in differences]),
        **{
            name: pd.concat([getattr(d, name).assign(phase=d.phase) for d in differences], ignore_index=True)
            for name in ("bars", "work", "modules")
        },
    }


# What is flat already, under the name of the estimate alone where it is one.
_ESTIMATE = {"value": "", "low": "_low", "high": "_high"}


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, dict) and set(value) == set(_ESTIMATE):
            flat |= {f"{key}{_ESTIMATE[name]}": inside for name, inside in value.items()}
        elif isinstance(value, dict):
            flat |= {f"{key}_{name}": inside for name, inside in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def check_csv_folder(folder: Path) -> None:
    """Refuse *folder* where something is that no table of ours replaces; raises UsageError."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another folder with --csv.")
    foreign = next((entry.name for entry in sorted(folder.iterdir()) if entry.suffix != ".csv"), None)
    if foreign is not None:
        raise UsageError(f"{folder} holds {foreign}, which is no table of a report: choose another folder with --csv.")


def write_csv(tables: dict[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write each of *tables* to a CSV file of its name in *folder*; raises RecordingError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, table in tables.items():
            path = folder / f"{name}.csv"
            _harmless(table).to_csv(path, index=False)
            written.append(path)
    except OSError as error:
        raise RecordingError(f"writing to {folder} failed ({error.strerror}): choose another folder.") from error
    return written


# What a spreadsheet takes for a formula (OWASP, CSV injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _harmless(table: pd.DataFrame) -> pd.DataFrame:
    """Return *table* with text that a spreadsheet would run as a formula behind an apostrophe, and no control codes."""

    def quoted(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return visible(f"'{value}" if value.startswith(_FORMULA) else value)

    text = [c for c in table.columns if not pd.api.types.is_numeric_dtype(table[c])]
    return table.assign(**{column: table[column].astype(object).map(quoted) for column in text})
