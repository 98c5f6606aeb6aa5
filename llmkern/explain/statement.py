"""Everything that a report says of a run, as data: terminal, page, JSON and CSV render it and add nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.energy.phases import PhaseWeight
from llmkern.attribute.split.account import PhaseAccount
from llmkern.estimate import Estimate
from llmkern.explain import Explanation
from llmkern.explain.books import Book, books
from llmkern.explain.compare import tokens
from llmkern.explain.devices import devices_table
from llmkern.explain.doubts import doubts
from llmkern.explain.finding import Finding, share_of
from llmkern.explain.tables import shown_tables
from llmkern.explain.whatif import Prediction
from llmkern.runfolder.facts import RunFacts
from llmkern.text import quantity

# The low end of what CPU-energy studies use for DDR DIMMs: 3 W per 8 GB (CodeCarbon's methodology page).
RAM_W_PER_GIB = 0.375


@dataclass(frozen=True)
class Part:
    """Energy that is part of a phase's: an estimate in J, and its share of the whole."""

    energy_j: Estimate
    share: float


@dataclass(frozen=True)
class PhaseStatement:
    """One phase per unit of it; None is what the run does not say.

    ``tokens`` is how many a unit stands for. ``memory_j`` is what of the energy the device's memory took, ``host_j``
    the host's CPU packages, and ``ram_j`` an estimate from the size of the host's memory. Where ``traced_longer`` is
    true the split is that of the traced run (see PhaseAccount).
    """

    phase: str
    unit: str
    tokens: int | None
    latency_s: Estimate
    energy_j: Estimate | None
    energy_per_token_j: Estimate | None
    tokens_per_s: float | None
    mean_w: float | None
    busy_share: float
    busy_s: float
    launches: float
    gap_s: Estimate
    kernels: Part | None
    gaps: Part | None
    residual: Part | None
    floor_w: Estimate | None
    host_adds_w: Estimate | None
    recorder_effect: Estimate | None
    memory_j: Estimate | None
    host_j: Estimate | None
    ram_j: float | None
    traced_longer: bool


@dataclass(frozen=True)
class Told:
    """A finding and what share of its phase it is: of the energy, or of the time where no energy is known."""

    finding: Finding
    share: float


@dataclass(frozen=True)
class Statement:
    """What a report says; ``shown`` are the rows that it shows (see shown_tables).

    ``note`` says why there is no split; ``devices`` are all of several (see devices_table).
    """

    facts: RunFacts
    folder: str
    status: str
    complete: bool
    answer: tuple[str, ...]
    phases: tuple[PhaseStatement, ...]
    only_weighed: tuple[PhaseWeight, ...]
    note: str
    devices: pd.DataFrame
    findings: tuple[Told, ...]
    predictions: tuple[Prediction, ...]
    shown: dict[str, pd.DataFrame]
    books: tuple[Book, ...]
    doubts: tuple[str, ...]

    def phase(self, name: str) -> PhaseStatement:
        """Return the phase called *name*; raises KeyError without one."""
        return {phase.phase: phase for phase in self.phases}[name]


def state(explanation: Explanation, top: int = 8) -> Statement:
    """Return what a report says of a run; its longer tables have *top* rows for each phase."""
    attribution = explanation.attribution
    run = attribution.run
    accounts = attribution.accounts
    return Statement(
        run.facts,
        str(run.path),
        run.status,
        run.complete,
        tuple(answer(explanation)),
        tuple(_phase(attribution, account) for account in accounts.values()),
        tuple(attribution.only_weighed),
        _note(attribution),
        devices_table(attribution),
        tuple(Told(f, share_of(accounts[f.phase], f.energy_j, f.time_s)) for f in explanation.findings),
        tuple(explanation.predictions),
        shown_tables(attribution, top),
        tuple(books(attribution)),
        tuple(doubts(run, attribution)),
    )


def _note(attribution: Attribution) -> str:
    if attribution.weighed is None or not attribution.only_weighed:
        return ""
    if attribution.accounts:
        return "Weighed, but without one whole phase in the timeline, so that its energy cannot be split:"
    if not attribution.run.has("kernels") and attribution.run.complete:
        return "Table kernels is not there, so energy cannot be split; the phases as weighed:"
    if attribution.run.facts.imported is not None and attribution.run.has("kernels"):
        return (
            "The capture has no prefill or decode to give the joules to (name its ranges with --phase NAME=PHASE); the "
            "phases as weighed:"
        )
    return "The timeline pass recorded no kernels, so energy cannot be split; the phases as weighed:"


def _phase(attribution: Attribution, account: PhaseAccount) -> PhaseStatement:
    facts, weight, phase = attribution.run.facts, account.weight, account.phase
    count, energy = tokens(attribution, account), weight.energy_j
    host = attribution.host.phases.get(phase) if attribution.host is not None else None
    ram_w = RAM_W_PER_GIB * facts.host.memory_bytes / 2**30 if facts.options.estimate_ram else None

    def part(value: Estimate | None) -> Part | None:
        return None if value is None or energy is None else Part(value, value.value / energy.value)

    residual_j = account.residual_j
    return PhaseStatement(
        phase,
        account.unit,
        count,
        weight.latency_s,
        energy,
        None if energy is None or count is None else energy.scaled(1 / count),
        None if count is None else count / account.latency_s,
        account.mean_w,
        account.busy_share,
        account.busy_s,
        account.launches,
        account.gap_s,
        part(account.kernel_j),
        part(account.gap_j),
        part(None if residual_j is None else Estimate(residual_j)),
        account.floor_w,
        account.host_adds_w,
        account.recorder_effect,
        attribution.memory.get(phase),
        None if host is None else host.energy_j,
        None if ram_w is None else ram_w * account.latency_s,
        account.is_traced_longer,
    )


def answer(explanation: Explanation) -> list[str]:
    """Return in up to three sentences what one unit of the main phase takes, what of it is waste, and the best fix.

    A figure whose interval holds zero is in none of them (see Weighed.unknown).
    """
    attribution = explanation.attribution
    if not attribution.accounts:
        return ["This run has no phase with both a weighed window and a timeline."]
    account = list(attribution.accounts.values())[-1]
    weight = account.weight
    unit = "A decoded token" if account.phase == "decode" else f"One {account.unit} of {account.phase}"
    unit = "A prefill" if account.phase == "prefill" else unit
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
    if account.is_traced_longer:
        # Nothing stands on a split that is not known.
        return said
    own = [f for f in explanation.findings if f.phase == account.phase and f.name == "overhead_kernels"]
    if own:
        share = share_of(account, own[0].energy_j, own[0].time_s)
        said.append(f"Converting numbers (quantize, dequantize, outliers, casts), with its gaps, is {share:.0%}.")
    best = [p for p in explanation.predictions if p.phase == account.phase and p.saves is not None]
    if best:
        most = min(best, key=lambda p: p.energy_j.value if p.energy_j else 0.0)
        assert most.saves is not None
        said.append(
            f"What would help most: {most.change}, to {quantity(most.latency_s.value, 's')} and "
            f"{quantity(most.energy_j.value if most.energy_j else None, 'J')} ({-most.saves:+.0%})."
        )
    return said
