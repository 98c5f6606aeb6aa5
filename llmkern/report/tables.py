"""Every table of a run under one name each, with units in the columns: what CSV, JSON and the page share."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.account import PhaseAccount
from llmkern.attribute.attribution import Attribution
from llmkern.errors import RecordingError, UsageError
from llmkern.estimate import Estimate
from llmkern.explain import Explanation
from llmkern.explain.compare import Difference, change, tokens
from llmkern.explain.finding import Finding
from llmkern.explain.whatif import Prediction
from llmkern.text import visible


def phase_table(attribution: Attribution) -> pd.DataFrame:
    """Return a row per phase: what one unit of it took, and where it went."""
    return pd.DataFrame([_phase(attribution, account) for account in attribution.accounts.values()])


def run_tables(explanation: Explanation) -> dict[str, pd.DataFrame]:
    """Return the tables of a run by name; energies are per unit of the phase, NaN where they are not known."""
    attribution = explanation.attribution
    found = {"phases": phase_table(attribution)}
    splits = {"kinds": ["kind"], "kernels": ["kind", "name"], "operators": ["kind", "op", "module"]}
    for name, keys in splits.items():
        found[name] = _per_phase(attribution, lambda phase, keys=keys: attribution.split(phase, keys))
    if len(attribution.gaps):
        for name, keys in {"causes": ["cause"], "gaps": ["cause", "kind", "op", "module"]}.items():
            found[name] = _per_phase(attribution, lambda phase, keys=keys: attribution.split_gaps(phase, keys))
    layers = _per_phase(attribution, lambda phase: attribution.split(phase, ["layer", "kind"]))
    found["layers"] = layers[layers["layer"].notna()] if len(layers) else layers
    if attribution.host_trace is not None:
        calls = attribution.host_trace.tally
        found["host_calls"] = (
            calls.groupby(["phase", "api", "waits", "op", "module"], sort=False)[["launches", "duration_ns"]]
            .sum()
            .reset_index()
        )
    found["roofline"] = _per_phase(attribution, lambda phase: explanation.roofs[phase])
    found["findings"] = pd.DataFrame([_flat(finding_facts(f), drop=("evidence",)) for f in explanation.findings])
    found["predictions"] = pd.DataFrame([_flat(prediction_facts(p)) for p in explanation.predictions])
    return found


def difference_tables(differences: list[Difference]) -> dict[str, pd.DataFrame]:
    """Return the tables of a comparison by name, energies and times per token."""
    return {
        "phases": pd.DataFrame([_flat(difference_facts(d)) for d in differences]),
        **{
            name: pd.concat([getattr(d, name).assign(phase=d.phase) for d in differences], ignore_index=True)
            for name in ("bars", "work", "modules")
        },
    }


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


def finding_facts(finding: Finding) -> dict[str, Any]:
    """Return *finding* as plain values."""
    facts = {name: getattr(finding, name) for name in ("name", "phase", "unit", "claim", "time_s")}
    told = {name: getattr(finding, name) for name in ("formula", "assumption", "next_step")}
    return {**facts, "energy_j": estimate_facts(finding.energy_j), **told, "evidence": records(finding.evidence)}


def prediction_facts(prediction: Prediction) -> dict[str, Any]:
    """Return *prediction* as plain values."""
    facts = asdict(prediction)
    return {**facts, "latency_s": estimate_facts(prediction.latency_s), "energy_j": estimate_facts(prediction.energy_j)}


def difference_facts(difference: Difference) -> dict[str, Any]:
    """Return the totals of *difference* as plain values, per token."""
    checked = difference.checked
    facts: dict[str, Any] = {
        "phase": difference.phase,
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
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return None
    if isinstance(value, np.generic):
        return _plain(value.item())
    return value


def _flat(facts: dict[str, Any], drop: tuple[str, ...] = ()) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if key in drop:
            continue
        if isinstance(value, dict):
            inner = _flat(value)
            flat |= {f"{key}_{name}": inside for name, inside in inner.items()}
        else:
            flat[key] = value
    return flat


def _per_phase(attribution: Attribution, of: Any) -> pd.DataFrame:
    parts = [of(phase) for phase in attribution.accounts]
    tables = [part.assign(phase=phase) for phase, part in zip(attribution.accounts, parts, strict=True)]
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    return table[["phase", *(c for c in table.columns if c != "phase")]]


def _phase(attribution: Attribution, account: PhaseAccount) -> dict[str, Any]:
    count = tokens(attribution, account)
    weight, effect = account.weight, account.recorder_effect
    row: dict[str, Any] = {"phase": account.phase, "unit": account.unit, "tokens_per_unit": count}
    estimates = {
        "latency_s": weight.latency_s,
        "energy_j": weight.energy_j,
        "energy_per_token_j": None if weight.energy_j is None else weight.energy_j.scaled(1 / count),
        "gap_s": account.gap_s,
        "kernel_j": account.kernel_j,
        "gap_j": account.gap_j,
        "floor_w": account.floor_w,
    }
    for name, estimate in estimates.items():
        row[name] = None if estimate is None else estimate.value
        row[f"{name}_low"] = None if estimate is None else estimate.low
        row[f"{name}_high"] = None if estimate is None else estimate.high
    return row | {
        "tokens_per_s": count / weight.latency_s.value,
        "mean_w": account.mean_w,
        "busy_s": account.busy_s,
        "busy_share": account.busy_share,
        "launches": account.launches,
        "residual_j": account.residual_j,
        "recorder_effect": None if effect is None else effect.value,
        "recorder_effect_low": None if effect is None else effect.low,
        "recorder_effect_high": None if effect is None else effect.high,
    }
