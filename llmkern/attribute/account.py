"""The account of one phase: its weighed energy as kernels, gaps and a residual."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llmkern.attribute.energy import Floor
from llmkern.attribute.estimate import Estimate, combine, from_samples
from llmkern.attribute.joules import EqualPower, KernelJoules
from llmkern.attribute.timeline import Timeline
from llmkern.attribute.weighed import PhaseWeight

# A board may exceed its limit for a moment, kernels on average may not.
POWER_LIMIT_SLACK = 1.05


@dataclass(frozen=True)
class PhaseAccount:
    """The energy of one phase, per unit (a prefill call or a decoded token step), on one device.

    energy = kernels + gaps + residual. ``gap_s`` is the weighed latency minus the kernels' busy time: the recorder
    lengthens the traced gaps, not the weighed ones. Energies are None without an energy counter.
    """

    phase: str
    unit: str
    weight: PhaseWeight
    launches: float
    busy_s: float
    gap_s: Estimate
    joules: KernelJoules | None
    gap_j: Estimate | None
    floor_w: Estimate | None
    traced_latency_s: float
    # By how much of itself the latency grew under the recorder; None where that was not measured.
    recorder_effect: Estimate | None = None

    @property
    def kernel_j(self) -> Estimate | None:
        return None if self.joules is None else self.joules.total

    @property
    def residual_j(self) -> float | None:
        """Return what the counter says beyond kernels and gaps."""
        if self.weight.energy_j is None or self.kernel_j is None or self.gap_j is None:
            return None
        return self.weight.energy_j.value - self.kernel_j.value - self.gap_j.value

    @property
    def busy_share(self) -> float:
        return min(1.0, self.busy_s / self.weight.latency_s.value)

    @property
    def mean_w(self) -> float | None:
        energy = self.weight.energy_j
        return None if energy is None else energy.value / self.weight.latency_s.value

    def by(self, joules: KernelJoules) -> PhaseAccount:
        """Return the same account with the kernels' energy split by *joules*."""
        return replace(self, joules=joules)


def account_phase(
    weight: PhaseWeight, floor: Floor | None, temperature_c: float | None, timeline: Timeline, limit_mw: int | None
) -> PhaseAccount | None:
    """Return the first-form account: gaps at the idle floor, the rest to the kernels, who draw equal power.

    None when the timeline holds nothing of the phase.
    """
    traced = timeline.phases[timeline.phases["phase"] == weight.phase]
    steps = int(traced["tokens"].sum())
    if steps == 0 or not traced["kernels"].any():
        return None
    busy_s = float(traced["busy_ns"].sum()) / 1e9 / steps
    latency = weight.latency_s
    gap_s = combine(max(0.0, latency.value - busy_s), latency.half_width)
    floor_w = floor.at(temperature_c) if floor is not None else None
    joules = gap_j = None
    energy = weight.energy_j
    if energy is not None and floor_w is not None:
        gap_j = combine(
            floor_w.value * gap_s.value,
            _product(gap_s.value, floor_w.half_width),
            _product(floor_w.value, gap_s.half_width),
        )
        rest_j = energy.value - gap_j.value
        # No kernel draws less than the idle board or more than the limit; what does not fit stays a residual.
        most_w = np.inf if limit_mw is None else limit_mw / 1e3 * POWER_LIMIT_SLACK
        value = float(np.clip(rest_j, floor_w.value * busy_s, most_w * busy_s))
        total = combine(value, _spread_of_rest(weight, busy_s, floor_w), _product(gap_s.value, floor_w.half_width))
        joules = EqualPower(total, floor_w.value, busy_s)
    return PhaseAccount(
        weight.phase,
        weight.unit,
        weight,
        float(traced["kernels"].sum()) / steps,
        busy_s,
        gap_s,
        joules,
        gap_j,
        floor_w,
        float(traced["wall_ns"].sum()) / 1e9 / steps,
    )


def _spread_of_rest(weight: PhaseWeight, busy_s: float, floor_w: Estimate) -> float | None:
    """Return the half-width of the energy above the floor of the gaps, round by round.

    A round that the host slowed down has longer gaps and more energy; what is left for the kernels stays the same.
    """
    rest_j = [
        energy_j - floor_w.value * max(0.0, latency_s - busy_s)
        for energy_j, latency_s in zip(weight.energy_samples_j, weight.latency_samples_s, strict=True)
        if energy_j == energy_j
    ]
    return from_samples(rest_j).half_width


def _product(a: float, b: float | None) -> float | None:
    return None if b is None else a * b
