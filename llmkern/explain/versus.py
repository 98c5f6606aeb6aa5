"""Runs against a baseline in one line each: by how much a phase differs, and whether that is outside the noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.energy.phases import PhaseWeight
from llmkern.errors import LlmkernError, UsageError
from llmkern.estimate import Estimate
from llmkern.explain.compare import NOT_DISTINGUISHABLE, tokens_of_unit
from llmkern.text import percent


@dataclass(frozen=True)
class Versus:
    """One phase of run number *run* (from 1) beside the baseline's, *per* token or unit.

    ``change_s`` and ``change_j`` are shares of the baseline, None where there is no energy.
    """

    run: int
    phase: str
    per: str
    before_s: Estimate
    after_s: Estimate
    before_j: Estimate | None
    after_j: Estimate | None

    @property
    def change_s(self) -> Estimate:
        return _share(self.before_s, self.after_s)

    @property
    def change_j(self) -> Estimate | None:
        if self.before_j is None or self.after_j is None:
            return None
        return _share(self.before_j, self.after_j)

    @property
    def verdict(self) -> str:
        """Return what is to be said of it: of its energy, of its time where there is none."""
        change = self.change_s if self.change_j is None else self.change_j
        return judged(change, ("more", "less") if self.change_j is not None else ("slower", "faster"))

    def exceeds(self, limit: float) -> bool:
        """Return whether it is above the baseline by more than the share *limit*, and outside the noise."""
        change = self.change_s if self.change_j is None else self.change_j
        return change.value > limit and change.low is not None and change.low > 0


class ExceededError(LlmkernError):
    """A run takes more than its baseline allows: for a developer's CI."""

    exit_code = 1


def _share(before: Estimate, after: Estimate) -> Estimate:
    return after.of_another_run().with_(before, lambda a, b: np.divide(a, b) - 1)


def judged(change: Estimate, words: tuple[str, str]) -> str:
    """Return a *change* as a share in words: how much in one of *words*, or that noise hides it."""
    if change.low is None or change.high is None:
        return f"{percent(abs(change.value), 1)} {words[change.value < 0]}, noise unknown"
    if change.low <= 0 <= change.high:
        return NOT_DISTINGUISHABLE
    return f"{percent(abs(change.value), 1)} {words[change.value < 0]}, outside the noise"


def weights(attribution: Attribution) -> dict[str, PhaseWeight]:
    """Return every phase that has a latency, with a timeline or without."""
    found = {weight.phase: weight for weight in attribution.only_weighed}
    return {name: account.weight for name, account in attribution.accounts.items()} | found


def versus(baseline: Attribution, others: list[Attribution]) -> list[Versus]:
    """Return each phase that a run shares with *baseline*, decode first; raises UsageError where one shares none."""
    found = []
    first = weights(baseline)
    for number, other in enumerate(others, start=1):
        second = weights(other)
        shared = [phase for phase in first if phase in second]
        if not shared:
            raise UsageError(
                f"{other.run.path} shares no phase with {baseline.run.path} in which both were weighed: compare "
                "complete runs, or trace the incomplete one again."
            )
        found += [
            _versus(number, (baseline, first[phase]), (other, second[phase]))
            for phase in sorted(shared, key=lambda phase: phase != "decode")
        ]
    return found


def _versus(number: int, one: tuple[Attribution, PhaseWeight], two: tuple[Attribution, PhaseWeight]) -> Versus:
    counts = [tokens_of_unit(attribution, weight.unit) for attribution, weight in (one, two)]
    per = "token" if all(counts) else two[1].unit
    scale = [1 / count if count and per == "token" else 1.0 for count in counts]
    (before, after), (a, b) = (one[1], two[1]), scale

    def joules(weight: PhaseWeight, by: float) -> Estimate | None:
        return None if weight.energy_j is None else weight.energy_j.scaled(by)

    latencies = before.latency_s.scaled(a), after.latency_s.scaled(b)
    return Versus(number, two[1].phase, per, *latencies, joules(before, a), joules(after, b))
