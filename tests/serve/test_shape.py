"""The search for the bursts that take least: on a server of known joules and waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from llmkern.errors import UsageError
from llmkern.estimate import Estimate
from llmkern.serve.arrivals import schedule
from llmkern.serve.shape import best, find_shape, pattern_of, told


@dataclass(frozen=True)
class Result:
    pattern: str
    request_j: Estimate | None
    ttft_s: tuple[float, ...]


def server(noise: float = 0.01, energy: bool = True) -> Any:
    """A burst of K costs 100 + 900 / K joules a request, and the last of it waits 0.1 s for each of the K."""
    asked: list[str] = []

    def measure(pattern: str) -> Result:
        asked.append(pattern)
        size = 1 if pattern.startswith("fixed") else int(pattern[len("burst:") :].partition("@")[0])
        joules = 100 + 900 / size
        draws = joules * (1 + noise * np.random.default_rng(size).standard_normal(10_000))
        return Result(pattern, Estimate.of(joules, draws) if energy else None, (0.05, 0.08 * size, 0.1 * size))

    measure.asked = asked  # type: ignore[attr-defined]
    return measure


def apart(one: Any, other: Any) -> Any:
    """The ratio of two that share no request."""
    return one.request_j.of_another_run().with_(other.request_j, np.divide)


def test_the_largest_bursts_that_hold_the_limit_are_found() -> None:
    measure = server()
    shapes = find_shape(measure, 2.0, 1.2, 64)
    # Doubled until 16 is too late, then the size between 8 and 16.
    assert [one.size for one in shapes] == [1, 2, 4, 8, 11, 16]
    assert measure.asked == ["fixed:0.5", "burst:2@1", "burst:4@2", "burst:8@4", "burst:16@8", "burst:11@5.5"]
    found = best(shapes)
    assert found is not None
    assert found.size == 11
    assert [one.holds for one in shapes] == [True] * 5 + [False]
    # Dearer and sooner, cheaper and later: all of these are choices.
    assert all(one.on_frontier for one in shapes)
    sentence = told(shapes, 2.0, 1.2, apart)
    assert "burst:11@5.5 takes least within 1.2 s: 81.8%" in sentence


def test_every_shape_keeps_the_rate() -> None:
    for size in (1, 2, 8):
        made = schedule(pattern_of(size, 4.0), [(1, 1)] * 64, 0)
        assert made.last_s == pytest.approx((64 - size) / 4.0)


def test_where_nothing_holds_the_limit_it_is_said() -> None:
    shapes = find_shape(server(), 2.0, 0.01, 64)
    assert best(shapes) is None
    assert "no shape lets 99 %" in told(shapes, 2.0, 0.01, apart)


def test_what_noise_could_have_chosen_is_said() -> None:
    def flat(pattern: str) -> Any:
        joules = 99.0 if pattern.startswith("burst") else 100.0
        draws = joules * (1 + 0.1 * np.random.default_rng(len(pattern)).standard_normal(10_000))
        return Result(pattern, Estimate.of(joules, draws), (0.1, 0.1, 0.1))

    assert "cannot be told from requests one by one" in told(find_shape(flat, 2.0, 1.0, 8), 2.0, 1.0, apart)


def test_without_energy_there_is_nothing_to_choose_by() -> None:
    with pytest.raises(UsageError, match="no energy counter could be read"):
        find_shape(server(energy=False), 2.0, 1.0, 8)
