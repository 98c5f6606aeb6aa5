"""What is left above the floor when kernels go, and how uncertain that is where nobody knows who takes what."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from llmkern.attribute.split.kernel_joules import EqualPower, MarginalJoules
from llmkern.estimate import DRAWS, Estimate

ROWS = pd.DataFrame(
    {
        "kernel_class": ["gemv", "copy", "norm"],
        "name": ["gemv", "copy", "norm"],
        "launches": [10.0, 100.0, 50.0],
        "duration_ns": [4e6, 3e6, 1e6],
    }
)
# Only the product is left, and of what it reads a half.
KEPT = np.array([0.5, 0.0, 0.0])


def about(value: float, spread: float) -> Estimate:
    return Estimate.of(value, value * (1 + spread * np.random.default_rng(4).standard_normal(DRAWS)))


def test_what_nobody_measured_is_kept_by_time_with_an_interval_that_says_so() -> None:
    equal = EqualPower(about(2.0, 0.01), about(100.0, 0.01), 8e-3, unlike=True)
    share = equal.kept(ROWS, KEPT)
    assert share.value == pytest.approx(0.25)
    assert share.low is not None
    assert share.high is not None
    # A product may take nearly all above the floor, or nearly nothing.
    assert share.low < 0.1
    assert share.high > 0.4
    assert share.high <= 0.5
    whole = equal.kept(ROWS, np.ones(3))
    assert (whole.value, whole.low, whole.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    # Without energy of the draws there is a value and no interval.
    assert EqualPower(Estimate(2.0), Estimate(100.0), 8e-3, unlike=True).kept(ROWS, KEPT).low is None


def test_what_was_measured_is_kept_by_what_each_launch_adds() -> None:
    joules = np.array([0.1, 1e-3, 2e-3])
    draws = joules * (1 + 0.05 * np.random.default_rng(5).standard_normal((DRAWS, 3)))
    marginal = MarginalJoules(
        ("gemv", "copy", "norm"), joules, draws, 100.0, np.full(DRAWS, 100.0), 8e-3, np.array([10.0, 100, 50]), 8e-3
    )
    share = marginal.kept(ROWS, KEPT)
    assert share.value == pytest.approx(0.5 * 1.0 / 1.2)
    assert share.low is not None
    assert share.high is not None
    assert 0.38 < share.low < share.value < share.high < 0.45
