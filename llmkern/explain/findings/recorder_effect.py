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
        effect = account.recorder_effect
        if effect is None or effect.low is None or effect.high is None or effect.low <= TOO_LARGE:
            continue
        rows = pd.DataFrame({"pairs": [effect.samples], "low": [effect.low], "high": [effect.high]})
        found.append(
            Finding(
                "recorder_effect",
                phase,
                account.unit,
                f"The recorder makes {phase} {effect.value:.0%} [{effect.low:.0%}, {effect.high:.0%}] longer: which "
                "gap has which cause may differ from the run that was weighed.",
                None,
                None,
                "latency with / without the recorder - 1, of generations that took turns",
                "the pairs are independent of each other",
                "trust the energy of kernels and of all gaps together; trace more repeats before trusting single gaps",
                rows,
            )
        )
    return found
