"""Where the recorder changed the run too much for its times to be taken at face value."""

from __future__ import annotations

import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.explain.finding import Finding

TOO_LARGE = 0.25


def recorder_effect(attribution: Attribution) -> list[Finding]:
    """Return the phases that took much longer under the recorder than when they were weighed."""
    found = []
    for phase, account in attribution.accounts.items():
        if account.recorder_effect <= TOO_LARGE:
            continue
        times = {"weighed": account.weight.latency_s.value, "traced": account.traced_latency_s}
        found.append(
            Finding(
                "recorder_effect",
                phase,
                account.unit,
                f"Under the recorder {phase} took {account.recorder_effect:.0%} longer than when it was weighed: which "
                "gap has which cause may differ from the run that was weighed.",
                None,
                None,
                "traced latency / weighed latency - 1",
                "both passes did the same work",
                "trust the energy of kernels and of all gaps together; trace more repeats before trusting single gaps",
                pd.DataFrame({"pass": list(times), "latency_ms": [t * 1e3 for t in times.values()]}),
            )
        )
    return found
