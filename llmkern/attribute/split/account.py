"""The account of one phase: its weighed energy as kernels, gaps and a residual."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llmkern.attribute.energy.phases import PhaseWeight
from llmkern.attribute.split.kernel_joules import EqualPower, KernelJoules
from llmkern.attribute.time.timeline import Timeline
from llmkern.estimate import Estimate, from_samples

# An H100 limited to 700 W drew up to 711 W on average under products back to back, and a counter has a gain of its own.
POWER_LIMIT_SLACK = 1.05

# By so little a traced run may be longer than the weighed one.
TRACED_ALIKE = 0.02


@dataclass(frozen=True)
class PhaseAccount:
    """The energy of one phase, per unit (a prefill call or a decoded token step), on one device.

    energy = kernels + gaps + residual. ``gap_s`` is the weighed latency minus the kernels' busy time: the recorder
    lengthens the traced gaps, not the weighed ones. ``busy_s`` is what was traced, ``traced_busy_s``, or the weighed
    latency where that is shorter. Energies are None without an energy counter.
    """

    phase: str
    unit: str
    weight: PhaseWeight
    launches: float
    busy_s: float
    traced_busy_s: float
    gap_s: Estimate
    joules: KernelJoules | None
    gap_j: Estimate | None
    floor_w: Estimate | None
    traced_latency_s: float
    # By how much of itself the latency grew under the recorder; None where that was not measured.
    recorder_effect: Estimate | None = None
    # What a busy host adds to the floor in gaps, as far as the windows tell; gap_j holds it.
    host_adds_w: Estimate | None = None

    @property
    def latency_s(self) -> float:
        return self.weight.latency_s.value

    @property
    def kernel_j(self) -> Estimate | None:
        return None if self.joules is None else self.joules.total

    @property
    def residual(self) -> Estimate | None:
        """Return what the counter says beyond kernels and gaps, in J."""
        if self.weight.energy_j is None or self.kernel_j is None or self.gap_j is None:
            return None
        return self.weight.energy_j - self.kernel_j - self.gap_j

    @property
    def residual_j(self) -> float | None:
        return None if self.residual is None else self.residual.value

    @property
    def busy_share(self) -> float:
        latency_s = self.weight.latency_s.value
        # A capture may hold nothing but records of no length.
        return self.busy_s / latency_s if latency_s > 0 else 0.0

    @property
    def is_traced_longer(self) -> bool:
        """Whether kernels alone took longer in the traced run than the phase takes when weighed, by more than a little.

        A device that is never idle takes as long in both, to within what a recorder changes.
        """
        return self.traced_busy_s > (1 + TRACED_ALIKE) * self.weight.latency_s.value

    @property
    def traced_scale(self) -> float:
        """Return what traced times of kernels are multiplied by so that they fit into the weighed phase, at most 1."""
        return self.busy_s / self.traced_busy_s if self.traced_busy_s > self.busy_s else 1.0

    @property
    def mean_w(self) -> float | None:
        energy = self.weight.energy_j
        return None if energy is None else energy.value / self.weight.latency_s.value

    def by(self, joules: KernelJoules, host_adds_w: Estimate | None) -> PhaseAccount:
        """Return the same account with the kernels' energy split by *joules* and *host_adds_w* in gaps."""
        gap_j = self.gap_j
        if gap_j is not None and self.floor_w is not None and host_adds_w is not None:
            gap_j = ((self.floor_w + host_adds_w) * self.gap_s).within(self.weight.energy_j)
        return replace(self, joules=joules, gap_j=gap_j, host_adds_w=host_adds_w)


def account_phase(
    weight: PhaseWeight, floor_w: Estimate | None, timeline: Timeline, limit_mw: int | None
) -> PhaseAccount | None:
    """Return the first-form account: gaps at the idle floor, the rest to the kernels, who draw equal power.

    None when the timeline holds nothing of the phase.
    """
    traced = timeline.phases[timeline.phases["phase"] == weight.phase]
    steps = int(traced["tokens"].sum())
    if steps == 0 or not traced["kernels"].any():
        return None
    traced_s = float(traced["busy_ns"].sum()) / 1e9 / steps
    latency = weight.latency_s
    # A recorder may make kernels no shorter: what was busy for longer than the phase takes was another phase.
    busy_s = min(traced_s, latency.value)
    gap_s = latency.map(lambda seconds: np.maximum(0.0, seconds - busy_s))
    joules = gap_j = None
    energy = weight.energy_j
    if energy is not None and floor_w is not None:
        gap_j = (floor_w * gap_s).within(energy)
        # No kernel draws less than the idle board or more than the limit; what does not fit stays a residual.
        most_w = np.inf if limit_mw is None else limit_mw / 1e3 * POWER_LIMIT_SLACK
        rest_j = _rest(weight, energy.value - gap_j.value, busy_s, floor_w)
        total = rest_j.with_(floor_w, lambda j, w: np.clip(j, w * busy_s, most_w * busy_s)).within(energy)
        joules = EqualPower(total, floor_w, busy_s, unlike=True)
    return PhaseAccount(
        weight.phase,
        weight.unit,
        weight,
        float(traced["kernels"].sum()) / steps,
        busy_s,
        traced_s,
        gap_s,
        joules,
        gap_j,
        floor_w,
        float(traced["wall_ns"].sum()) / 1e9 / steps,
    )


def _rest(weight: PhaseWeight, value_j: float, busy_s: float, floor_w: Estimate) -> Estimate:
    """Return the energy of a phase above the floor of its gaps, *value_j*, with what it is round by round.

    A round that the host slowed down has longer gaps and more energy; what is left for the kernels stays the same.
    """
    rounds = zip(weight.energy_samples_j, weight.latency_samples_s, strict=True)
    known = [(energy_j, max(0.0, latency_s - busy_s)) for energy_j, latency_s in rounds if energy_j == energy_j]
    rest = from_samples([energy_j - floor_w.value * gap_s for energy_j, gap_s in known])
    if rest.draws is None or floor_w.draws is None:
        return Estimate(value_j, samples=rest.samples)
    # The floor errs alike in all rounds.
    gap_s = float(np.median([gap_s for _, gap_s in known]))
    draws = rest.draws - rest.value + value_j - (floor_w.draws - floor_w.value) * gap_s
    return Estimate.of(value_j, draws, rest.samples)
