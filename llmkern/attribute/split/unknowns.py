"""Windows in which launches are known, and which joules per launch they leave unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# Windows of one signature whose mean powers, or clocks, are this close are of one regime.
SAME_POWER, SAME_CLOCK = 0.1, 0.03
# A class that takes less than this of a phase has no joules of its own there, but those of its replays.
OWN_CONTEXT_SHARE = 0.02
# A kernel that takes more than this of an operator's window sets the power at which that was.
DOMINANT = 0.5


@dataclass(frozen=True)
class Window:
    """One stretch between two counter ticks: J, s, the idle floor in W there, and launches per signature.

    *context* names the phase of the run that it saw, "" is a replay; *degrees* is by how many °C it was warmer than
    where the floor is known best. The sum of launches times joules may be off by the share *apart* of itself (one
    sigma): kernels leave one another's data in the caches. For *idle_s* of it no kernel ran but the host worked.
    """

    name: str
    energy_j: float
    seconds: float
    floor_w: float
    launches: Mapping[str, float]
    context: str = ""
    degrees: float = 0.0
    apart: float = 0.0
    clock_mhz: float | None = None
    idle_s: float = 0.0

    @property
    def mean_w(self) -> float:
        return self.energy_j / self.seconds

    @property
    def regime(self) -> float:
        """Return what the joules of a launch go with: the clock in MHz, or the mean power in W without one."""
        return self.mean_w if self.clock_mhz is None else self.clock_mhz


@dataclass(frozen=True)
class Unknowns:
    """What is looked for: per signature its joules in each regime in which it was replayed, and in each context.

    A signature that was seen in replays but never alone has one unknown there, in no certain regime.
    """

    names: tuple[str, ...]
    regimes: tuple[tuple[float, ...], ...]
    contexts: tuple[tuple[str, ...], ...]

    @cached_property
    def owners(self) -> np.ndarray:
        """Return for each unknown the index of its signature."""
        return np.repeat(np.arange(len(self.names)), self._counts)

    @cached_property
    def _counts(self) -> list[int]:
        return [len(p) + len(c) for p, c in zip(self.regimes, self.contexts, strict=True)]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *np.cumsum(self._counts).tolist()]

    def contexts_of(self, name: str) -> tuple[str, ...]:
        """Return the contexts in which *name* has joules of its own; raises ValueError for one that ran nowhere."""
        if name not in self._places:
            raise ValueError(f"{name} ran in no window")
        return self.contexts[self._places[name]]

    def first(self, index: int) -> int:
        """Return where the unknowns of signature *index* begin."""
        return self._firsts[index]

    def weights(self, name: str, context: str, regime: float) -> dict[int, float]:
        """Return which unknowns make up the joules of *name* in *context*, or in replays in *regime*.

        Between two regimes they are linear and beyond them constant. Raises ValueError for a name that ran nowhere.
        """
        if name not in self._places:
            raise ValueError(f"{name} ran in no window")
        index = self._places[name]
        first, powers = self.first(index), self.regimes[index]
        if context in self.contexts[index]:
            return {first + len(powers) + self.contexts[index].index(context): 1.0}
        # Of a signature that was never replayed another context is the next best.
        if len(powers) < 2 or regime <= powers[0]:
            return {first: 1.0}
        if regime >= powers[-1]:
            return {first + len(powers) - 1: 1.0}
        right = int(np.searchsorted(powers, regime))
        share = (regime - powers[right - 1]) / (powers[right] - powers[right - 1])
        return {first + right - 1: 1.0 - share, first + right: share}

    def row(self, launches: Mapping[str, float], context: str, regime: float) -> np.ndarray:
        """Return *launches* as factors of the unknowns."""
        row = np.zeros(len(self.owners))
        for name, count in launches.items():
            for unknown, weight in self.weights(name, context, regime).items():
                row[unknown] += count * weight
        return row


def find_unknowns(windows: Sequence[Window], guess: Mapping[str, float]) -> Unknowns:
    """Return what *windows* leave unknown; *guess* is about what a launch takes."""
    names = sorted({s for w in windows for s in w.launches})
    alone: dict[str, list[float]] = {n: [] for n in names}
    mixed: set[str] = set()
    contexts: dict[str, set[str]] = {n: set() for n in names}
    for window in windows:
        total = max(sum(count * guess[name] for name, count in window.launches.items()), 1e-12)
        for name, count in window.launches.items():
            share = count * guess[name] / total
            if window.context:
                contexts[name].update([window.context] if share >= OWN_CONTEXT_SHARE else [])
            elif share > DOMINANT:
                alone[name].append(window.regime)
            else:
                mixed.add(name)
    alike = SAME_POWER if any(w.clock_mhz is None for w in windows) else SAME_CLOCK
    powers: list[tuple[float, ...]] = []
    for name in names:
        clusters: list[list[float]] = []
        for regime in sorted(alone[name]):
            if clusters and regime <= clusters[-1][0] * (1 + alike):
                clusters[-1].append(regime)
            else:
                clusters.append([regime])
        powers.append(tuple(float(np.mean(c)) for c in clusters) or ((0.0,) if name in mixed else ()))
    for name, replayed in zip(names, powers, strict=True):
        if not replayed and not contexts[name]:
            # What was neither replayed nor is much of any phase costs the same in all.
            contexts[name].add(min(w.context for w in windows if name in w.launches))
    return Unknowns(tuple(names), tuple(powers), tuple(tuple(sorted(contexts[n])) for n in names))
