"""Joules per launch of each operator signature, from windows in which the counter moved by a known amount.

Model (facts and limits: README, "How it works"): in a window of t seconds

    energy = floor x t + sum over signatures of launches x joules per launch + error

with joules per launch above the idle floor and not negative. Windows come from replays, where one signature ran alone,
and from the run itself, where all ran together. What the data leave open is held by a weak prior from bytes and FLOPs.

What a launch costs depends on where it runs. Towards the power cap the clock falls and a GEMM costs up to a fifth
less, a hot die leaks more: a signature replayed at two mean powers has joules at both, interpolated between them. And a
launch among others in a run is not quite a launch among its like in a replay: each phase of the run (a context)
has joules of its own, which CONTEXT_SIGMA ties to those of the replays, and which have to add up to what the counter
says of that phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmkern.attribute.energy.floor import FloorDoubt
from llmkern.attribute.split.nnls import nnls_many
from llmkern.estimate import DRAWS, Estimate

# Two ticks of the counter frame a window, each known to some ms of a few hundred W.
TICK_SIGMA_J = 0.5
# The counter repeats itself to about this share over two seconds (on an H100 one load at eight phases of the tick gave
# 200-214 W in single reads).
GAIN_SIGMA = 0.005
# The prior is a guess from bytes and FLOPs: right to a factor of two (one sigma of its logarithm).
PRIOR_SIGMA = 0.7
# Windows of one signature whose mean powers are this close are of one regime.
SAME_REGIME = 0.1
# By how much of itself a launch may cost more or less from one regime to the next (one sigma).
REGIME_SIGMA = 0.15
# By how much of itself a launch may cost more or less in a run than alone at the same mean power (one sigma): a first
# guess, until planted work (bench.attribution) says better.
CONTEXT_SIGMA = 0.04
# Signatures whose columns are this close to parallel cannot be told apart by any window.
PARALLEL = 0.999


@dataclass(frozen=True)
class Window:
    """One stretch between two counter ticks: J, s, the idle floor in W there, and launches per signature.

    *context* names the phase of the run that it saw, "" is a replay; *degrees* is by how many °C it was warmer than
    where the floor is known best.
    """

    name: str
    energy_j: float
    seconds: float
    floor_w: float
    launches: Mapping[str, float]
    context: str = ""
    degrees: float = 0.0

    @property
    def mean_w(self) -> float:
        return self.energy_j / self.seconds


@dataclass(frozen=True)
class Features:
    """What the prior knows of a signature: seconds on the device, bytes moved, FLOPs, all per launch."""

    seconds: float
    moved_bytes: float
    flops: float


@dataclass(frozen=True)
class Unknowns:
    """What is looked for: per signature its joules at each mean power in W where it was replayed, and in each context.

    A signature that was seen in replays but never alone has one unknown there, at no certain power.
    """

    names: tuple[str, ...]
    powers_w: tuple[tuple[float, ...], ...]
    contexts: tuple[tuple[str, ...], ...]

    @cached_property
    def owners(self) -> np.ndarray:
        """Return for each unknown the index of its signature."""
        return np.repeat(np.arange(len(self.names)), self._counts)

    @cached_property
    def _counts(self) -> list[int]:
        return [len(p) + len(c) for p, c in zip(self.powers_w, self.contexts, strict=True)]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *np.cumsum(self._counts).tolist()]

    def first(self, index: int) -> int:
        """Return where the unknowns of signature *index* begin."""
        return self._firsts[index]

    def weights(self, name: str, context: str, mean_w: float) -> dict[int, float]:
        """Return which unknowns make up the joules of *name* in *context*, or in replays at *mean_w*.

        Between two powers they are linear and beyond them constant. Raises ValueError for a name that ran nowhere.
        """
        if name not in self._places:
            raise ValueError(f"{name} ran in no window")
        index = self._places[name]
        first, powers = self.first(index), self.powers_w[index]
        if context in self.contexts[index]:
            return {first + len(powers) + self.contexts[index].index(context): 1.0}
        # Of a signature that was never replayed another context is the next best.
        if len(powers) < 2 or mean_w <= powers[0]:
            return {first: 1.0}
        if mean_w >= powers[-1]:
            return {first + len(powers) - 1: 1.0}
        right = int(np.searchsorted(powers, mean_w))
        share = (mean_w - powers[right - 1]) / (powers[right] - powers[right - 1])
        return {first + right - 1: 1.0 - share, first + right: share}

    def row(self, launches: Mapping[str, float], context: str, mean_w: float) -> np.ndarray:
        """Return *launches* as factors of the unknowns."""
        row = np.zeros(len(self.owners))
        for name, count in launches.items():
            for unknown, weight in self.weights(name, context, mean_w).items():
                row[unknown] += count * weight
        return row


@dataclass(frozen=True)
class Marginals:
    """Joules per launch above the floor of each unknown, with the draws that their intervals come from.

    ``prior`` are J per second, byte and FLOP. ``groups`` are signatures that no window tells apart: each got the
    prior's share of what they took together. ``residuals_j`` is energy minus model per window; ``condition`` that of
    the replays alone, scaled and without the prior (infinite without replays). ``floor_draws_w`` and ``slope_draws``
    are the errors of the floor that each draw assumed, so that what is at the floor can be drawn alike.
    """

    unknowns: Unknowns
    prior: np.ndarray
    values_j: np.ndarray
    draws_j: np.ndarray
    floor_draws_w: np.ndarray
    slope_draws: np.ndarray
    groups: list[tuple[str, ...]]
    residuals_j: dict[str, float]
    condition: float

    def per_launch(self, name: str, context: str = "", mean_w: float = 0.0) -> Estimate:
        """Return the J per launch of *name* in *context*, or replayed at a mean power of *mean_w* W.

        Raises ValueError for an unknown name.
        """
        row = self.unknowns.row({name: 1.0}, context, mean_w)
        return Estimate.of(float(row @ self.values_j), self.draws_j @ row)

    def guess_j(self, features: Features) -> float:
        """Return what the prior makes of a signature that ran in no window, in J per launch."""
        return float(np.array([features.seconds, features.moved_bytes, features.flops]) @ self.prior)

    @property
    def replayed(self) -> list[str]:
        """Return the signatures that were replayed alone."""
        return [n for n, p in zip(self.unknowns.names, self.unknowns.powers_w, strict=True) if p]


def estimate_marginals(
    windows: Sequence[Window],
    features: Mapping[str, Features],
    *,
    doubt: FloorDoubt | None = None,
    most_w: float = math.inf,
    seed: int = 0,
) -> Marginals:
    """Return the joules per launch of every signature that ran in *windows*.

    Non-negative least squares, each window weighted by what its ticks and the counter's gain leave uncertain. Of a
    signature that was not replayed the prior says that it draws at most *most_w* W above the floor (two sigma).
    Intervals are from a parametric bootstrap over windows in which the floor errs alike in all of them (*doubt*).
    Raises ValueError without windows or for a launch of a signature that *features* does not know.
    """
    if not windows:
        raise ValueError("no windows to estimate from")
    unknown = {s for w in windows for s in w.launches} - set(features)
    if unknown:
        raise ValueError(f"no features of {', '.join(sorted(unknown))}")
    doubt = doubt or FloorDoubt()
    # The order of signatures and windows must not matter, not even in the last bit.
    ordered = sorted(windows, key=lambda w: w.name)
    unknowns = _unknowns(ordered)
    names, owners = unknowns.names, unknowns.owners
    counts = np.array([unknowns.row(w.launches, w.context, w.mean_w) for w in ordered])
    seconds = np.array([w.seconds for w in ordered])
    dynamic_j = np.array([w.energy_j - w.floor_w * w.seconds for w in ordered])
    sigma_j = np.hypot(TICK_SIGMA_J, GAIN_SIGMA * np.array([w.energy_j for w in ordered]))
    traits = np.array([[features[n].seconds, features[n].moved_bytes, features[n].flops] for n in names])[owners]
    most_j = most_w * traits[:, 0]
    # Half of what is possible leaves room on both sides.
    prior = _prior_weights(counts, traits, dynamic_j, sigma_j)
    guess_j = np.minimum(traits @ prior, most_j / 2)
    width_j = np.maximum(np.minimum(math.expm1(PRIOR_SIGMA) * guess_j, (most_j - guess_j) / 2), 1e-9)
    ties = _ties(unknowns, ordered, counts, dynamic_j, guess_j)
    problem = _Problem(counts, sigma_j, width_j, ties)
    (values,) = problem.solved(dynamic_j[None], guess_j[None], np.zeros((1, len(ties))))
    random = np.random.default_rng(seed)
    model = counts @ values
    spread = sigma_j * _excess(ordered, (dynamic_j - model) / sigma_j)
    degrees = np.array([w.degrees for w in ordered])
    level_draws, slope_draws = doubt.draws()
    drawn, priors, apart = [], [], []
    for i in range(DRAWS):
        floor_j = (level_draws[i] + slope_draws[i] * degrees) * seconds
        drawn.append(model + random.normal(0.0, spread) - floor_j)
        # One guess is wrong by one factor wherever it is used.
        prior_j = guess_j * np.exp(random.normal(0.0, PRIOR_SIGMA, len(names)))[owners]
        priors.append(np.minimum(prior_j, np.maximum(guess_j, most_j - width_j)))
        apart.append(random.normal(0.0, 1.0, len(ties)))
    draws = problem.solved(np.array(drawn), np.array(priors), np.array(apart))
    groups, condition = _separable(ordered, names, sigma_j)
    residuals = {w.name: float(d - m) for w, d, m in zip(ordered, dynamic_j, model, strict=True)}
    return Marginals(unknowns, prior, values, draws, level_draws, slope_draws, groups, residuals, condition)


def _unknowns(windows: Sequence[Window]) -> Unknowns:
    names = sorted({s for w in windows for s in w.launches})
    alone: dict[str, list[float]] = {n: [] for n in names}
    mixed: set[str] = set()
    contexts: dict[str, set[str]] = {n: set() for n in names}
    for window in windows:
        for name in window.launches:
            if window.context:
                contexts[name].add(window.context)
            elif len(window.launches) == 1:
                alone[name].append(window.mean_w)
            else:
                mixed.add(name)
    powers: list[tuple[float, ...]] = []
    for name in names:
        clusters: list[list[float]] = []
        for watts in sorted(alone[name]):
            if clusters and watts <= clusters[-1][0] * (1 + SAME_REGIME):
                clusters[-1].append(watts)
            else:
                clusters.append([watts])
        powers.append(tuple(float(np.mean(c)) for c in clusters) or ((0.0,) if name in mixed else ()))
    return Unknowns(tuple(names), tuple(powers), tuple(tuple(sorted(contexts[n])) for n in names))


def _excess(windows: Sequence[Window], scaled: np.ndarray) -> np.ndarray:
    """Return how many times worse than their ticks explain the windows of each context fit, at least once."""
    result = np.ones(len(windows))
    for context in {w.context for w in windows}:
        own = np.array([w.context == context for w in windows])
        if own.sum() > 1:
            result[own] = max(1.0, float(np.sqrt(np.mean(scaled[own] ** 2))))
    return result


def _ties(
    unknowns: Unknowns, windows: Sequence[Window], counts: np.ndarray, dynamic_j: np.ndarray, guess_j: np.ndarray
) -> np.ndarray:
    """Return rows, in sigmas, that hold the unknowns of one signature together: its regimes, and contexts to them."""
    mean_w = {c: float(np.mean([w.mean_w for w in windows if w.context == c])) for c in {w.context for w in windows}}
    rows = []
    for index, (name, powers, contexts) in enumerate(
        zip(unknowns.names, unknowns.powers_w, unknowns.contexts, strict=True)
    ):
        first = unknowns.first(index)
        size_j = max(_alone_j(windows, counts, dynamic_j, name), 0.1 * float(guess_j[first]), 1e-9)
        for left in range(first, first + len(powers) - 1):
            row = np.zeros(len(guess_j))
            row[[left, left + 1]] = np.array([1.0, -1.0]) / (REGIME_SIGMA * size_j)
            rows.append(row)
        own = range(first + len(powers), first + len(powers) + len(contexts))
        for unknown, context in zip(own, contexts, strict=True):
            row = np.zeros(len(guess_j))
            row[unknown] = 1.0
            if powers:
                for knot, weight in unknowns.weights(name, "", mean_w[context]).items():
                    row[knot] -= weight
                rows.append(row / (CONTEXT_SIGMA * size_j))
            elif unknown > first:
                row[first] = -1.0
                rows.append(row / (REGIME_SIGMA * size_j))
    return np.array(rows).reshape(-1, len(guess_j))


def _alone_j(windows: Sequence[Window], counts: np.ndarray, dynamic_j: np.ndarray, name: str) -> float:
    """Return the J per launch of *name* over all windows in which it ran alone, 0 without any."""
    own = np.array([not w.context and set(w.launches) == {name} for w in windows])
    total = float(counts[own].sum())
    return float(dynamic_j[own].sum()) / total if total > 0 else 0.0


@dataclass(frozen=True)
class _Problem:
    """Non-negative least squares for joules per launch that fit windows, drawn to a prior where these leave a choice.

    Everything is scaled to the prior's width: joules per launch span five orders of magnitude.
    """

    counts: np.ndarray
    sigma_j: np.ndarray
    width_j: np.ndarray
    ties: np.ndarray

    def solved(self, dynamic_j: np.ndarray, prior_j: np.ndarray, apart: np.ndarray) -> np.ndarray:
        """Return a solution for each row of *dynamic_j*, *prior_j* and *apart* (how many sigmas the ties are off)."""
        rows = np.vstack(
            [self.counts * self.width_j / self.sigma_j[:, None], np.eye(len(self.width_j)), self.ties * self.width_j]
        )
        right = np.hstack([dynamic_j / self.sigma_j, prior_j / self.width_j, apart])
        return nnls_many(rows, right) * self.width_j


def _prior_weights(counts: np.ndarray, traits: np.ndarray, dynamic_j: np.ndarray, sigma_j: np.ndarray) -> np.ndarray:
    """Return joules per second, per byte and per FLOP (each >= 0) that explain the windows best by themselves."""
    together = counts @ traits
    scale = np.maximum(together.max(axis=0), 1e-30)
    # Bytes and FLOPs may go together, or be nowhere: a hair of each keeps the three apart.
    rows = np.vstack([together / scale / sigma_j[:, None], 1e-6 * np.eye(len(scale))])
    (solution,) = nnls_many(rows, np.concatenate([dynamic_j / sigma_j, np.zeros(len(scale))])[None])
    return solution / scale


def _separable(
    windows: Sequence[Window], names: Sequence[str], sigma_j: np.ndarray
) -> tuple[list[tuple[str, ...]], float]:
    """Return the groups of signatures that went together in every window, and the condition of the replays."""
    counts = np.array([[w.launches.get(n, 0.0) for n in names] for w in windows])
    norms = np.linalg.norm(counts, axis=0)
    unit = counts / np.where(norms > 0, norms, 1.0)
    alike = unit.T @ unit > PARALLEL
    left = set(range(len(names)))
    groups = []
    for i in range(len(names)):
        if i in left:
            members = [j for j in sorted(left) if alike[i, j]]
            left -= set(members)
            if len(members) > 1:
                groups.append(tuple(names[j] for j in members))
    alone = np.array([not w.context for w in windows])
    scaled = (counts / sigma_j[:, None])[alone]
    lengths = np.linalg.norm(scaled, axis=0)
    replayed = lengths > 0
    if not replayed.any():
        return groups, math.inf
    return groups, float(np.linalg.cond(scaled[:, replayed] / lengths[replayed]))
