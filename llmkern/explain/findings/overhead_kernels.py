"""Kernels that only convert: quantize, dequantize, the search for outliers, casts."""

from __future__ import annotations

import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.estimate import Estimate
from llmkern.explain.finding import WORTH_TELLING, Finding, readable, share_of
from llmkern.text import quantity, with_interval

CONVERSIONS = ("quantize", "dequantize", "outlier", "cast")


def overhead_kernels(attribution: Attribution) -> list[Finding]:
    """Return the kernels that change how numbers are written and compute nothing with them, and the gaps before."""
    found = []
    for phase, account in attribution.accounts.items():
        rows = attribution.split(phase, ["kind", "op", "module"])
        own = rows[rows["kind"].isin(CONVERSIONS)]
        launches = float(own["launches"].sum())
        gap_j, gap_s = attribution.cost(phase, gaps=_converts)
        kernel_j, kernel_s = attribution.cost(phase, kernels=_converts)
        energy_j, time_s = attribution.cost(phase, kernels=_converts, gaps=_converts)
        if own.empty or share_of(account, energy_j, time_s) < WORTH_TELLING:
            continue
        counts = own.groupby("kind")["launches"].sum().sort_values(ascending=False)
        kinds = ", ".join(f"{count:,.0f} {kind}" for kind, count in counts.items() if count >= 1)
        around = f", the idle gaps that each of them ends {_cost(gap_j, gap_s)}" if gap_s > 0 else ""
        found.append(
            Finding(
                "overhead_kernels",
                phase,
                account.unit,
                f"{launches:,.0f} of {account.launches:,.0f} launches ({launches / account.launches:.0%}) only convert "
                f"numbers: {kinds}. Their kernels take {_cost(kernel_j, kernel_s)}{around}.",
                energy_j,
                time_s,
                "energy of the kernels of the kinds quantize, dequantize, outlier and cast + that of the gaps "
                "that end with one of them",
                "a gap belongs to the launch that ends it: without it, the device would not have waited for it",
                "fuse the conversion into the product that needs it",
                readable(own, ["kind", "op", "module"]),
            )
        )
    return found


def _converts(rows: pd.DataFrame) -> pd.Series:
    return rows["kind"].isin(CONVERSIONS)


def _cost(energy_j: Estimate | None, time_s: float) -> str:
    text = quantity(time_s, "s")
    return text if energy_j is None else f"{text} and {with_interval(energy_j, 'J')}"
