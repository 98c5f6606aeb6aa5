"""The whole right half on a board of known joules: counter, samples, drift, noise, operators without a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkern.attribute.attribution import Attribution, attribute
from llmkern.attribute.split.replay_plan import worth_replaying
from llmkern.estimate import Estimate
from llmkern.runfolder import RunFolder
from tests.board import CAPPED_PREFILL, OPS, PREFILL, TOKEN, Board, Sensor


def played(path: Path, **options: Any) -> tuple[RunFolder, Attribution]:
    board = Board(**options)
    board.play()
    run = board.write(path)
    return run, attribute(run)


def joule(found: Attribution, name: str, phase: str = "decode") -> Estimate:
    """Return the J per launch in in *phase*."""
    assert found.marginals is not None
    return found.marginals.per_launch(name, phase)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sensor": Sensor(lag_ms=25.0)},
        {"sensor": Sensor(tick_ns=20 * 1_000_000)},
        {"last_c": 38.0},
        {"floor_w": 75.0, "slope_w_per_c": 1.5},
    ],
    ids=["as an H100", "late samples", "fast counter", "no drift", "another board"],
)
def test_replayed_operators_get_their_joules_and_the_intervals_hold_them(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    _, found = played(tmp_path / "run", **options)
    for name in ("gemv", "softmax"):
        estimate = joule(found, name)
        assert estimate.value == pytest.approx(OPS[name].joule, rel=0.03), name
    # A cast that adds 17 W above a floor of 121 W is known less well, and says so.
    cast = joule(found, "cast")
    assert cast.low is not None
    assert cast.high is not None
    assert cast.low <= OPS["cast"].joule <= cast.high


def test_intervals_hold_the_truth_over_many_runs(tmp_path: Path) -> None:
    held = asked = 0
    for seed in range(10):
        _, found = played(tmp_path / str(seed), seed=seed)
        for name in ("gemv", "softmax", "cast"):
            estimate = joule(found, name)
            assert estimate.low is not None
            assert estimate.high is not None
            held += estimate.low <= OPS[name].joule <= estimate.high
            asked += 1
    assert held >= asked - 3


def test_phases_are_explained_and_the_books_close(tmp_path: Path) -> None:
    _, found = played(tmp_path / "run")
    for phase, launches in (("prefill", PREFILL), ("decode", TOKEN)):
        account = found.accounts[phase]
        energy = account.weight.energy_j
        assert energy is not None
        rows = found.frame[found.frame["phase"] == phase]
        assert rows["energy_j"].sum() == pytest.approx(energy.value, rel=1e-9)
        assert abs(account.residual_j or 0.0) < 0.03 * energy.value
        truth_j = sum(OPS[n].joule * k for n, k in launches.items())
        kernels = rows[~rows["kind"].isin(["gap", "residual"])]
        assert kernels["dynamic_j"].sum() == pytest.approx(truth_j, rel=0.03)
        assert (kernels["low_j"] <= kernels["energy_j"]).all()
        assert (kernels["energy_j"] <= kernels["high_j"]).all()
        # The same joules, whoever they are summed by.
        assert found.split(phase, ["op", "module"])["energy_j"].sum() == pytest.approx(kernels["energy_j"].sum())
        assert account.kernel_j is not None
        assert account.kernel_j.value == pytest.approx(kernels["energy_j"].sum())


def test_a_prefill_at_the_power_cap_is_explained_by_what_a_launch_costs_there(tmp_path: Path) -> None:
    # GIVEN a prefill at the cap, and a GEMM that reaches it in one of its two replays
    _, found = played(tmp_path / "run", prefill=CAPPED_PREFILL, replayed=("gemm", "gemv", "softmax", "cast"))
    assert joule(found, "gemm", "prefill").value == pytest.approx(OPS["gemm"].capped_joule, rel=0.03)
    assert joule(found, "gemm", "decode").value == pytest.approx(OPS["gemm"].joule, rel=0.03)
    energy = found.accounts["prefill"].weight.energy_j
    assert energy is not None
    assert abs(found.accounts["prefill"].residual_j or 0.0) < 0.03 * energy.value


def test_equal_power_is_wrong_where_marginals_are_right(tmp_path: Path) -> None:
    run, found = played(tmp_path / "run")
    floor_w = found.accounts["decode"].floor_w.value  # type: ignore[union-attr]
    truth_j = TOKEN["softmax"] * (OPS["softmax"].joule + floor_w * OPS["softmax"].seconds)

    def softmax(attribution: Attribution) -> float:
        rows = attribution.frame[attribution.frame["phase"] == "decode"].set_index("name")
        return float(rows.loc["softmax", "energy_j"])

    assert abs(softmax(attribute(run, equal_power=True)) / truth_j - 1) > 0.3
    assert softmax(found) == pytest.approx(truth_j, rel=0.04)


def test_a_gain_scales_everything_alike(tmp_path: Path) -> None:
    quiet = {"noise_mj": 0.0}
    _, one = played(tmp_path / "a", sensor=Sensor(**quiet), last_c=38.0)
    _, other = played(tmp_path / "b", sensor=Sensor(gain=1.05, **quiet), last_c=38.0)
    for name in ("gemv", "softmax"):
        assert joule(other, name).value / joule(one, name).value == pytest.approx(1.05, rel=0.005)


def test_what_takes_the_time_is_replayed_first(tmp_path: Path) -> None:
    _, found = played(tmp_path / "run")
    described = (found.kernels, list(found.accounts))
    wanted = list(worth_replaying(*described))
    assert set(wanted[:2]) == {"gemv", "softmax"}
    assert list(worth_replaying(*described, most=1)) == wanted[:1]
    assert list(worth_replaying(*described, share=0.5)) == wanted[:2]


def test_without_replays_kernels_get_equal_power(tmp_path: Path) -> None:
    board = Board(replayed=())
    board.play()
    found = attribute(board.write(tmp_path / "run"))
    assert found.marginals is None
    assert found.accounts["decode"].joules.method == "equal power"  # type: ignore[union-attr]
