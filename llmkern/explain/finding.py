"""What a finding is: a claim with its joules, the rows that show it, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.split.account import PhaseAccount
from llmkern.estimate import Estimate

# What is less of a phase than this is not worth a sentence.
WORTH_TELLING = 0.02


@dataclass(frozen=True)
class Finding:
    """One thing that a run shows of *phase*, per unit of it (a prefill call or a decoded token step).

    *energy_j* and *time_s* are what it costs, None where that is not known; *evidence* are the rows that it rests on,
    *formula* says how the joules follow from them, *assumption* what has to hold for that, *next_step* what to do.
    """

    name: str
    phase: str
    unit: str
    claim: str
    energy_j: Estimate | None
    time_s: float | None
    formula: str
    assumption: str
    next_step: str
    evidence: pd.DataFrame = field(default_factory=pd.DataFrame)


def share_of(account: PhaseAccount, energy_j: Estimate | None, time_s: float | None) -> float:
    """Return what share of the phase's energy that is, of its latency where no energy is known."""
    whole = account.weight.energy_j
    if energy_j is not None and whole is not None:
        return energy_j.value / whole.value
    return (time_s or 0.0) / account.weight.latency_s.value


def layers(attribution: Attribution) -> int | None:
    """Return how many decoder layers the model has, None where the run does not say."""
    model = attribution.run.facts.model
    return model.layers or None if model is not None else None


def layer_waits(attribution: Attribution, phase: str) -> pd.DataFrame:
    """Return the host calls of one unit of *phase* that wait for the device inside a layer (rows of tally_calls)."""
    if attribution.host_trace is None:
        return pd.DataFrame(columns=["op", "module", "launches", "duration_ns"])
    calls = attribution.host_trace.tally
    return calls[(calls["phase"] == phase) & calls["waits"] & calls["layer"].notna()]


def operator_name(op: object) -> str:
    """Return the name of an operator without the overload that nearly all have."""
    return str(op).removesuffix(".default")


def readable(rows: pd.DataFrame, columns: list[str], top: int = 5) -> pd.DataFrame:
    """Return the first *top* of *rows* with *columns*, times as ms and energies as they are."""
    chosen = rows.head(top).copy()
    chosen["time_ms"] = chosen["duration_ns"] / 1e6
    known = [c for c in (*columns, "launches", "time_ms", "energy_j", "low_j", "high_j") if c in chosen]
    return chosen[known].replace({np.nan: None}).reset_index(drop=True)
