"""Joules per launch of each class of kernels, from windows in which the counter moved by a known amount.

Model (facts and limits: docs/method.md): in a window of t seconds

    energy = floor x t + sum over classes of kernels of launches x joules per launch + error

with joules per launch above the idle floor and not negative. Windows come from replays, of a whole operator or of one
of its kernels alone, and from the run itself, where all ran together. What the data leave open is held by a weak prior.

What a launch costs depends on where it runs. Towards the power cap the clock falls and a GEMM costs up to a fifth
less: a class replayed at two clocks has joules at both, interpolated between them. And a launch among others in a run
is not quite a launch among its like in a replay: each phase of the run (a context) has joules of its own, which
CONTEXT_SIGMA, and COMMON_SIGMA for all together, tie to those of the replays, and which have to add up to what the
counter says of that phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmkern.attribute.energy.floor import FloorDoubt
from llmkern.attribute.split.nnls import nnls_many
from llmkern.attribute.split.unknowns import Unknowns, Window, find_unknowns
from llmkern.estimate import DRAWS, Estimate

# Two ticks of the counter frame a window, each known to some ms of a few hundred W.
TICK_SIGMA_J = 0.5
# The counter repeats itself to about this share over two seconds (on an H100 one load at eight phases of the tick gave
# 200-214 W in single reads).
GAIN_SIGMA = 0.005
# The prior is a guess from length, blocks, bytes and FLOPs: right to a factor of two (one sigma of its logarithm).
PRIOR_SIGMA = 0.7
# To this factor (one sigma of its logarithm) the prior explains a window, and is a weight what it is without data.
PRIOR_FIT_SIGMA, PRIOR_HOLD_SIGMA = 0.5, 1.5
# By how much of itself a launch may cost more or less from one regime to the next (one sigma).
REGIME_SIGMA = 0.15
# By how much of itself a launch may cost more or less in a run than alone at the same mean power (one sigma): each for
# itself, and all of a phase together.
CONTEXT_SIGMA = 0.03
COMMON_SIGMA = 0.05
# So long a kernel that does nothing takes.
LAUNCH_S = 1.5e-6
# Signatures whose columns are this close to parallel cannot be told apart by any window.
PARALLEL = 0.999


@dataclass(frozen=True)
class Features:
    """What the prior knows of a class: seconds on the device, bytes moved, FLOPs, all per launch.

    *filled* is the share of the multiprocessors that have a block of it.
    """

    seconds: float
    moved_bytes: float
    flops: float
    filled: float = 1.0

    @property
    def traits(self) -> tuple[float, float, float]:
        """What joules go with. Of a small kernel the first microsecond is its launch."""
        return max(self.seconds - LAUNCH_S, 0.1 * self.seconds) * self.filled, self.moved_bytes, self.flops


@dataclass(frozen=True)
class Marginals:
    """Joules per launch above the floor of each unknown, with the draws that their intervals come from.

    ``prior`` are J per second, byte and FLOP. ``groups`` are signatures that no window tells apart: each got the
    prior's share of what they took together. ``residuals_j`` is energy minus model per window; ``condition`` that of
    the replays alone, scaled and without the prior (infinite without replays). ``floor_draws_w`` and ``slope_draws``
    are the errors of the floor that each draw assumed, so that what is at the floor can be drawn alike. ``common`` is
    by how much of itself everything costs more in each context than in replays.
    """

    unknowns: Unknowns
    prior: np.ndarray
    values_j: np.ndarray
    draws_j: np.ndarray
    floor_draws_w: np.ndarray
    slope_draws: np.ndarray
    common: Mapping[str, Estimate]
    groups: list[tuple[str, ...]]
    residuals_j: dict[str, float]
    condition: float

    def launches(self, names: Sequence[str], context: str = "", regime: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Return the J per launch of each of *names*, and draws of them [DRAWS, names], as per_launch does."""
        rows = np.array([self.unknowns.row({name: 1.0}, context, regime) for name in names])
        rows = rows.reshape(len(names), len(self.values_j))
        values, draws = rows @ self.values_j, self.draws_j @ rows.T
        more = self.common.get(context)
        lent = np.array([context not in self.unknowns.contexts_of(name) for name in names], bool)
        if more is not None and more.draws is not None and lent.any():
            # Too little of the phase for joules of their own there: those of the replays, with what they may be off.
            apart = np.random.default_rng(5).normal(0.0, CONTEXT_SIGMA, draws.shape)
            draws = np.where(lent, draws * np.maximum(1 + more.draws[:, None] + apart, 0.0), draws)
            values = np.where(lent, values * (1 + more.value), values)
        return values, draws

    def per_launch(self, name: str, context: str = "", regime: float = 0.0) -> Estimate:
        """Return the J per launch of *name* in *context*, or replayed in *regime* (see Window).

        Raises ValueError for an unknown name.
        """
        (value,), draws = self.launches([name], context, regime)
        return Estimate.of(float(value), draws[:, 0])

    def guess_j(self, features: Features) -> float:
        """Return what the prior makes of a signature that ran in no window, in J per launch."""
        return float(np.array(features.traits) @ self.prior)

    @property
    def replayed(self) -> list[str]:
        """Return the signatures that were replayed alone."""
        return [n for n, p in zip(self.unknowns.names, self.unknowns.regimes, strict=True) if p]


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
    seconds = np.array([w.seconds for w in ordered])
    dynamic_j = np.array([w.energy_j - w.floor_w * w.seconds for w in ordered])
    sigma_j = np.hypot(TICK_SIGMA_J, GAIN_SIGMA * np.array([w.energy_j for w in ordered]))
    sigma_j = np.hypot(sigma_j, np.array([w.apart for w in ordered]) * np.abs(dynamic_j))
    every = sorted({n for w in ordered for n in w.launches})
    prior = _prior_weights(ordered, {n: features[n].traits for n in every}, dynamic_j, sigma_j)
    # Half of what is possible leaves room on both sides.
    most = {n: most_w * features[n].seconds for n in every}
    guess = {n: min(float(np.array(features[n].traits) @ prior), most[n] / 2) for n in every}
    # What ran alone is known better than any guess.
    guess |= {n: joules for n in every if (joules := _alone_j(ordered, dynamic_j, n)) > 0}
    unknowns = find_unknowns(ordered, guess)
    names, owners = unknowns.names, unknowns.owners
    counts = np.array([unknowns.row(w.launches, w.context, w.regime) for w in ordered])
    guess_j, most_j = (np.array([of[n] for n in names])[owners] for of in (guess, most))
    width_j = np.maximum(np.minimum(PRIOR_SIGMA * guess_j, np.maximum(most_j - guess_j, guess_j) / 2), 1e-9)
    shared = sorted({c for c in (w.context for w in ordered) if c})
    ties = _ties(unknowns, ordered, counts, dynamic_j, guess_j, shared)
    problem = _Problem(counts, sigma_j, width_j, ties)
    nothing = np.zeros((1, 2 * len(shared)))
    (values,), (more,) = problem.solved(dynamic_j[None], np.hstack([guess_j[None], nothing]), np.zeros((1, len(ties))))
    random = np.random.default_rng(seed)
    model = counts @ values
    spread = sigma_j * _excess(ordered, (dynamic_j - model) / sigma_j)
    degrees = np.array([w.degrees for w in ordered])
    level_draws, slope_draws = doubt.draws()
    drawn = model + random.normal(0.0, 1.0, (DRAWS, len(ordered))) * spread
    drawn -= (level_draws[:, None] + slope_draws[:, None] * degrees) * seconds
    # One guess is wrong by one factor wherever it is used.
    guesses_j = guess_j * np.exp(random.normal(0.0, PRIOR_SIGMA, (DRAWS, len(names))))[:, owners]
    guesses_j = np.minimum(guesses_j, np.maximum(guess_j, most_j - width_j))
    common = random.normal(0.0, COMMON_SIGMA, (DRAWS, len(shared)))
    up_and_down = np.maximum(np.stack([common, -common], axis=2), 0.0).reshape(DRAWS, -1)
    apart = random.normal(0.0, 1.0, (DRAWS, len(ties)))
    draws, mores = problem.solved(drawn, np.hstack([guesses_j, up_and_down]), apart)
    groups, condition = _separable(ordered, names, sigma_j)
    residuals = {w.name: float(d - m) for w, d, m in zip(ordered, dynamic_j, model, strict=True)}
    in_common = {c: Estimate.of(float(more[i]), mores[:, i]) for i, c in enumerate(shared)}
    return Marginals(unknowns, prior, values, draws, level_draws, slope_draws, in_common, groups, residuals, condition)


def _excess(windows: Sequence[Window], scaled: np.ndarray) -> np.ndarray:
    """Return how many times worse than their ticks explain the windows of each context fit, at least once."""
    result = np.ones(len(windows))
    for context in {w.context for w in windows}:
        own = np.array([w.context == context for w in windows])
        if own.sum() > 1:
            result[own] = max(1.0, float(np.sqrt(np.mean(scaled[own] ** 2))))
    return result


def _ties(
    unknowns: Unknowns,
    windows: Sequence[Window],
    counts: np.ndarray,
    dynamic_j: np.ndarray,
    guess_j: np.ndarray,
    shared: list[str],
) -> np.ndarray:
    """Return rows, in sigmas, that hold the unknowns of one signature together: its regimes, and contexts to them.

    To the unknowns come two for each of the contexts *shared*: by how much of itself everything costs more there, and
    by how much less.
    """
    count = len(guess_j) + 2 * len(shared)
    regimes = {c: float(np.mean([w.regime for w in windows if w.context == c])) for c in {w.context for w in windows}}
    rows = []
    for index, (name, powers, contexts) in enumerate(
        zip(unknowns.names, unknowns.regimes, unknowns.contexts, strict=True)
    ):
        first = unknowns.first(index)
        size_j = max(float(guess_j[first]), 1e-9)
        for left in range(first, first + len(powers) - 1):
            row = np.zeros(count)
            row[[left, left + 1]] = np.array([1.0, -1.0]) / (REGIME_SIGMA * size_j)
            rows.append(row)
        own = range(first + len(powers), first + len(powers) + len(contexts))
        for unknown, context in zip(own, contexts, strict=True):
            row = np.zeros(count)
            row[unknown] = 1.0
            if powers:
                more = len(guess_j) + 2 * shared.index(context)
                row[[more, more + 1]] = [-size_j, size_j]
                for knot, weight in unknowns.weights(name, "", regimes[context]).items():
                    row[knot] -= weight
                rows.append(row / (CONTEXT_SIGMA * size_j))
            elif unknown > first:
                row[first] = -1.0
                rows.append(row / (REGIME_SIGMA * size_j))
    return np.array(rows).reshape(-1, count)


def _alone_j(windows: Sequence[Window], dynamic_j: np.ndarray, name: str) -> float:
    """Return the J per launch of *name* over all windows in which it ran alone, 0 without any."""
    own = [i for i, w in enumerate(windows) if not w.context and set(w.launches) == {name}]
    total = sum(windows[i].launches[name] for i in own)
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

    def solved(self, dynamic_j: np.ndarray, prior_j: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a solution for each row of *dynamic_j*, *prior_j* and *apart* (how many sigmas the ties are off).

        *prior_j* and the ties also hold what is common to each context, up and down; of that the difference is the
        second part of the solution.
        """
        own = self.counts.shape[1]
        width = np.append(self.width_j, np.full(self.ties.shape[1] - own, COMMON_SIGMA))
        counts = np.hstack([self.counts, np.zeros((len(self.counts), len(width) - own))])
        rows = np.vstack([counts * width / self.sigma_j[:, None], np.eye(len(width)), self.ties * width])
        right = np.hstack([dynamic_j / self.sigma_j, prior_j / width, apart])
        found = nnls_many(rows, right) * width
        return found[:, :own], found[:, own::2] - found[:, own + 1 :: 2]


def _prior_weights(
    windows: Sequence[Window],
    traits: Mapping[str, tuple[float, float, float]],
    dynamic_j: np.ndarray,
    sigma_j: np.ndarray,
) -> np.ndarray:
    """Return joules per filled second, byte and FLOP that explain the windows best by themselves, by their logarithms.

    A guess is as good as the factor by which it is wrong; squares of joules would let the largest products set the
    weights of all else, squares of shares would prefer to guess too little. Each weight is held to what explains a
    third of the median window, loosely.
    """
    together = np.array([np.sum([np.array(traits[n]) * k for n, k in w.launches.items()], axis=0) for w in windows])
    seen = (dynamic_j > 3 * sigma_j) & (together[:, 0] > 0)
    weights = np.zeros(together.shape[1])
    if not seen.any():
        return weights
    together, joules = together[seen], dynamic_j[seen]
    used = np.flatnonzero((together > 0).any(axis=0))
    together = together[:, used]
    with np.errstate(divide="ignore"):
        alone = np.where(together > 0, joules[:, None] / together, np.nan)
    begin = np.log(np.nanmedian(alone, axis=0) / len(used))
    found = begin.copy()
    for _ in range(50):
        parts = together * np.exp(found)
        model = parts.sum(axis=1)
        slope = parts / model[:, None] / PRIOR_FIT_SIGMA
        off = np.log(joules / model) / PRIOR_FIT_SIGMA
        square = slope.T @ slope + np.eye(len(found)) / PRIOR_HOLD_SIGMA**2
        step = np.linalg.solve(square, slope.T @ off - (found - begin) / PRIOR_HOLD_SIGMA**2)
        found += np.clip(step, -1.0, 1.0)
    weights[used] = np.exp(found)
    return weights


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
