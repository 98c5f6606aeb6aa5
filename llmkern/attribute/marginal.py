"""Joules per launch of each kernel signature, from windows in which the counter moved by a known amount.

Model (facts and limits: README, "How it works"): in a window of t seconds

    energy = floor x t + sum over signatures of launches x joules per launch + error

with joules per launch above the idle floor and not negative. Windows come from replays, where one signature ran alone,
and from the run itself, where all ran together. What the data leave open is held by a weak prior from bytes and FLOPs.
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
# Signatures whose columns are this close to parallel cannot be told apart by any window.
PARALLEL = 0.999


@dataclass(frozen=True)
class Window:
    """One stretch between two counter ticks: J, s, the idle floor in W there, and launches per signature."""

    name: str
    energy_j: float
    seconds: float
    floor_w: float
    launches: Mapping[str, float]
    source: str = "replay"


@dataclass(frozen=True)
class Features:
    """What the prior knows of a signature: seconds on the device, bytes moved, FLOPs, all per launch."""

    seconds: float
    moved_bytes: float
    flops: float


@dataclass(frozen=True)
class Marginals:
    """Joules per launch above the floor, with 95 % intervals.

    ``groups`` are signatures that no window tells apart: each got the prior's share of what they took together.
    ``residuals_j`` is energy minus model per window; ``condition`` that of the scaled system without the prior.
    """

    energy_j: dict[str, Estimate]
    groups: list[tuple[str, ...]]
    residuals_j: dict[str, float]
    condition: float


def estimate_marginals(
    windows: Sequence[Window], features: Mapping[str, Features], *, floor_sigma_w: float = 0.0, seed: int = 0
) -> Marginals:
    """Return the joules per launch of every signature in *features* that ran in *windows*.

    Non-negative least squares, each window weighted by what its ticks and the counter's gain leave uncertain.
    Intervals are from a parametric bootstrap over windows in which the floor errs alike in all of them
    (*floor_sigma_w*, one sigma). Raises ValueError without windows or for a launch of an unknown signature.
    """
    if not windows:
        raise ValueError("no windows to estimate from")
    unknown = {s for w in windows for s in w.launches} - set(features)
    if unknown:
        raise ValueError(f"no features of {', '.join(sorted(unknown))}")
    # The order of signatures and windows must not matter, not even in the last bit.
    names = sorted({s for w in windows for s in w.launches})
    ordered = sorted(windows, key=lambda w: w.name)
    counts = np.array([[w.launches.get(n, 0.0) for n in names] for w in ordered])
    seconds = np.array([w.seconds for w in ordered])
    dynamic_j = np.array([w.energy_j - w.floor_w * w.seconds for w in ordered])
    sigma_j = np.hypot(TICK_SIGMA_J, GAIN_SIGMA * np.array([w.energy_j for w in ordered]))
    traits = np.array([[features[n].seconds, features[n].moved_bytes, features[n].flops] for n in names])
    groups = _parallel(counts, names)
    weights = _prior_weights(counts, traits, dynamic_j, sigma_j)
    energy = _solve(counts, dynamic_j, sigma_j, traits @ weights)
    random = np.random.default_rng(seed)
    model = counts @ energy
    # Windows that fit worse than their ticks explain say that the model is that wrong here.
    excess = float(np.sqrt(np.mean(((dynamic_j - model) / sigma_j) ** 2))) if len(ordered) > 1 else 1.0
    spread = sigma_j * max(1.0, excess)
    draws = np.empty((DRAWS, len(names)))
    for i in range(DRAWS):
        shift_w = random.normal(0.0, floor_sigma_w) if floor_sigma_w > 0 else 0.0
        drawn_j = model + random.normal(0.0, spread) - shift_w * seconds
        prior_j = traits @ weights * np.exp(random.normal(0.0, PRIOR_SIGMA, len(names)))
        draws[i] = _solve(counts, drawn_j, sigma_j, prior_j)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    found = {
        n: Estimate(float(energy[i]), float(min(low[i], energy[i])), float(max(high[i], energy[i])), len(ordered))
        for i, n in enumerate(names)
    }
    scaled = counts / sigma_j[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    condition = float(np.linalg.cond(scaled / np.where(norms > 0, norms, 1.0)))
    residuals = {w.name: float(d - m) for w, d, m in zip(ordered, dynamic_j, model, strict=True)}
    return Marginals(found, groups, residuals, condition)


def _solve(counts: np.ndarray, dynamic_j: np.ndarray, sigma_j: np.ndarray, prior_j: np.ndarray) -> np.ndarray:
    """Return the non-negative joules per launch that fit the windows, drawn to the prior where they leave a choice."""
    width = np.maximum(PRIOR_SIGMA * prior_j, 1e-9)
    # Scaled to the prior: joules per launch span five orders of magnitude.
    scale = np.maximum(prior_j, 1e-9)
    rows = np.vstack([counts * scale / sigma_j[:, None], np.diag(scale / width)])
    right = np.concatenate([dynamic_j / sigma_j, prior_j / width])
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


def _parallel(counts: np.ndarray, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the groups of signatures whose launches went together in every window."""
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
    return groups
