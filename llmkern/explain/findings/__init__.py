"""The findings, each in a file of its own behind one signature; adding one is adding a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from llmkern.attribute.attribution import Attribution
from llmkern.explain.finding import Finding, share_of
from llmkern.explain.findings.fragmentation import fragmentation
from llmkern.explain.findings.idle_gaps import idle_gaps
from llmkern.explain.findings.low_roof import low_roof
from llmkern.explain.findings.overhead_kernels import overhead_kernels
from llmkern.explain.findings.padding import padding
from llmkern.explain.findings.power_cap import power_cap
from llmkern.explain.findings.recorder_effect import recorder_effect
from llmkern.explain.findings.synchronizations import synchronizations
from llmkern.explain.findings.token_boundary import token_boundary

FINDINGS: tuple[Callable[[Attribution], list[Finding]], ...] = (
    idle_gaps,
    synchronizations,
    overhead_kernels,
    fragmentation,
    low_roof,
    padding,
    token_boundary,
    power_cap,
    recorder_effect,
)


def findings(attribution: Attribution) -> list[Finding]:
    """Return what the run shows: decode before prefill, the largest share of the phase's energy first."""
    found = [finding for find in FINDINGS for finding in find(attribution)]
    order = list(reversed(attribution.accounts))

    def rank(finding: Finding) -> tuple[int, float]:
        share = share_of(attribution.accounts[finding.phase], finding.energy_j, finding.time_s)
        return order.index(finding.phase), -share

    return sorted(found, key=rank)
