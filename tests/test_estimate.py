"""An estimate is draws: what is derived from it lies where it must, and errors that are shared cancel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import bdtr, stdtrit

from llmkern.estimate import DRAWS, Estimate, from_samples, student_t

SAMPLES = st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=12)


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


@given(SAMPLES)
def test_the_interval_holds_the_value_and_lies_in_the_samples(values: list[float]) -> None:
    found = from_samples(values)
    low, high = ends(found)
    assert low <= found.value <= high
    if len(values) >= 6:
        assert min(values) <= low
        assert high <= max(values)


@pytest.mark.parametrize("count", [1, 2])
def test_two_values_have_no_interval_and_so_has_what_rests_on_them(count: int) -> None:
    few, many = from_samples([1.0] * count), from_samples([1.0, 2.0, 3.0])
    for derived in (few, few.scaled(2), few + many, few - many, few * many, few.map(np.square)):
        assert (derived.low, derived.high, derived.draws) == (None, None, None)
        assert not derived.is_known


@given(SAMPLES, st.floats(0, 1))
def test_a_part_lies_in_its_whole_at_both_ends(values: list[float], share: float) -> None:
    whole = from_samples(values)
    part = from_samples([value * (0.5 + share) for value in values]).within(whole)
    assert part.value <= whole.value
    assert ends(part)[0] <= ends(whole)[0] + 1e-12
    assert ends(part)[1] <= ends(whole)[1] + 1e-12


@given(SAMPLES)
def test_sums_of_draws_are_draws_of_sums(values: list[float]) -> None:
    whole = from_samples(values)
    parts = [whole.scaled(share) for share in (0.2, 0.3, 0.5)]
    total = parts[0] + parts[1] + parts[2]
    assert total.value == pytest.approx(whole.value)
    assert ends(total) == pytest.approx(ends(whole))
    # An error that both share cancels.
    assert ends(whole - whole) == (0.0, 0.0)


def test_runs_share_no_error() -> None:
    one = from_samples([1.0, 1.1, 0.9, 1.2, 1.0, 1.05, 0.95])
    difference = one.of_another_run() - one
    low, high = ends(difference)
    assert low < 0 < high
    assert not difference.is_known
    assert ends(one.of_another_run()) == ends(one)


def test_the_median_is_held_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    for count in (4, 6, 10):
        held = 0
        for _ in range(400):
            # Normal for Student's t; the order needs no such thing.
            values = random.normal(10, 1, count) if count < 6 else 10 + random.exponential(1, count) - math.log(2)
            low, high = ends(from_samples(list(values)))
            held += low <= 10 <= high
        assert held / 400 > 0.92, count


def test_draws_are_always_the_same_and_in_no_order_of_size() -> None:
    first, second = from_samples([1.0, 2.0, 4.0]), from_samples([1.0, 2.0, 4.0])
    assert first.draws is not None
    assert second.draws is not None
    assert len(first.draws) == DRAWS
    assert (first.draws == second.draws).all()
    assert (np.diff(first.draws) < 0).any()


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30])
def test_student_t_is_that_of_scipy(freedom: int) -> None:
    levels = (np.arange(400) + 0.5) / 400
    np.testing.assert_allclose(student_t(freedom, levels), stdtrit(freedom, levels), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [6, 9, 24])
def test_levels_of_the_median_are_those_of_the_binomial_distribution(count: int) -> None:
    # P(median below the k-th of n) = P(fewer than k heads in n tosses).
    values = np.arange(count, dtype=float)
    found = from_samples(values)
    assert found.draws is not None
    share = (found.draws <= values[1]).mean()
    assert share == pytest.approx(bdtr(1.0, count, 0.5), abs=0.004)
