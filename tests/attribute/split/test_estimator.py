"""Joules per launch against boards whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.attribute.split.estimator import FloorDoubt, Marginals, estimate_marginals
from llmkern.attribute.split.prior import Features
from llmkern.attribute.split.unknowns import Window
from llmkern.estimate import Estimate

FLOOR_W = 121.0
# Seconds, bytes, FLOPs and J per launch above the floor; the two norms always run together.
BOARD = {
    "cast": (2e-6, 1e5, 0.0, 0.03e-3),
    "gemv": (55e-6, 136e6, 1.4e8, 19e-3),
    "gemm": (180e-6, 1e8, 1.37e11, 150e-3),
    "reduce": (3e-6, 4e6, 1e6, 0.5e-3),
    "norm a": (2e-6, 3e4, 1e5, 0.1e-3),
    "norm b": (2e-6, 3e4, 1e5, 0.1e-3),
}
FEATURES = {n: Features(*v[:3]) for n, v in BOARD.items()}
TRUTH = {n: v[3] for n, v in BOARD.items()}


def window(name: str, launches: dict[str, float], seconds: float, noise_j: float = 0.0, context: str = "") -> Window:
    energy_j = FLOOR_W * seconds + sum(TRUTH[n] * k for n, k in launches.items()) + noise_j
    return Window(name, energy_j, seconds, FLOOR_W, launches, context)


def measured(seed: int = 0, noise_j: float = 0.4, floor_error_w: float = 0.0) -> list[Window]:
    """Replays of four signatures at two duty cycles, and windows of the run in which all ran."""
    random = np.random.default_rng(seed)
    windows = []
    for name in ("cast", "gemv", "gemm", "reduce"):
        for duty in (0.25, 0.5):
            launches = {name: duty * 2.0 / BOARD[name][0] * (0.3 if name == "cast" else 1.0)}
            windows.append(window(f"{name} {duty}", launches, 2.0, random.normal(0, noise_j)))
    token = {"cast": 300.0, "gemv": 140.0, "reduce": 200.0, "norm a": 57.0, "norm b": 57.0}
    for i in range(6):
        tokens = 80
        launches = {n: k * tokens for n, k in token.items()}
        windows.append(window(f"run {i}", launches, 2.2, random.normal(0, noise_j), "decode"))
    return [Window(w.name, w.energy_j, w.seconds, w.floor_w + floor_error_w, w.launches, w.context) for w in windows]


def joule(found: Marginals, name: str, mean_w: float = 250.0) -> Estimate:
    return found.per_launch(name, "decode", mean_w)


def test_what_was_replayed_is_found_to_a_few_percent() -> None:
    found = estimate_marginals(measured(), FEATURES, doubt=FloorDoubt(0.3))
    for name, share in (("gemv", 0.02), ("gemm", 0.02), ("reduce", 0.05)):
        assert joule(found, name).value == pytest.approx(TRUTH[name], rel=share)


def test_equal_power_would_be_far_off() -> None:
    # The very reason for marginals: by duration a cast would cost as much per second as the GEMV.
    found = estimate_marginals(measured(), FEATURES)
    power = {n: joule(found, n).value / BOARD[n][0] for n in ("cast", "gemv")}
    assert power["gemv"] > 10 * power["cast"]


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = asked = 0
    for seed in range(30):
        random = np.random.default_rng(1000 + seed)
        found = estimate_marginals(
            measured(seed, floor_error_w=random.normal(0, 0.4)), FEATURES, doubt=FloorDoubt(0.4), seed=seed
        )
        for name in ("cast", "gemv", "gemm", "reduce"):
            estimate = joule(found, name)
            assert estimate.low is not None
            assert estimate.high is not None
            held += estimate.low <= TRUTH[name] <= estimate.high
            asked += 1
    assert asked == 120
    # 95 % of 120 is 114; fewer than 107 would come by chance once in 500 times.
    assert held >= 107


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return (estimate.high - estimate.low) / 2


def test_what_cannot_be_told_apart_is_a_group_with_a_wide_interval() -> None:
    found = estimate_marginals(measured(), FEATURES)
    assert found.groups == [("norm a", "norm b")]
    together = sum(joule(found, n).value for n in ("norm a", "norm b"))
    assert together >= 0
    for name in ("norm a", "norm b"):
        half = width(joule(found, name))
        assert half is not None
        assert half > 0.3 * joule(found, name).value


def test_a_model_that_does_not_fit_widens_the_intervals() -> None:
    good = estimate_marginals(measured(noise_j=0.4), FEATURES)
    bad = estimate_marginals(measured(noise_j=8.0), FEATURES)
    assert width(joule(bad, "gemv")) > 2 * width(joule(good, "gemv"))  # type: ignore[operator]
    assert max(map(abs, bad.residuals_j.values())) > 2


def test_order_does_not_matter() -> None:
    windows = measured()
    one = estimate_marginals(windows, FEATURES)
    other = estimate_marginals(windows[::-1], dict(reversed(FEATURES.items())))
    assert one.unknowns == other.unknowns
    np.testing.assert_array_equal(one.values_j, other.values_j)
    np.testing.assert_array_equal(one.draws_j, other.draws_j)


def total(found: Marginals, launches: dict[str, float], mean_w: float) -> float:
    return float(found.unknowns.row(launches, "", mean_w) @ found.values_j)


def test_splitting_a_window_changes_nothing_much() -> None:
    windows = measured(noise_j=0.0)
    whole = windows[0]
    halves = [
        Window(
            f"{whole.name} {half}",
            whole.energy_j / 2,
            whole.seconds / 2,
            whole.floor_w,
            {n: k / 2 for n, k in whole.launches.items()},
        )
        for half in (1, 2)
    ]
    one = estimate_marginals(windows, FEATURES)
    two = estimate_marginals([*halves, *windows[1:]], FEATURES)
    for name in TRUTH:
        assert joule(two, name).value == pytest.approx(joule(one, name).value, rel=0.02, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    truths=st.lists(st.floats(1e-6, 0.2), min_size=2, max_size=6),
    floor_w=st.floats(60, 200),
    noise_j=st.floats(0, 3),
    seed=st.integers(0, 10**6),
)
def test_energies_are_never_negative_and_the_books_close(
    truths: list[float], floor_w: float, noise_j: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    names = [f"k{i}" for i in range(len(truths))]
    features = {n: Features(e / 300, e * 1e9, e * 1e11) for n, e in zip(names, truths, strict=True)}
    windows = []
    for i in range(2 * len(names) + 3):
        launches = {n: float(random.integers(0, 2000)) for n in names}
        energy_j = floor_w * 2.0 + sum(launches[n] * e for n, e in zip(names, truths, strict=True))
        windows.append(Window(f"w{i}", energy_j + random.normal(0, noise_j), 2.0, floor_w, launches))
    found = estimate_marginals(windows, features)
    for name in found.unknowns.names:
        estimate = joule(found, name)
        assert estimate.value >= 0
        assert estimate.low is not None
        assert estimate.high is not None
        assert 0 <= estimate.low <= estimate.value <= estimate.high
    for w in windows:
        modelled = w.floor_w * w.seconds + total(found, dict(w.launches), w.mean_w)
        assert modelled + found.residuals_j[w.name] == pytest.approx(w.energy_j, rel=1e-9)


def test_a_phase_takes_the_joules_of_its_own_regime() -> None:
    # GIVEN a GEMM that costs 155 mJ below the power cap and 123 mJ at it
    def replay(name: str, duty: float, joules: float) -> Window:
        launches = duty * 2.0 / BOARD["gemm"][0]
        return Window(name, FLOOR_W * 2.0 + launches * joules, 2.0, FLOOR_W, {"gemm": launches})

    below, above = replay("a", 0.4, 0.155), replay("b", 0.9, 0.123)
    found = estimate_marginals([below, above], FEATURES)
    assert joule(found, "gemm", 200.0).value == pytest.approx(0.155, rel=0.01)
    assert joule(found, "gemm", below.mean_w).value == pytest.approx(0.155, rel=0.01)
    assert joule(found, "gemm", (below.mean_w + above.mean_w) / 2).value == pytest.approx(0.139, rel=0.01)
    assert joule(found, "gemm", 800.0).value == pytest.approx(0.123, rel=0.01)
    # AND a run at the cap is explained by what it costs there
    run = Window("run", FLOOR_W * 2.0 + 9900 * 0.123, 2.0, FLOOR_W, {"gemm": 9900.0}, "prefill")
    assert abs(estimate_marginals([below, above, run], FEATURES).residuals_j["run"]) < 0.01 * run.energy_j


def test_windows_of_one_regime_are_pooled() -> None:
    found = estimate_marginals(measured(), FEATURES)
    powers = dict(zip(found.unknowns.names, found.unknowns.regimes, strict=True))
    # A cast draws so little that duty makes no regime; what was never replayed has none.
    assert len(powers["cast"] or ()) == 1
    assert len(powers["gemv"] or ()) == 2
    assert powers["norm a"] == ()
    # Each was replayed alone, so that nothing stands between them.
    assert found.condition == pytest.approx(1.0)
    with pytest.raises(ValueError, match="mystery"):
        found.per_launch("mystery")


def test_nothing_to_estimate_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="no windows"):
        estimate_marginals([], FEATURES)
    with pytest.raises(ValueError, match="no features of mystery"):
        estimate_marginals([Window("w", 300.0, 2.0, FLOOR_W, {"mystery": 3.0})], FEATURES)
