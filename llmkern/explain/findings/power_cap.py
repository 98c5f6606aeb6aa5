"""Phases that ran at the power cap, where the clock falls and a kernel's joules are those of the lower clock."""

from __future__ import annotations

import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.explain.finding import Finding

# NVML's bit for the software power cap.
_POWER_CAP = 0x4
_OFTEN = 0.05


def power_cap(attribution: Attribution) -> list[Finding]:
    """Return the phases in whose windows the clock was held down by the power cap."""
    run = attribution.run
    ranges = run.table("ranges", where={"pass": "weigh"})
    windows = ranges[ranges["category"] == "window"]
    readings = run.table("power", ["timestamp_ns", "throttle", "sm_clock_mhz"]).dropna()
    found = []
    for phase, account in attribution.accounts.items():
        own = windows[(windows["new_tokens"] == 1) == (phase == "prefill")]
        inside = pd.Series(False, index=readings.index)
        for start_ns, end_ns in own[["start_ns", "end_ns"]].itertuples(index=False):
            inside |= readings["timestamp_ns"].between(start_ns, end_ns)
        chosen = readings[inside]
        if chosen.empty:
            continue
        capped = (chosen["throttle"].astype("int64") & _POWER_CAP) != 0
        if capped.mean() < _OFTEN:
            continue
        clock_mhz, free_mhz = chosen.loc[capped, "sm_clock_mhz"].mean(), run.facts.device.sm_clock_max_mhz
        evidence = chosen.assign(capped=capped).groupby("capped")["sm_clock_mhz"].agg(["count", "mean"]).reset_index()
        found.append(
            Finding(
                "power_cap",
                phase,
                account.unit,
                f"The power cap held the clock down in {capped.mean():.0%} of the readings (mean {clock_mhz:.0f} MHz"
                + (f" of {free_mhz} MHz)." if free_mhz else ")."),
                None,
                None,
                "share of sensor readings with NVML's throttle reason 'software power cap'",
                f"{len(chosen)} readings stand for the time between them",
                "none for energy: a lower clock does the same work with fewer joules; for latency, raise the limit",
                evidence,
            )
        )
    return found
