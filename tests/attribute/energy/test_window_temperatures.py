"""Each window at its own temperature: a board warms up by ten degrees over the rounds, its floor by as many watts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llmkern.attribute.attribution import attribute
from llmkern.attribute.energy.floor import Floor
from llmkern.attribute.energy.phases import PhaseWeight, _by_difference_c
from llmkern.estimate import Estimate
from tests.board import Board

FLOOR = Floor(120.0, 45.0, 0.1, 0.75, 0.05, 12, 40.0, 56.0)


def test_the_floor_of_decode_is_that_of_one_window_less_that_of_the_other() -> None:
    short = pd.DataFrame({"celsius": [48.0, 53.0], "latency_s": [0.1, 0.11]})
    long = pd.DataFrame({"celsius": [45.0, 52.5], "latency_s": [1.4, 1.2]})
    celsius = _by_difference_c(short, long)
    for i in range(2):
        both_j = [FLOOR.at(t["celsius"][i]).value * t["latency_s"][i] for t in (long, short)]
        decode_s = long["latency_s"][i] - short["latency_s"][i]
        assert FLOOR.at(celsius[i]).value * decode_s == pytest.approx(both_j[0] - both_j[1])


def test_two_windows_that_hardly_differ_do_not_say_any_temperature() -> None:
    short = pd.DataFrame({"celsius": [48.0], "latency_s": [0.1]})
    long = pd.DataFrame({"celsius": [45.0], "latency_s": [0.1001]})
    assert _by_difference_c(short, long)[0] == 42.0


def test_the_mean_temperature_gives_the_floor_of_all_rounds() -> None:
    celsius, seconds = [42.0, 54.0, float("nan")], [3.0, 1.0, 1.0]
    weight = PhaseWeight("decode", "token", Estimate(1.0), seconds, None, [], Estimate(1.0), None, celsius)
    rounds_j = sum(FLOOR.at(c).value * s for c, s in zip(celsius[:2], seconds[:2], strict=True))
    assert FLOOR.at(weight.temperature_c()).value * 4.0 == pytest.approx(rounds_j)
    assert PhaseWeight("decode", "token", Estimate(1.0), [1.0], None, [], Estimate(1.0), None).temperature_c() is None


def test_a_board_that_warms_up_shows_equal_work_as_equal(tmp_path: Path) -> None:
    """H100: the first round of a planted run was 7 °C colder and seemed to have taken 12 J less than the others."""
    board = Board(seed=1, first_c=36.0, last_c=66.0)
    board.play()
    evidence = attribute(board.write(tmp_path / "run")).evidence
    assert evidence is not None
    for phase in ("prefill", "decode"):
        own = [window for window in evidence.windows if window.context == phase]
        degrees = [window.degrees for window in own]
        assert max(degrees) - min(degrees) > 4
        work_j = np.array([window.energy_j - window.floor_w * window.seconds for window in own])
        assert np.ptp(work_j) / work_j.mean() < 0.06
        # With one floor for all rounds it would be so many watts off at both ends.
        same_j = np.array([window.energy_j - np.mean([w.floor_w for w in own]) * window.seconds for window in own])
        assert np.ptp(same_j) > 1.5 * np.ptp(work_j)
