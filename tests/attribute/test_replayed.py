"""The whole right half on a board of known joules: counter, samples, drift, noise, operators without a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkern.attribute.equal_power import Attribution, attribute
from llmkern.attribute.identify import identify
from llmkern.attribute.replayed import CAPPED, Replays, account_replays, worth_replaying
from llmkern.run import RunFolder
from tests.board import CAPPED_PREFILL, OPS, PREFILL, TOKEN, Board, Sensor


def played(path: Path, **options: Any) -> tuple[RunFolder, Attribution, Replays]:
    board = Board(**options)
    board.play()
    run = board.write(path)
    attribution = attribute(run)
    found = account_replays(run, attribution, identify(run, attribution.timeline, 0))
    assert found is not None
    return run, attribution, found


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
    _, _, found = played(tmp_path / "run", **options)
    for name in ("gemv", "softmax"):
        estimate = found.marginals.energy_j[name]
        assert estimate.value == pytest.approx(OPS[name].joule, rel=0.03), name
    # A cast that adds 17 W above a floor of 121 W is known less well, and says so.
    cast = found.marginals.energy_j["cast"]
    assert cast.low is not None
    assert cast.high is not None
    assert cast.low <= OPS["cast"].joule <= cast.high


def test_intervals_hold_the_truth_over_many_runs(tmp_path: Path) -> None:
    held = asked = 0
    for seed in range(10):
        _, _, found = played(tmp_path / str(seed), seed=seed)
        for name in ("gemv", "softmax", "cast"):
            estimate = found.marginals.energy_j[name]
            assert estimate.low is not None
            assert estimate.high is not None
            held += estimate.low <= OPS[name].joule <= estimate.high
            asked += 1
    assert held >= asked - 3


def test_phases_are_explained_and_the_books_close(tmp_path: Path) -> None:
    _, attribution, found = played(tmp_path / "run")
    for phase, launches in (("prefill", PREFILL), ("decode", TOKEN)):
        account, equal = found.phases[phase], attribution.accounts[phase]
        energy = equal.weight.energy_j
        assert energy is not None
        assert account.kernel_j.value + account.gap_j + account.residual_j == pytest.approx(energy.value, rel=1e-9)
        assert abs(account.residual_j) < 0.03 * energy.value
        truth_j = sum(OPS[n].joule * k for n, k in launches.items())
        dynamic_j = account.by_signature["dynamic_j"].sum()
        assert dynamic_j == pytest.approx(truth_j, rel=0.03)


def test_joules_at_the_power_cap_are_kept_apart(tmp_path: Path) -> None:
    # GIVEN a prefill at the cap, and a GEMM that reaches it in one of its two replays
    _, attribution, found = played(
        tmp_path / "run", prefill=CAPPED_PREFILL, replayed=("gemm", "gemv", "softmax", "cast")
    )
    energies = found.marginals.energy_j
    assert energies["gemm"].value == pytest.approx(OPS["gemm"].joule, rel=0.03)
    assert energies["gemm" + CAPPED].value == pytest.approx(OPS["gemm"].capped_joule, rel=0.03)
    # THEN the prefill is explained by the joules of its own regime
    energy = attribution.accounts["prefill"].weight.energy_j
    assert energy is not None
    assert abs(found.phases["prefill"].residual_j) < 0.03 * energy.value
    assert "gemm" + CAPPED in set(found.phases["prefill"].by_signature["signature"])


def test_equal_power_is_wrong_where_marginals_are_right(tmp_path: Path) -> None:
    _, attribution, found = played(tmp_path / "run")
    decode = attribution.accounts["decode"]
    rows = attribution.frame[attribution.frame["phase"] == "decode"].set_index("name")
    floor_w = decode.floor_w.value  # type: ignore[union-attr]
    truth_j = TOKEN["softmax"] * (OPS["softmax"].joule + floor_w * OPS["softmax"].seconds)
    by_duration = rows.loc["softmax", "energy_j"]
    marginal = found.phases["decode"].by_signature.set_index("signature").loc["softmax", "energy_j"]
    assert abs(by_duration / truth_j - 1) > 0.3
    assert marginal == pytest.approx(truth_j, rel=0.04)


def test_a_gain_scales_everything_alike(tmp_path: Path) -> None:
    quiet = {"noise_mj": 0.0}
    _, _, one = played(tmp_path / "a", sensor=Sensor(**quiet), last_c=38.0)
    _, _, other = played(tmp_path / "b", sensor=Sensor(gain=1.05, **quiet), last_c=38.0)
    for name in ("gemv", "softmax"):
        ratio = other.marginals.energy_j[name].value / one.marginals.energy_j[name].value
        assert ratio == pytest.approx(1.05, rel=0.005)


def test_what_takes_the_time_is_replayed_first(tmp_path: Path) -> None:
    run, _, _ = played(tmp_path / "run")
    wanted = worth_replaying(run, 0)
    assert wanted[:2] == ["gemv", "softmax"] or wanted[:2] == ["softmax", "gemv"]
    assert worth_replaying(run, 0, most=1) == wanted[:1]
    assert worth_replaying(run, 0, share=0.5) == wanted[:2]


def test_without_replays_there_is_no_such_account(tmp_path: Path) -> None:
    board = Board(replayed=())
    board.play()
    run = board.write(tmp_path / "run")
    attribution = attribute(run)
    assert account_replays(run, attribution, identify(run, attribution.timeline, 0)) is None
