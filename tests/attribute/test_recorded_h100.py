"""A run recorded on an H100 (qwen-7b bf16, cut to seven decoded tokens): what was real must stay explicable.

The expected values are those of bench/results, or follow from each other.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.result import RESULTS
from llmkern.attribute.attribution import Attribution, attribute
from llmkern.runfolder import RunFolder
from tests.recorded import recorded

RUN = Path(__file__).parents[1] / "data" / "h100-qwen-7b-bf16"


@pytest.fixture(scope="module")
def found() -> Attribution:
    return attribute(RunFolder(RUN))


def test_the_books_close_against_the_counter(found: Attribution) -> None:
    weighed = found.weighed
    assert weighed is not None
    assert weighed.counter_j == pytest.approx(7040, rel=0.001)
    assert abs(weighed.residual_j) < 0.001 * weighed.counter_j  # type: ignore[arg-type]
    assert weighed.samples_j == pytest.approx(weighed.counter_j, rel=0.01)


def test_decode_is_the_same_by_difference_and_by_ranges(found: Attribution) -> None:
    assert found.weighed is not None
    decode = found.weighed.phases["decode"]
    assert decode.energy_j is not None
    assert decode.energy_by_ranges_j is not None
    assert decode.latency_by_ranges_s.value == pytest.approx(decode.latency_s.value, rel=0.02)
    assert decode.energy_by_ranges_j.value == pytest.approx(decode.energy_j.value, rel=0.02)
    assert found.weighed.sample_lag_ms == 4.0


def test_every_kernel_has_its_launch_its_phase_and_its_token(found: Attribution) -> None:
    timeline = found.timeline
    assert timeline.outside == 0
    decoded = timeline.kernels[timeline.kernels["phase"] == "decode"].groupby("token").size()
    assert list(decoded.index) == [1, 2, 3, 4, 5, 6, 7]
    assert set(decoded) == {1305}
    # Nine of them before the forward itself, when generate prepares its inputs.
    assert (timeline.kernels["phase"] == "prefill").sum() == 1258


def test_kernels_take_what_the_counter_says_above_the_floor(found: Attribution) -> None:
    decode = found.accounts["decode"]
    assert decode.floor_w is not None
    assert decode.kernel_j is not None
    assert decode.kernel_j.low is not None
    assert decode.kernel_j.high is not None
    assert 115 < decode.floor_w.value < 130
    assert decode.busy_s == pytest.approx(7.75e-3, rel=0.01)
    # The host's latency varies by a third of itself from round to round; the kernels' energy does not.
    assert decode.weight.latency_s.high - decode.weight.latency_s.low > 0.6 * decode.weight.latency_s.value  # type: ignore[operator]
    assert decode.kernel_j.high - decode.kernel_j.low < 0.12 * decode.kernel_j.value
    rows = found.frame[found.frame["phase"] == "decode"]
    assert rows["energy_j"].sum() == pytest.approx(decode.weight.energy_j.value)  # type: ignore[union-attr]


def test_it_is_the_run_of_the_published_result(found: Attribution) -> None:
    (file,) = RESULTS.glob("matrix-nvidia-h100*.json")
    cases = {c["name"]: c["metrics"] for c in json.loads(file.read_text())["cases"]}
    floor = cases["bf16"]["floor"]
    assert found.accounts["decode"].floor_w is not None
    # Boards and days differ, a factor does not.
    assert found.accounts["decode"].floor_w.value == pytest.approx(floor["value"], rel=0.15)


def test_a_query_of_the_written_table_gives_the_reports_answer() -> None:
    """R12: names only, no cause, operator or module; a sum over what is no gap held the residual."""
    for name in ("int8", "bf16"):
        found = recorded(name)
        rows = found.table()
        for phase, account in found.accounts.items():
            own = rows[rows["phase"] == phase]
            parts = own.groupby("part")["energy_j"].sum()
            assert account.weight.energy_j is not None
            assert account.gap_j is not None
            assert own["energy_j"].sum() == pytest.approx(account.weight.energy_j.value)
            assert parts["gaps"] == pytest.approx(account.gap_j.value)
            by_kind = own[own["part"] == "kernels"].groupby("kind")["energy_j"].sum()
            for row in found.split(phase, ["kind"]).itertuples():
                assert by_kind[row.kind] == pytest.approx(row.energy_j)
    gaps = recorded("int8").table().query("part == 'gaps' and cause == 'launch_bound' and phase == 'decode'")
    (told,) = recorded("int8").split_gaps("decode", ["cause"]).query("cause == 'launch_bound'")["energy_j"]
    assert gaps["energy_j"].sum() == pytest.approx(told)
    assert gaps["module"].str.contains("self_attn").any()


@pytest.fixture(scope="module")
def apart() -> Attribution:
    """An int8 run whose small kernels were replayed alone."""
    return attribute(RunFolder(RUN.with_name("h100-qwen-7b-int8-apart")))


def test_replays_alone_predict_the_counter(apart: Attribution) -> None:
    assert set(apart.closures) == {"prefill", "decode"}
    assert abs(apart.closures["prefill"].error.value) < 0.05
    assert abs(apart.closures["decode"].error.value) < 0.03


def test_small_kernels_of_an_operator_have_their_own_joules(apart: Attribution) -> None:
    kinds = apart.split("decode", ["kind"]).set_index("kind")
    per_ns = kinds["dynamic_j"] / kinds["duration_ns"]
    # By duration within an operator a cast would draw what the product beside it does; alone it draws some 10 W.
    assert per_ns["cast"] * 1e9 < 30 < 150 < per_ns["gemv"] * 1e9
    assert per_ns["dequantize"] * 1e9 < 30


def test_all_gaps_of_a_phase_take_what_was_weighed(apart: Attribution) -> None:
    for phase, account in apart.accounts.items():
        gaps = apart.split_gaps(phase, ["cause"])
        assert gaps["duration_ns"].sum() / 1e9 == pytest.approx(account.gap_s.value)
        # What CUPTI did is in no weighed run.
        assert gaps.loc[gaps["cause"] == "profiler", "duration_ns"].sum() == pytest.approx(0.0, abs=1e3)
