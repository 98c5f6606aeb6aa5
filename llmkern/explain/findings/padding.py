"""Tokens that are computed only because a batch pads its prompts to one length."""

from __future__ import annotations

import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.explain.finding import WORTH_TELLING, Finding


def padding(attribution: Attribution) -> list[Finding]:
    """Return the share of prefill that went into padding."""
    prompts = attribution.run.facts.prompts
    if "prefill" not in attribution.accounts or prompts is None:
        return []
    effective, computed = sum(prompts.effective_tokens), prompts.computed_tokens
    if effective >= computed:
        return []
    account = attribution.accounts["prefill"]
    wasted = 1 - effective / computed
    if wasted < WORTH_TELLING:
        return []
    energy = account.weight.energy_j
    lengths = pd.DataFrame({"sequence": range(len(prompts.effective_tokens))})
    lengths = lengths.assign(effective_tokens=prompts.effective_tokens, computed_tokens=prompts.tokens)
    return [
        Finding(
            "padding",
            "prefill",
            account.unit,
            f"{computed - effective:,} of {computed:,} prompt tokens ({wasted:.0%}) are padding: a computed token "
            f"costs {_per(energy, computed)}, an effective one {_per(energy, effective)}.",
            None if energy is None else energy.scaled(wasted),
            account.weight.latency_s.value * wasted,
            "energy of prefill x (1 - effective tokens / computed tokens)",
            "every computed token costs the same",
            "batch prompts of like length, or pack them without padding",
            lengths,
        )
    ]


def _per(energy: object, tokens: int) -> str:
    value = getattr(energy, "value", None)
    return "time only" if value is None else f"{value / tokens * 1e3:.1f} mJ"
