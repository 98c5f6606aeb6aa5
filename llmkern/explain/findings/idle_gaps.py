"""The idle floor that is burned while no kernel runs, by cause."""

from __future__ import annotations

from functools import partial

import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.time.operators import UNIDENTIFIED
from llmkern.explain.finding import WORTH_TELLING, Finding, layer_waits, operator_name, readable, share_of
from llmkern.text import quantity

# Boundaries between token steps are a finding of their own, and so are waits inside layers.
_WHY = {
    "launch_bound": "the host had not issued the next kernel when the device ran dry",
    "sync_stall": "the host was blocked in a synchronisation or a read-back when the device ran dry",
    "dependency": "the next kernel waited for another stream",
    "launch_latency": "the next kernel was queued in time and needed the hardware's start-up",
    "profiler": "CUPTI was at work",
    "unknown": "the launch of the next kernel was not recorded",
}
_NEXT = {
    "launch_bound": "issue less or sooner: capture the step in a CUDA graph, fuse kernels, or compile the model",
    "sync_stall": "remove the read-backs, or move the decision that needs them to the device",
    "dependency": "look at the streams on the timeline: the event between them is what is waited for",
    "launch_latency": "fuse the kernels: a graph shortens this gap, only fusion removes it",
    "profiler": "none: it is not there without the recorder, and the weighed run does not pay for it",
    "unknown": "trace again: llmkern records the launches in a pass of its own",
}


def idle_gaps(attribution: Attribution) -> list[Finding]:
    """Return for each cause the gaps that it explains, with the operators in which the host was late."""
    found = []
    for phase, account in attribution.accounts.items():
        rows = attribution.split_gaps(phase, ["cause", "op", "module"])
        for cause, own in rows.groupby("cause", sort=False, observed=True):
            energy_j, time_s = attribution.cost(phase, gaps=partial(_caused, cause=str(cause)))
            share = share_of(account, energy_j, time_s)
            told = cause == "sync_stall" and layer_waits(attribution, phase)["launches"].sum() >= 1
            if cause == "token_boundary" or told or share < WORTH_TELLING:
                continue
            found.append(
                Finding(
                    f"idle_{cause}",
                    phase,
                    account.unit,
                    f"The device idles in {_gaps(own['launches'].sum())} because {_WHY[str(cause)]}{_mostly(own)}.",
                    energy_j,
                    time_s,
                    "(idle floor + busy host, W) x weighed gap time, shared by the traced gaps of this cause",
                    "the recorder costs the host as much at every launch",
                    _NEXT[str(cause)],
                    readable(own, ["op", "module"]),
                )
            )
    return found


def _caused(gaps: pd.DataFrame, cause: str) -> pd.Series:
    return gaps["cause"] == cause


def _mostly(rows: pd.DataFrame) -> str:
    """Say in which operators most of the time of *rows* is, nothing where none is known."""
    rows = rows[rows["op"] != UNIDENTIFIED]
    by_op = (
        rows.groupby("op", sort=False)[["launches", "duration_ns"]].sum().sort_values("duration_ns", ascending=False)
    )
    parts = [
        f"{operator_name(op)} {_gaps(row['launches'])}, {quantity(row['duration_ns'] / 1e9, 's')}"
        for op, row in by_op.head(2).iterrows()
    ]
    return f": {'; '.join(parts)}" if parts else ""


def _gaps(number: float) -> str:
    return "1 gap" if round(number) == 1 else f"{number:,.0f} gaps"
