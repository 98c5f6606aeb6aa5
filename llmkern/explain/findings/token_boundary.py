"""What lies between two forwards: the generate loop, sampling, stopping criteria."""

from __future__ import annotations

from llmkern.attribute.attribution import Attribution
from llmkern.explain.finding import WORTH_TELLING, Finding, readable, share_of


def token_boundary(attribution: Attribution) -> list[Finding]:
    """Return the idle time between two forwards of decode."""
    if "decode" not in attribution.accounts:
        return []
    account = attribution.accounts["decode"]
    rows = attribution.split_gaps("decode", ["cause", "op", "module"])
    own = rows[rows["cause"] == "token_boundary"]
    energy_j, time_s = attribution.cost("decode", gaps=lambda gaps: gaps["cause"] == "token_boundary")
    if own.empty or share_of(account, energy_j, time_s) < WORTH_TELLING:
        return []
    return [
        Finding(
            "token_boundary",
            "decode",
            account.unit,
            "Between two forwards the device waits for the generate loop: sampling, stopping criteria, preparing the "
            "next inputs.",
            energy_j,
            time_s,
            "(idle floor + busy host, W) x weighed gap time, shared by the traced gaps between two forwards",
            "the recorder costs the host as much at every launch",
            "keep sampling on the device, read the tokens back once at the end, or decode several sequences at once",
            readable(own, ["op"]),
        )
    ]
