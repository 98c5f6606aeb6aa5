"""Non-negative least squares for many sides at once, against SciPy's one by one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import nnls

from llmkern.attribute.split.nnls import nnls_many


@pytest.mark.parametrize("kind", ["dense", "sparse", "nothing above zero"])
@pytest.mark.parametrize("seed", range(8))
def test_every_side_has_the_solution_of_scipy(kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    unknowns = int(random.integers(1, 40))
    rows = random.normal(size=(unknowns + int(random.integers(0, 60)), unknowns)) * 10 ** random.uniform(
        -2, 2, unknowns
    )
    if kind == "sparse":
        # As windows are: few signatures in each, and a weak prior for every one.
        rows = np.vstack([np.abs(rows) * (random.random(rows.shape) < 0.2), 0.01 * np.eye(unknowns)])
    right = random.normal(size=(6, len(rows))) * 10 + rows @ np.abs(random.normal(size=unknowns))
    if kind == "nothing above zero":
        rows, right = np.abs(rows), -np.abs(right)
    found = nnls_many(rows, right)
    assert (found >= 0).all()
    for own, side in zip(found, right, strict=True):
        expected, _ = nnls(rows, side, maxiter=10_000)
        np.testing.assert_allclose(own, expected, rtol=1e-8, atol=1e-9 * max(float(expected.max()), 1e-12))
