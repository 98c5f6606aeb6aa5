"""Attribution against a synthetic board whose joules are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.attribute.attribution import attribute
from llmkern.attribute.energy.phases import weigh_phases
from llmkern.attribute.time.timeline import build_timeline
from tests.synthetic import synthetic_run


def test_phases_are_weighed_to_half_a_percent(tmp_path: Path) -> None:
    run, truth = synthetic_run(tmp_path / "run")
    weighed = weigh_phases(run, "nvml_total", 0)
    assert weighed is not None
    prefill, decode = weighed.phases["prefill"], weighed.phases["decode"]
    assert prefill.latency_s.value == pytest.approx(truth.prefill_s, rel=1e-3)
    assert decode.latency_s.value == pytest.approx(truth.token_s, rel=1e-3)
    assert prefill.energy_j is not None
    assert decode.energy_j is not None
    assert prefill.energy_j.value == pytest.approx(truth.prefill_j, rel=5e-3)
    assert decode.energy_j.value == pytest.approx(truth.token_j, rel=5e-3)


def test_decode_by_ranges_and_by_difference_agree(tmp_path: Path) -> None:
    run, truth = synthetic_run(tmp_path / "run", new_tokens=32)
    decode = weigh_phases(run, "nvml_total", 0).phases["decode"]  # type: ignore[union-attr]
    assert decode.latency_by_ranges_s.value == pytest.approx(decode.latency_s.value, rel=0.005)
    assert decode.energy_by_ranges_j is not None
    assert decode.energy_by_ranges_j.value == pytest.approx(truth.token_j, rel=0.02)


def test_the_floor_is_found_and_the_books_close(tmp_path: Path) -> None:
    run, truth = synthetic_run(tmp_path / "run")
    weighed = weigh_phases(run, "nvml_total", 0)
    assert weighed is not None
    assert weighed.floor is not None
    assert weighed.floor.at(50.0).value == pytest.approx(truth.floor_w, rel=1e-3)
    assert weighed.counter_j is not None
    assert weighed.windows_j + weighed.idle_j + weighed.residual_j == pytest.approx(weighed.counter_j)  # type: ignore[operator]
    assert abs(weighed.residual_j) < 0.002 * weighed.counter_j  # type: ignore[arg-type]


def test_kernels_and_gaps_get_their_true_joules(tmp_path: Path) -> None:
    run, truth = synthetic_run(tmp_path / "run")
    account = attribute(run).accounts["decode"]
    assert account.launches == truth.kernels_per_token
    assert account.busy_s == pytest.approx(truth.busy_per_token_s, rel=1e-3)
    gap_j = truth.floor_w * (truth.token_s - truth.busy_per_token_s)
    assert account.gap_j is not None
    assert account.kernel_j is not None
    assert account.gap_j.value == pytest.approx(gap_j, rel=0.01)
    assert account.kernel_j.value == pytest.approx(truth.kernel_w * truth.busy_per_token_s, rel=0.02)


def test_intervals_hold_the_truth_about_as_often_as_they_say(tmp_path: Path) -> None:
    held = 0
    for seed in range(20):
        run, truth = synthetic_run(tmp_path / f"run{seed}", seed=seed, jitter=0.05, rounds=5)
        gap = attribute(run).accounts["decode"].gap_s
        assert gap.low is not None
        assert gap.high is not None
        held += gap.low < truth.token_s - truth.busy_per_token_s < gap.high
        assert gap.high - gap.low < 0.1 * gap.value
    # 16 or fewer of 20 would come by chance once in 60 times.
    assert held >= 17


@settings(max_examples=12, deadline=None)
@given(
    floor_w=st.floats(60, 200),
    kernel_w=st.floats(250, 650),
    busy_ms=st.floats(0.5, 25),
    kernels=st.integers(2, 40),
)
def test_every_phase_is_as_it_was_played(
    tmp_path_factory: pytest.TempPathFactory, floor_w: float, kernel_w: float, busy_ms: float, kernels: int
) -> None:
    run, truth = synthetic_run(
        tmp_path_factory.mktemp("property") / "run",
        floor_w=floor_w,
        kernel_w=kernel_w,
        busy_per_token_s=busy_ms / 1e3,
        kernels_per_token=kernels,
        rounds=2,
    )
    found = attribute(run)
    planted_j = {"prefill": truth.prefill_j, "decode": truth.token_j}
    for phase, account in found.accounts.items():
        energy = account.weight.energy_j
        assert energy is not None
        assert energy.value == pytest.approx(planted_j[phase], rel=0.02)
        assert account.gap_j is not None
        idle_s = {
            "prefill": truth.prefill_s * (1 - truth.prefill_busy),
            "decode": truth.token_s - truth.busy_per_token_s,
        }[phase]
        assert account.gap_j.value == pytest.approx(truth.floor_w * idle_s, rel=0.03, abs=0.01 * energy.value)
        rows = found.frame[found.frame["phase"] == phase]
        assert rows["energy_j"].sum() == pytest.approx(energy.value, rel=1e-9)
        parts = rows[rows["kind"] != "residual"]
        assert (parts["energy_j"] >= 0).all()
        np.testing.assert_allclose(parts["floor_j"] + parts["dynamic_j"], parts["energy_j"], rtol=1e-9)


def test_impossible_kernel_power_becomes_a_residual(tmp_path: Path) -> None:
    # GIVEN a board whose kernels draw far more than its limit of 700 W allows
    run, _ = synthetic_run(tmp_path / "run", kernel_w=2000.0)
    account = attribute(run).accounts["decode"]
    # THEN kernels get what the limit allows, and the rest is shown
    assert account.residual_j is not None
    assert account.kernel_j is not None
    assert account.kernel_j.value == pytest.approx(735 * account.busy_s, rel=1e-6)
    assert account.residual_j > 1.0


def test_without_energy_there_is_time_only(tmp_path: Path) -> None:
    run, truth = synthetic_run(tmp_path / "run", energy=False)
    account = attribute(run).accounts["decode"]
    assert account.kernel_j is None
    assert account.gap_j is None
    assert account.weight.energy_j is None
    assert account.weight.latency_s.value == pytest.approx(truth.token_s, rel=1e-3)


def test_one_round_has_no_interval(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run", rounds=1)
    decode = weigh_phases(run, "nvml_total", 0).phases["decode"]  # type: ignore[union-attr]
    assert decode.energy_j is not None
    assert decode.energy_j.low is None


def test_overlapping_streams_are_busy_once(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    kernels = run.table("kernels")
    doubled = kernels.assign(stream=8, correlation_id=kernels["correlation_id"] + 10**6)
    import pandas as pd

    both = pd.concat([kernels, doubled], ignore_index=True)
    one = build_timeline(kernels, run.table("launches"), run.table("ranges"), 0)
    two = build_timeline(both, run.table("launches"), run.table("ranges"), 0)
    np.testing.assert_allclose(two.phases["busy_ns"], one.phases["busy_ns"])
    np.testing.assert_allclose(two.phases["gap_ns"], one.phases["gap_ns"])
    assert two.phases["kernels"].sum() == 2 * one.phases["kernels"].sum()


def test_kernels_belong_to_the_token_that_launched_them_even_if_they_run_later(tmp_path: Path) -> None:
    run, truth = synthetic_run(tmp_path / "run")
    kernels, launches, ranges = (run.table(t) for t in ("kernels", "launches", "ranges"))
    # GIVEN a device that lags a whole token behind the host
    lag = round(truth.token_s * 1e9)
    late = kernels.assign(start_ns=kernels["start_ns"] + lag, end_ns=kernels["end_ns"] + lag)
    found = build_timeline(late, launches, ranges, 0)
    counts = found.kernels[found.kernels["phase"] == "decode"].groupby(["instance", "token"]).size()
    assert (counts == truth.kernels_per_token).all()
    assert found.outside == 0


def test_another_devices_kernels_do_not_count(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    kernels = run.table("kernels").assign(device=1)
    found = build_timeline(kernels, run.table("launches"), run.table("ranges"), 0)
    assert found.kernels.empty
    assert found.phases["busy_ns"].sum() == 0
