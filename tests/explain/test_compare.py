"""One run against another: the bars add up, whatever the runs have or lack."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from llmkern.attribute.attribution import attribute
from llmkern.errors import UsageError
from llmkern.explain.compare import NOT_DISTINGUISHABLE, compare, verdict
from llmkern.report.console import PlainConsole
from llmkern.report.difference import print_difference
from tests.recorded import recorded
from tests.synthetic import synthetic_run


@pytest.mark.parametrize("pair", [("bf16-operators", "int8"), ("int8", "int4"), ("bf16", "int4")])
def test_changes_add_up_to_the_measured_difference(pair: tuple[str, str]) -> None:
    before, after = (recorded(name) for name in pair)
    found = compare(before, after)
    assert [d.phase for d in found] == ["decode", "prefill"]
    for difference in found:
        assert difference.before_j is not None
        assert difference.after_j is not None
        whole_j = difference.after_j.value - difference.before_j.value
        whole_s = difference.after_s.value - difference.before_s.value
        views = [difference.bars, difference.work]
        # bf16 was recorded without operators: by module there is nothing to compare.
        views += [difference.modules] if len(difference.modules) else []
        assert bool(len(difference.modules)) == ("bf16" not in pair)
        for view in views:
            assert view["change_j"].sum() == pytest.approx(whole_j)
            assert view["change_s"].sum() == pytest.approx(whole_s)
            assert view["before_j"].sum() == pytest.approx(difference.before_j.value)


def test_int8_costs_more_than_bf16_in_gaps_before_its_outlier_kernels() -> None:
    decode = compare(recorded("bf16-operators"), recorded("int8"))[0]
    first = decode.work.iloc[0]
    assert (first["part"], first["name"]) == ("gaps", "outlier")
    assert first["change_j"] > 0.4 * decode.bars["change_j"].sum()
    assert first["low_j"] < first["change_j"] < first["high_j"]


def test_a_run_against_itself_changes_nothing() -> None:
    for difference in compare(recorded("int4"), recorded("int4")):
        assert difference.bars["change_j"].abs().max() == 0


def test_tokens_are_what_is_compared(tmp_path: Path) -> None:
    one, truth = synthetic_run(tmp_path / "one")
    four, _ = synthetic_run(tmp_path / "four")
    assert four.facts.prompts is not None
    prompts = replace(four.facts.prompts, effective_tokens=(100,) * 4)
    four.facts = replace(four.facts, options=replace(four.facts.options, batch=4), prompts=prompts)
    decode, prefill = compare(attribute(one), attribute(four))
    assert decode.before_j is not None
    assert decode.after_j is not None
    assert decode.after_j.value == pytest.approx(decode.before_j.value / 4)
    assert prefill.before_j is not None
    assert prefill.before_j.value == pytest.approx(truth.prefill_j / 100, rel=0.05)


def test_without_energy_times_are_compared(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run", energy=False)
    decode = compare(attribute(run), recorded("int4"))[0]
    assert decode.before_j is None
    assert decode.bars["change_j"].isna().all()
    assert decode.bars["change_s"].sum() == pytest.approx(decode.after_s.value - decode.before_s.value)


def test_a_prediction_is_checked_against_what_was_measured() -> None:
    decode = compare(recorded("int8"), recorded("bf16-operators"), "fused-graph")[0]
    checked = decode.checked
    assert checked is not None
    assert checked.prediction.name == "fused-graph"
    assert checked.latency_error == pytest.approx(checked.prediction.latency_s.value / checked.latency_s.value - 1)
    assert checked.energy_error is not None


def test_an_unknown_prediction_is_one_sentence_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="predicts nothing called faster; it predicts: graph, "):
        compare(recorded("int8"), recorded("int4"), "faster")


def test_runs_that_share_no_phase_are_one_sentence(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    (run.path / "ranges.parquet").unlink()
    with pytest.raises(UsageError, match="share no phase"):
        compare(attribute(run), recorded("int4"))


def test_every_change_has_a_verdict() -> None:
    decode = compare(recorded("bf16-operators"), recorded("int8"))[0]
    told = decode.bars.set_index("name")["verdict"]
    assert (told["outlier"], told["gemv"]) == ("more", "less")
    for difference in compare(recorded("int8"), recorded("int8")):
        known = difference.bars[difference.bars["low_j"].notna() & (difference.bars["name"] != "residual")]
        assert set(known["verdict"]) == {NOT_DISTINGUISHABLE}
    assert [verdict(*ends) for ends in ((None, None), (-1.0, 1.0), (0.5, 1.0), (-2.0, -1.0))] == [
        "unknown",
        NOT_DISTINGUISHABLE,
        "more",
        "less",
    ]


def test_what_one_run_lacks_is_said_and_not_compared() -> None:
    decode = compare(recorded("bf16"), recorded("int8"))[0]
    assert len(decode.modules) == 0
    assert any("nothing can be compared by module" in sentence for sentence in decode.missing)
    assert compare(recorded("bf16-operators"), recorded("int8"))[0].missing == ()


def test_an_unknown_interval_stays_unknown(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run", rounds=2)
    decode = compare(attribute(run), recorded("int4"))[0]
    gaps = decode.bars[decode.bars["part"] == "gaps"]
    assert gaps["low_j"].isna().any()
    assert set(gaps.loc[gaps["low_j"].isna(), "verdict"]) == {"unknown"}


def test_an_interval_that_is_not_known_is_not_printed() -> None:
    """A run of two rounds has none, and its difference from another has none either."""
    out = io.StringIO()
    first, second = recorded("int4"), recorded("int8")
    facts = first.run.facts, second.run.facts
    print_difference(*facts, compare(first, second), PlainConsole(file=out, width=140))
    assert "unknown" in out.getvalue()
    assert "nan" not in out.getvalue().lower()


def test_differences_are_made_on_draws_and_those_of_the_parts_are_those_of_the_whole() -> None:
    before, after = recorded("bf16-operators"), recorded("int8")
    for difference in compare(before, after):
        phase, rows = difference.phase, difference.bars.set_index(["part", "name"])
        sums = []
        for run in (before, after):
            account = run.accounts[phase]
            (_, kernels), (_, gaps) = run.drawn(phase, ["kind"]), run.drawn_gaps(phase, ["cause"])
            assert kernels is not None
            assert gaps is not None
            assert account.residual is not None
            assert account.residual.draws is not None
            assert account.weight.energy_j is not None
            sums.append(kernels.sum(axis=0) + gaps.sum(axis=0) + account.residual.draws)
            assert sums[-1] == pytest.approx(account.weight.energy_j.draws)
        # What only the second run has is as doubtful as it is there.
        only = run.drawn(phase, ["kind"])[0].set_index("kind").loc["dequantize" if phase == "prefill" else "outlier"]
        tokens = (difference.after_j.value if difference.after_j else 0.0) / after.accounts[phase].weight.energy_j.value  # type: ignore[union-attr]
        row = rows.loc[("kernels", only.name)]
        if row["before_j"] == 0.0:
            assert [row["low_j"], row["high_j"]] == pytest.approx([only["low_j"] * tokens, only["high_j"] * tokens])
        low, high = rows["low_j"], rows["high_j"]
        assert ((low <= rows["change_j"]) & (rows["change_j"] <= high)).all()
