"""Why the joules went where they went: roofs, findings, what a fix would save, one run against another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.explain.finding import Finding
from llmkern.explain.findings import findings
from llmkern.explain.roofline import roofline
from llmkern.explain.whatif import Prediction, predict


@dataclass(frozen=True)
class Explanation:
    """What can be said about a run beyond its accounts; everything is computed when it is first asked for."""

    attribution: Attribution

    @cached_property
    def findings(self) -> list[Finding]:
        return findings(self.attribution)

    @cached_property
    def predictions(self) -> list[Prediction]:
        return predict(self.attribution)

    @cached_property
    def roofs(self) -> dict[str, pd.DataFrame]:
        return {phase: roofline(self.attribution, phase) for phase in self.attribution.accounts}
