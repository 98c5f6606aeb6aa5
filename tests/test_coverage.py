"""A fixed few of the boards that bench.coverage plays by the dozen: intervals hold the truth, values are near it."""

from __future__ import annotations

import numpy as np
import pytest

from bench.coverage import QUICK, judged


@pytest.mark.parametrize(
    "scenario", ["base", "replay differs by 2 %", "hard power cap", "host adds 2 W in gaps", "nothing alone", QUICK]
)
def test_intervals_hold_the_truth(scenario: str) -> None:
    rows = judged(seed=1, scenario=scenario)
    held = [holds for name, _, holds in rows if not name.startswith("all")]
    assert len(held) >= 8
    assert np.mean(held) >= 0.9
    if scenario != QUICK:
        single = [abs(error) for name, error, _ in rows if name.startswith(("single", "floor"))]
        assert max(single) < 0.05
