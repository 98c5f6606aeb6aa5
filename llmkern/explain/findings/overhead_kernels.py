"""Kernels that only convert: quantize, dequantize, the search for outliers, casts."""

from __future__ import annotations

from llmkern.attribute.attribution import Attribution
from llmkern.explain.finding import WORTH_TELLING, Finding, cost, readable, share_of
from llmkern.text import quantity, with_interval

CONVERSIONS = ("quantize", "dequantize", "outlier", "cast")


def overhead_kernels(attribution: Attribution) -> list[Finding]:
    """Return the kernels that change how numbers are written and compute nothing with them, gaps not counted."""
    found = []
    for phase, account in attribution.accounts.items():
        rows = attribution.split(phase, ["kind", "op", "module"])
        own = rows[rows["kind"].isin(CONVERSIONS)]
        energy_j, time_s = cost(own)
        launches = float(own["launches"].sum())
        little = own.empty or share_of(account, energy_j, time_s) < WORTH_TELLING
        # Where they cost little themselves, their launches may still be most of all launches.
        if little and launches < 0.1 * account.launches:
            continue
        counts = own.groupby("kind")["launches"].sum().sort_values(ascending=False)
        kinds = ", ".join(f"{count:,.0f} {kind}" for kind, count in counts.items() if count >= 1)
        gaps = attribution.split_gaps(phase, ["kind"]) if len(attribution.gaps) else own.iloc[:0]
        gap_j, gap_s = cost(gaps[gaps["kind"].isin(CONVERSIONS)])
        around = ""
        if gap_s > 0:
            around = f" The gaps that end with them take {quantity(gap_s, 's')}"
            around += f" and {with_interval(gap_j, 'J')} more." if gap_j is not None else " more."
        found.append(
            Finding(
                "overhead_kernels",
                phase,
                account.unit,
                f"{launches:,.0f} of {account.launches:,.0f} launches ({launches / account.launches:.0%}) only convert "
                f"numbers: {kinds}.{around}",
                energy_j,
                time_s,
                "energy of the kernels of the kinds quantize, dequantize, outlier and cast",
                "the gaps before these launches are counted by their cause, not in these joules; they go with the "
                "launches as long as the host is what the device waits for",
                "fuse the conversion into the product that needs it",
                readable(own, ["kind", "op", "module"]),
            )
        )
    return found
