"""Joules per launch of each operator signature, from windows in which the counter moved by a known amount.

Model (facts and limits: README, "How it works"): in a window of t seconds

    energy = floor x t + sum over signatures of launches x joules per launch + error

with joules per launch above the idle floor and not negative. Windows come from replays, where one signature ran alone,
and from the run itself, where all ran together. What the data leave open is held by a weak prior from bytes and FLOPs.

What a launch costs depends on the regime: towards the power cap the clock falls and a GEMM costs up to a fifth less, a
hot die leaks more. A signature replayed at two mean powers has joules at both; between them they are interpolated, and
a phase of the run takes those of its own mean power.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from llmkern.attribute.estimate import Estimate

DRAWS = 400
# Two ticks of the counter frame a window, each known to some ms of a few hundred W.
TICK_SIGMA_J = 0.5
# The counter repeats itself to about this share over two seconds (on an H100 one load at eight phases of the tick gave
# 200-214 W in single reads).
GAIN_SIGMA = 0.005
# The prior is a guess from bytes and FLOPs: right to a factor of two.
PRIOR_SIGMA = 0.7
# Windows of one signature whose mean powers are this close are of one regime.
SAME_REGIME = 0.1
# By how much of itself a launch may cost more or less from one regime to the next.
REGIME_SIGMA = 0.15
# Signatures whose columns are this close to parallel cannot be told apart by any window.
PARALLEL = 0.999


@dataclass(frozen=True)
class Window:
    """One stretch between two counter ticks: J, s, the idle floor in W there, and launches per signature.

    *degrees* is by how many °C it was warmer than where the floor is known best.
    """

    name: str
    energy_j: float
    seconds: float
    floor_w: float
    launches: Mapping[str, float]
    source: str = "replay"
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
class FloorDoubt:
    """One sigma of the floor in W where it is known best, and of its slope in W/°C."""

    level_w: float = 0.0
    slope_w_per_c: float = 0.0


@dataclass(frozen=True)
class Regimes:
    """The unknowns: for each signature the mean powers in W at which its joules are looked for, None for just one."""

    names: tuple[str, ...]
    powers_w: tuple[tuple[float, ...] | None, ...]

    @property
    def owners(self) -> np.ndarray:
        """Return for each unknown the index of its signature."""
        return np.repeat(np.arange(len(self.names)), [len(p) if p else 1 for p in self.powers_w])

    def weights(self, name: str, mean_w: float) -> dict[int, float]:
        """Return which unknowns make up the joules of *name* at *mean_w*, linear between two and constant beyond."""
        if name not in self.names:
            raise ValueError(f"{name} ran in no window")
        index = self.names.index(name)
        first = sum(len(p) if p else 1 for p in self.powers_w[:index])
        powers = self.powers_w[index]
        if powers is None or mean_w <= powers[0]:
            return {first: 1.0}
        if mean_w >= powers[-1]:
            return {first + len(powers) - 1: 1.0}
        right = int(np.searchsorted(powers, mean_w))
        share = (mean_w - powers[right - 1]) / (powers[right] - powers[right - 1])
        return {first + right - 1: 1.0 - share, first + right: share}


@dataclass(frozen=True)
class Marginals:
    """Joules per launch above the floor, per regime, with the draws that their intervals come from.

    ``groups`` are signatures that no window tells apart: each got the prior's share of what they took together.
    ``residuals_j`` is energy minus model per window; ``condition`` that of the scaled system without the prior and with
    each group as one. ``floor_draws_w`` and ``slope_draws`` are the errors of the floor that each draw assumed, so that
    what is at the floor can be drawn alike.
    """

    regimes: Regimes
    values_j: np.ndarray
    draws_j: np.ndarray
    floor_draws_w: np.ndarray
    slope_draws: np.ndarray
    groups: list[tuple[str, ...]]
    residuals_j: dict[str, float]
    condition: float

    def row(self, launches: Mapping[str, float], mean_w: float) -> np.ndarray:
        """Return *launches* at *mean_w* as factors of the unknowns."""
        return _row(self.regimes, launches, mean_w, len(self.values_j))

    def per_launch(self, name: str, mean_w: float) -> Estimate:
        """Return the J per launch of *name* at a mean power of *mean_w* W; raises ValueError for an unknown name."""
        row = self.row({name: 1.0}, mean_w)
        return interval(float(row @ self.values_j), self.draws_j @ row)


def interval(value: float, draws: np.ndarray) -> Estimate:
    """Return *value* with the 95 % interval of *draws* of it."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(min(low, value)), float(max(high, value)), len(draws))


def estimate_marginals(
    windows: Sequence[Window], features: Mapping[str, Features], *, doubt: FloorDoubt | None = None, seed: int = 0
) -> Marginals:
    """Return the joules per launch of every signature that ran in *windows*.

    Non-negative least squares, each window weighted by what its ticks and the counter's gain leave uncertain.
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
    regimes = _regimes(ordered)
    names, owners = regimes.names, regimes.owners
    counts = np.array([_row(regimes, w.launches, w.mean_w, len(owners)) for w in ordered])
    seconds = np.array([w.seconds for w in ordered])
    dynamic_j = np.array([w.energy_j - w.floor_w * w.seconds for w in ordered])
    sigma_j = np.hypot(TICK_SIGMA_J, GAIN_SIGMA * np.array([w.energy_j for w in ordered]))
    traits = np.array([[features[n].seconds, features[n].moved_bytes, features[n].flops] for n in names])[owners]
    weights = _prior_weights(counts, traits, dynamic_j, sigma_j)
    ties = _ties(counts, dynamic_j, owners, traits @ weights)
    values = _solve(counts, dynamic_j, sigma_j, traits @ weights, ties)
    random = np.random.default_rng(seed)
    model = counts @ values
    # Windows that fit worse than their ticks explain say that the model is that wrong here.
    excess = float(np.sqrt(np.mean(((dynamic_j - model) / sigma_j) ** 2))) if len(ordered) > 1 else 1.0
    spread = sigma_j * max(1.0, excess)
    degrees = np.array([w.degrees for w in ordered])
    level_draws = random.normal(0.0, 1.0, DRAWS) * doubt.level_w
    slope_draws = random.normal(0.0, 1.0, DRAWS) * doubt.slope_w_per_c
    draws = np.empty((DRAWS, len(owners)))
    for i in range(DRAWS):
        floor_j = (level_draws[i] + slope_draws[i] * degrees) * seconds
        drawn_j = model + random.normal(0.0, spread) - floor_j
        # One guess is wrong by one factor in all regimes.
        prior_j = traits @ weights * np.exp(random.normal(0.0, PRIOR_SIGMA, len(names)))[owners]
        draws[i] = _solve(counts, drawn_j, sigma_j, prior_j, ties)
    groups, condition = _separable(ordered, names, sigma_j)
    residuals = {w.name: float(d - m) for w, d, m in zip(ordered, dynamic_j, model, strict=True)}
    return Marginals(regimes, values, draws, level_draws, slope_draws, groups, residuals, condition)


def _regimes(windows: Sequence[Window]) -> Regimes:
    names = sorted({s for w in windows for s in w.launches})
    alone: dict[str, list[float]] = {n: [] for n in names}
    for window in windows:
        if len(window.launches) == 1 and window.source == "replay":
            alone[next(iter(window.launches))].append(window.mean_w)
    powers: list[tuple[float, ...] | None] = []
    for name in names:
        clusters: list[list[float]] = []
        for watts in sorted(alone[name]):
            if clusters and watts <= clusters[-1][0] * (1 + SAME_REGIME):
                clusters[-1].append(watts)
            else:
                clusters.append([watts])
        powers.append(tuple(float(np.mean(c)) for c in clusters) or None)
    return Regimes(tuple(names), tuple(powers))


def _row(regimes: Regimes, launches: Mapping[str, float], mean_w: float, size: int) -> np.ndarray:
    row = np.zeros(size)
    for name, count in launches.items():
        for unknown, weight in regimes.weights(name, mean_w).items():
            row[unknown] += count * weight
    return row


def _ties(counts: np.ndarray, dynamic_j: np.ndarray, owners: np.ndarray, prior_j: np.ndarray) -> np.ndarray:
    """Return rows that hold the joules of one signature in neighbouring regimes to REGIME_SIGMA of each other."""
    rows = []
    for left in range(len(owners) - 1):
        if owners[left] != owners[left + 1]:
            continue
        pair = [left, left + 1]
        alone = np.flatnonzero((counts[:, pair].sum(axis=1) > 0) & (np.delete(counts, pair, axis=1).sum(axis=1) == 0))
        total = float(counts[alone][:, pair].sum())
        size_j = float(dynamic_j[alone].sum()) / total if total > 0 else 0.0
        row = np.zeros(len(owners))
        row[pair] = np.array([1.0, -1.0]) / (REGIME_SIGMA * max(size_j, 0.1 * float(prior_j[left]), 1e-9))
        rows.append(row)
    return np.array(rows).reshape(-1, len(owners))


def _solve(
    counts: np.ndarray, dynamic_j: np.ndarray, sigma_j: np.ndarray, prior_j: np.ndarray, ties: np.ndarray
) -> np.ndarray:
    """Return the non-negative joules per launch that fit the windows, drawn to the prior where they leave a choice."""
    width = np.maximum(PRIOR_SIGMA * prior_j, 1e-9)
    # Scaled to the prior: joules per launch span five orders of magnitude.
    scale = np.maximum(prior_j, 1e-9)
    rows = np.vstack([counts * scale / sigma_j[:, None], np.diag(scale / width), ties * scale])
    right = np.concatenate([dynamic_j / sigma_j, prior_j / width, np.zeros(len(ties))])
    solution, _ = nnls(rows, right, maxiter=50 * rows.shape[1])
    result: np.ndarray = solution * scale
    return result


def _prior_weights(counts: np.ndarray, traits: np.ndarray, dynamic_j: np.ndarray, sigma_j: np.ndarray) -> np.ndarray:
    """Return joules per second, per byte and per FLOP (each >= 0) that explain the windows best by themselves."""
    together = counts @ traits
    scale = np.maximum(together.max(axis=0), 1e-30)
    solution, _ = nnls(together / scale / sigma_j[:, None], dynamic_j / sigma_j)
    weights: np.ndarray = solution / scale
    return weights


def _separable(
    windows: Sequence[Window], names: Sequence[str], sigma_j: np.ndarray
) -> tuple[list[tuple[str, ...]], float]:
    """Return the groups of signatures whose launches went together in every window, and the condition beyond them."""
    counts = np.array([[w.launches.get(n, 0.0) for n in names] for w in windows])
    norms = np.linalg.norm(counts, axis=0)
    unit = counts / np.where(norms > 0, norms, 1.0)
    alike = unit.T @ unit > PARALLEL
    left = set(range(len(names)))
    groups, kept = [], []
    for i in range(len(names)):
        if i in left:
            members = [j for j in sorted(left) if alike[i, j]]
            left -= set(members)
            kept.append(i)
            if len(members) > 1:
                groups.append(tuple(names[j] for j in members))
    scaled = counts[:, kept] / sigma_j[:, None]
    return groups, float(np.linalg.cond(scaled / np.maximum(np.linalg.norm(scaled, axis=0), 1e-30)))
