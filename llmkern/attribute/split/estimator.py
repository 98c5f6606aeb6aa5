"""Joules per launch of each class of kernels, from windows in which the counter moved by a known amount.

Model (facts and limits: docs/method.md): in a window of t seconds

    energy = floor x t + host x idle t + sum over classes of kernels of launches x joules per launch + error

with joules per launch above the idle floor and not negative, and what a busy host adds to a run where no kernel runs.
Windows come from replays, of a whole operator or of one of its kernels alone, and from the run itself, where all ran
together. What the data leave open is held by a weak prior.

What a launch costs depends on where it runs. Towards the power cap the clock falls and a GEMM costs up to a fifth less:
a class replayed at two clocks has joules at both, interpolated between them. And a launch among others in a run is not
quite a launch among its like in a replay: each phase of the run (a context) has joules of its own, which CONTEXT_SIGMA,
and COMMON_SIGMA for all together, tie to those of the replays, and which have to add up to what the counter says of
that phase. Where the replays do not add up to that, the former is larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmkern.attribute.energy.floor import FloorDoubt
from llmkern.attribute.split.nnls import nnls_many
from llmkern.attribute.split.prior import PRIOR_SIGMA, Features, prior_weights
from llmkern.attribute.split.unknowns import Unknowns, Window, find_unknowns
from llmkern.estimate import DRAWS, Estimate

# Two ticks of the counter frame a window, each known to some ms of a few hundred W.
TICK_SIGMA_J = 0.5
# The counter repeats itself to about this share over two seconds (on an H100 one load at eight phases of the tick gave
# 200-214 W in single reads).
GAIN_SIGMA = 0.005
# By how much of itself a launch may cost more or less from one regime to the next (one sigma).
REGIME_SIGMA = 0.15
# By how much of itself a launch may cost more or less in a run than alone at the same mean power (one sigma): each for
# itself, as if so many phases had shown it, and all of a phase together.
CONTEXT_SIGMA, CONTEXT_FREEDOM = 0.05, 2
COMMON_SIGMA = 0.05
# What a busy host adds to an idle device: on an H100 0.4 W while it launches kernels of nothing, 1.5 W where it
# launches one and waits for it without end; of other hosts and boards that is hardly known (Student, so many degrees).
HOST_SIGMA_W, HOST_FREEDOM = 2.0, 3
# The median of a square of one degree of freedom, of its mean.
_MEDIAN_OF_ONE = 0.455
# Signatures whose columns are this close to parallel cannot be told apart by any window.
PARALLEL = 0.999


@dataclass(frozen=True)
class Marginals:
    """Joules per launch above the floor of each unknown, with the draws that their intervals come from.

    ``prior`` are J per second, byte and FLOP. ``groups`` are signatures that no window tells apart: each got the
    prior's share of what they took together. ``residuals_j`` is energy minus model per window; ``condition`` that of
    the replays alone, scaled and without the prior (infinite without replays). ``floor_draws_w`` and ``slope_draws``
    are the errors of the floor that each draw assumed, so that what is at the floor can be drawn alike. ``common`` is
    by how much of itself everything costs more in each context than in replays; ``apart_draws`` is by how much (one
    sigma) each draw let a launch do so by itself. ``host_w`` is what the host adds in each context while nothing runs.
    """

    unknowns: Unknowns
    prior: np.ndarray
    values_j: np.ndarray
    draws_j: np.ndarray
    floor_draws_w: np.ndarray
    slope_draws: np.ndarray
    common: Mapping[str, Estimate]
    apart_draws: np.ndarray
    host_w: Mapping[str, Estimate]
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
            apart = np.random.default_rng(5).normal(0.0, 1.0, draws.shape) * self.apart_draws[:, None]
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
    Intervals are solutions of what was seen and believed before, each drawn within its doubt (randomize, then optimize:
    Bardsley 2014, doi:10.1137/140964023); the floor errs alike in all windows (*doubt*).
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
    prior = prior_weights(ordered, {n: features[n].traits for n in every}, dynamic_j, sigma_j)
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
    # To the unknowns come what the host adds in each of the contexts (replays are one where it launches one by one),
    # and by how much everything costs more and less in each phase of the run.
    hosts = shared + [""] * any(w.idle_s > 0 and not w.context for w in ordered)
    nothing = np.zeros(len(hosts) + 2 * len(shared))
    idle_s = np.array([[w.idle_s * (w.context == c) for c in hosts] for w in ordered]).reshape(len(ordered), -1)
    counts = np.hstack([counts, idle_s, np.zeros((len(ordered), 2 * len(shared)))])
    width = np.append(width_j, np.repeat([HOST_SIGMA_W, COMMON_SIGMA], [len(hosts), 2 * len(shared)]))

    def fitted(context_sigma: float) -> tuple[_Problem, np.ndarray, np.ndarray]:
        ties, own = _ties(unknowns, ordered, guess_j, (shared, len(hosts)), context_sigma)
        problem = _Problem(counts, sigma_j, width, ties)
        (found,) = problem.solved(dynamic_j[None], np.append(guess_j, nothing)[None], np.zeros((1, len(ties))))
        return problem, own, found

    context_sigma, freedom = _context_sigma(unknowns, ordered, dynamic_j, fitted(CONTEXT_SIGMA)[2], doubt)
    problem, own, found = fitted(context_sigma)
    random = np.random.default_rng(seed)
    model = counts @ found
    spread = sigma_j * _excess(ordered, (dynamic_j - model) / sigma_j)
    degrees = np.array([w.degrees for w in ordered])
    level_draws, slope_draws = doubt.draws()
    # About what was seen, not about the fit: what the prior has drawn in would be drawn in twice.
    drawn = dynamic_j + random.normal(0.0, 1.0, (DRAWS, len(ordered))) * spread
    drawn -= (level_draws[:, None] + slope_draws[:, None] * degrees) * seconds
    # One guess is wrong by one factor wherever it is used.
    guesses_j = guess_j * np.exp(random.normal(0.0, PRIOR_SIGMA, (DRAWS, len(names))))[:, owners]
    guesses_j = np.minimum(guesses_j, np.maximum(guess_j, most_j - width_j))
    common = random.normal(0.0, COMMON_SIGMA, (DRAWS, len(shared)))
    up_and_down = np.maximum(np.stack([common, -common], axis=2), 0.0).reshape(DRAWS, -1)
    host_w = random.standard_t(HOST_FREEDOM, (DRAWS, len(hosts))) * HOST_SIGMA_W
    # A sigma that so few phases tell is itself uncertain: together that is Student's t.
    wider = np.sqrt(freedom / random.chisquare(freedom, DRAWS))
    apart = random.normal(0.0, 1.0, (DRAWS, len(own))) * np.where(own, wider[:, None], 1.0)
    draws = problem.solved(drawn, np.hstack([guesses_j, host_w, up_and_down]), apart)
    count, after = len(guess_j), len(guess_j) + len(hosts)
    groups, condition = _separable(ordered, names, sigma_j)
    residuals = {w.name: float(d - m) for w, d, m in zip(ordered, dynamic_j, model, strict=True)}
    more, mores = (of[..., after::2] - of[..., after + 1 :: 2] for of in (found, draws))
    return Marginals(
        unknowns,
        prior,
        found[:count],
        draws[:, :count],
        level_draws,
        slope_draws,
        {c: Estimate.of(float(more[i]), mores[:, i]) for i, c in enumerate(shared)},
        context_sigma * wider,
        {c: Estimate.of(float(found[count + i]), draws[:, count + i]) for i, c in enumerate(shared)},
        groups,
        residuals,
        condition,
    )


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
    guess_j: np.ndarray,
    more: tuple[list[str], int],
    context_sigma: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows, in sigmas, that hold the unknowns of one signature together, and which tie a context to replays.

    After the unknowns come *more*: so many of what the host adds, then for each of the contexts a pair of by how much
    of itself everything costs more there and by how much less.
    """
    shared, hosts = more
    pairs = len(guess_j) + hosts
    count = pairs + 2 * len(shared)
    regimes = {c: float(np.mean([w.regime for w in windows if w.context == c])) for c in {w.context for w in windows}}
    rows, to_replays = [], []
    for index, (name, powers, contexts) in enumerate(
        zip(unknowns.names, unknowns.regimes, unknowns.contexts, strict=True)
    ):
        first = unknowns.first(index)
        size_j = max(float(guess_j[first]), 1e-9)
        for left in range(first, first + len(powers) - 1):
            row = np.zeros(count)
            row[[left, left + 1]] = np.array([1.0, -1.0]) / (REGIME_SIGMA * size_j)
            rows.append(row)
            to_replays.append(False)
        own = range(first + len(powers), first + len(powers) + len(contexts))
        for unknown, context in zip(own, contexts, strict=True):
            row = np.zeros(count)
            row[unknown] = 1.0
            if powers:
                pair = pairs + 2 * shared.index(context)
                row[[pair, pair + 1]] = [-size_j, size_j]
                for knot, weight in unknowns.weights(name, "", regimes[context]).items():
                    row[knot] -= weight
                rows.append(row / (context_sigma * size_j))
                to_replays.append(True)
            elif unknown > first:
                row[first] = -1.0
                rows.append(row / (REGIME_SIGMA * size_j))
                to_replays.append(False)
    return np.array(rows).reshape(-1, count), np.array(to_replays, bool)


def _context_sigma(
    unknowns: Unknowns, windows: Sequence[Window], dynamic_j: np.ndarray, values_j: np.ndarray, doubt: FloorDoubt
) -> tuple[float, int]:
    """Return by how much of itself a launch costs more or less in a run than in replays, and how well that is known.

    A phase that takes other than its replays say shows it: as if each launch were off for itself, for that all were off
    together cannot be told from one phase. What else it may come from, classes that were not replayed and the floor,
    counts against it.
    """
    shown = []
    replayed = {name for name, powers in zip(unknowns.names, unknowns.regimes, strict=True) if powers}
    for context in sorted({w.context for w in windows if w.context}):
        own = [i for i, w in enumerate(windows) if w.context == context]
        window = windows[own[0]]
        parts_j = []
        other_j = 0.0
        for name, count in window.launches.items():
            by = "" if name in replayed else context
            weights = unknowns.weights(name, by, window.regime)
            joule = count * sum(weight * float(values_j[unknown]) for unknown, weight in weights.items())
            if name in replayed:
                parts_j.append(joule)
            else:
                other_j += joule
        total_j = sum(parts_j)
        if total_j <= 0:
            continue
        seen_j = float(np.mean(dynamic_j[own])) - other_j
        floor_j = math.hypot(doubt.level_w, doubt.slope_w_per_c * window.degrees) * window.seconds
        ticks_j = math.hypot(TICK_SIGMA_J, GAIN_SIGMA * window.energy_j) / math.sqrt(len(own))
        other = math.hypot(PRIOR_SIGMA * other_j, floor_j, ticks_j) / total_j
        together = sum((joule / total_j) ** 2 for joule in parts_j)
        shown.append((seen_j / total_j - 1) ** 2 / (together + (other / CONTEXT_SIGMA) ** 2))
    # What cancels out in one phase another may show, and half of what has one degree of freedom is below this mean.
    square = CONTEXT_FREEDOM * CONTEXT_SIGMA**2 + len(shown) * max(shown, default=0.0) / _MEDIAN_OF_ONE
    freedom = CONTEXT_FREEDOM + len(shown)
    return math.sqrt(square / freedom), freedom


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
    width: np.ndarray
    ties: np.ndarray

    def solved(self, dynamic_j: np.ndarray, prior_j: np.ndarray, apart: np.ndarray) -> np.ndarray:
        """Return a solution for each row of *dynamic_j*, *prior_j* and *apart* (how many sigmas the ties are off)."""
        width = self.width
        rows = np.vstack([self.counts * width / self.sigma_j[:, None], np.eye(len(width)), self.ties * width])
        found: np.ndarray = nnls_many(rows, np.hstack([dynamic_j / self.sigma_j, prior_j / width, apart])) * width
        return found


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
