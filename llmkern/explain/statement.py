"""What a report says first: where the joules of a run go, and what would help most."""

from __future__ import annotations

from llmkern.explain import Explanation
from llmkern.explain.finding import share_of
from llmkern.text import quantity


def answer(explanation: Explanation) -> list[str]:
    """Return in up to three sentences what one unit of the main phase takes, what of it is waste, and the best fix.

    A figure whose interval holds zero is in none of them (see Weighed.unknown).
    """
    attribution = explanation.attribution
    if not attribution.accounts:
        return ["This run has no phase with both a weighed window and a timeline."]
    account = list(attribution.accounts.values())[-1]
    weight = account.weight
    unit = "A decoded token" if account.phase == "decode" else "A prefill"
    takes = f"{unit} takes {quantity(weight.latency_s.value, 's')}"
    parts = []
    if weight.energy_j is not None and account.gap_j is not None:
        takes += f" and {quantity(weight.energy_j.value, 'J')}"
        if not account.is_traced_longer:
            share = account.gap_j.value / weight.energy_j.value
            parts.append(f"{share:.0%} of the energy is spent while no kernel runs")
    if account.is_traced_longer:
        parts.append("how that splits is not known, for the traced run took longer")
    else:
        parts.append(f"the device is busy {account.busy_share:.0%} of the time, with {account.launches:,.0f} launches")
    said = [f"{takes}: {'; '.join(parts)}."]
    own = [f for f in explanation.findings if f.phase == account.phase and f.name == "overhead_kernels"]
    if own:
        share = share_of(account, own[0].energy_j, own[0].time_s)
        said.append(f"Converting numbers (quantize, dequantize, outliers, casts), with its gaps, is {share:.0%}.")
    best = [p for p in explanation.predictions if p.phase == account.phase and p.energy_j and p.energy_before_j]
    if best:
        most = min(best, key=lambda p: p.energy_j.value if p.energy_j else 0.0)
        assert most.energy_j is not None
        assert most.energy_before_j is not None
        said.append(
            f"What would help most: {most.change}, to {quantity(most.latency_s.value, 's')} and "
            f"{quantity(most.energy_j.value, 'J')} ({most.energy_j.value / most.energy_before_j - 1:+.0%})."
        )
    return said
