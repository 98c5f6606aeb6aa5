"""What replays alone say that a phase takes, against what the counter says: the evidence for joules per launch.

The residual of a fit that has seen the run's own windows is small whatever it says of kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmkern.attribute.energy.phases import PhaseWeight, Weighed
from llmkern.attribute.split.account import PhaseAccount
from llmkern.attribute.split.estimator import estimate_marginals
from llmkern.attribute.split.evidence import Evidence
from llmkern.attribute.split.prior import PRIOR_SIGMA
from llmkern.estimate import DRAWS, Estimate, from_samples


@dataclass(frozen=True)
class Closure:
    """J of a unit of *phase* by the idle floor and the replays alone, and its *error*: that / the counter - 1.

    *guessed_share* of it are classes of kernels that were not replayed, by the prior.
    """

    phase: str
    energy_j: Estimate
    error: Estimate
    guessed_share: float


def closures(evidence: Evidence, weighed: Weighed, accounts: Mapping[str, PhaseAccount]) -> dict[str, Closure]:
    """Return the closure of each phase of which an energy is known; empty without replays."""
    replays = [w for w in evidence.windows if not w.context]
    floor = weighed.floor
    if not replays or floor is None:
        return {}
    alone = estimate_marginals(replays, evidence.features, doubt=evidence.doubt, most_w=evidence.most_w)
    replayed = set(alone.unknowns.names)
    factors = np.exp(np.random.default_rng(6).normal(0.0, PRIOR_SIGMA, DRAWS))
    found = {}
    for phase, account in accounts.items():
        if account.weight.energy_j is None:
            continue
        steps = evidence.steps[phase]["launches"]
        known = {str(name): float(count) for name, count in steps.items() if name in replayed}
        values_j, draws_j = alone.launches(list(known), "", evidence.regimes.get(phase, 0.0))
        counts = np.array(list(known.values()))
        guessed_j = sum(
            float(count) * alone.guess_j(evidence.features[str(name)])
            for name, count in steps.items()
            if name not in replayed
        )
        # Its draws are those that the joules per launch assumed.
        floor_w = floor.at(weighed.temperature_of(phase))
        at_floor = floor_w.scaled(account.latency_s)
        total_j = float(values_j @ counts) + guessed_j
        energy_j = at_floor + Estimate.of(total_j, draws_j @ counts + guessed_j * factors)
        error = _error(energy_j, floor_w.value, account.weight)
        found[phase] = Closure(phase, energy_j, error, guessed_j / max(energy_j.value, 1e-12))
    return found


def _error(made: Estimate, floor_w: float, weight: PhaseWeight) -> Estimate:
    """Return *made* / counter - 1, the counter round by round.

    A round that the host slowed down is longer and costs more, both at the floor: that is no error of the replays.
    """
    assert made.draws is not None
    rounds = [
        (made.value + floor_w * (latency_s - weight.latency_s.value)) / energy_j - 1
        for energy_j, latency_s in zip(weight.energy_samples_j, weight.latency_samples_s, strict=True)
        if energy_j == energy_j
    ]
    measured = from_samples(rounds)
    doubt = (made.draws - made.value) / (weight.energy_j.value if weight.energy_j is not None else made.value)
    draws = doubt if measured.draws is None else measured.draws + doubt
    return Estimate.of(measured.value, draws)
