"""What a class of kernels may take by its length, blocks, bytes and FLOPs, before any window has seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmkern.attribute.split.unknowns import Window

# The prior is a guess from length, blocks, bytes and FLOPs: right to a factor of two (one sigma of its logarithm).
PRIOR_SIGMA = 0.7
# To this factor (one sigma of its logarithm) the prior explains a window, and is a weight what it is without data.
PRIOR_FIT_SIGMA, PRIOR_HOLD_SIGMA = 0.5, 1.5
# So long a kernel that does nothing takes.
LAUNCH_S = 1.5e-6


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


def prior_weights(
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
