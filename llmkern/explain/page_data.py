"""What a page shows beside the statement."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.explain import Explanation
from llmkern.explain.compare import Difference, compare
from llmkern.explain.tables import run_tables
from llmkern.explain.token_step import TokenStep, token_step
from llmkern.runfolder.facts import RunFacts


@dataclass(frozen=True)
class PageData:
    """All tables, the token step to look at, and the change from the run that *baseline* are the facts of."""

    tables: dict[str, pd.DataFrame]
    step: TokenStep | None = None
    compared: tuple[Difference, ...] = ()
    baseline: RunFacts | None = None


def page_data(explanation: Explanation, baseline: Attribution | None = None) -> PageData:
    """Return what the page of a run shows; raises UsageError where it cannot be compared with *baseline*."""
    tables, step = run_tables(explanation), token_step(explanation.attribution)
    if baseline is None:
        return PageData(tables, step)
    return PageData(tables, step, tuple(compare(baseline, explanation.attribution)), baseline.run.facts)
