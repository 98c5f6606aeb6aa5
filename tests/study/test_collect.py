"""Many runs in one frame: joules per token of known runs, padding, draws, books, claims and the optimum."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llmkern.errors import UsageError
from llmkern.estimate import Estimate, from_samples
from llmkern.runfolder import RunFolder
from llmkern.runfolder.document import encode
from llmkern.runfolder.facts import PlanFacts
from llmkern.study.claims import NOT_SEEN, PARTLY, SEEN, UNCLEAR, UNKNOWN, _lies_in, _verdict, claims, optimum, together
from llmkern.study.collect import GENERATE, collect, pooled
from llmkern.study.macro import macro
from llmkern.study.statement import state
from tests.study.made import Asked, made_run
from tests.synthetic import Truth

LENGTHS, ANSWERS = (40, 100, 25, 75), (4, 16, 8, 12)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    made_run(folder / "padded", Asked(lengths=LENGTHS, answers=ANSWERS, prompts="random-b4-d0.jsonl"))
    return folder


def test_joules_per_token_with_and_without_padding(padded: Path) -> None:
    # GIVEN a batch of four rows of 25 to 100 prompt tokens, answers of 4 to 16 tokens, and a board of known power
    truth, run = Truth(), collect([padded]).runs[0]
    tokens = run.tokens
    assert (tokens.effective_input, tokens.computed_input, tokens.padding) == (240, 400, 160)
    assert (tokens.effective_output, tokens.computed_output) == (40, 64)
    # THEN each phase's joules are told by every count of tokens that it has
    prefill, decode = truth.prefill_j, truth.token_j * 15
    known = {
        ("prefill", "energy_per_effective_input_token"): prefill / 240,
        ("prefill", "energy_per_computed_input_token"): prefill / 400,
        # The first token of each of the four answers comes out of the prefill.
        ("decode", "energy_per_output_token"): decode / 36,
        ("decode", "energy_per_computed_output_token"): decode / 60,
        (GENERATE, "energy_per_output_token"): (prefill + decode) / 40,
        (GENERATE, "energy_per_request"): (prefill + decode) / 4,
        ("prefill", "latency"): truth.prefill_s,
        ("decode", "latency_per_token"): truth.token_s,
        (GENERATE, "latency"): truth.prefill_s + 15 * truth.token_s,
        (GENERATE, "output_tokens_per_joule"): 40 / (prefill + decode),
        (GENERATE, "energy_per_1000_output_tokens"): (prefill + decode) / 40 / 3.6,
    }
    for (phase, measure), expected in known.items():
        found = run.measures[phase][measure]
        assert found.value == pytest.approx(expected, rel=0.03), measure
        assert found.low is not None
        assert found.low <= found.value
    assert run.inter_token_s == pytest.approx((0.03, 0.03, 0.03), rel=0.1)


def test_the_books_hold_and_are_those_of_the_counter(padded: Path) -> None:
    collection = collect([padded])
    book = collection.books().iloc[0]
    assert book["counter_j"] == pytest.approx(book["windows_j"] + book["idle_j"] + book["residual_j"], rel=1e-12)
    assert abs(book["residual_j"]) < 0.01 * book["counter_j"]
    assert book["effective_tokens"] + book["padding_tokens"] == book["computed_tokens"]
    # Counted once more, from the tables alone: what the counter moved from the first window's tick to the last's.
    run = RunFolder(padded / "padded")
    energy, ranges = run.table("energy"), run.table("ranges")
    windows = ranges[ranges["category"] == "window"]
    ticks = energy.sort_values("timestamp_ns")
    before = ticks[ticks["timestamp_ns"] <= windows["start_ns"].min()].iloc[-1]
    after = ticks[ticks["timestamp_ns"] >= windows["end_ns"].max()].iloc[0]
    counted_j = (after["energy_mj"] - before["energy_mj"]) / 1e3
    assert book["counter_j"] == pytest.approx(counted_j, rel=0.02)
    # And the frame's rows of windows are the same joules: generations by the number of them.
    generations = ranges[(ranges["category"] == "generate") & (ranges["pass"] == "weigh")]
    frame = collection.frame().set_index("phase")
    each = {1: frame.loc["prefill", "energy_j"], 16: frame.loc[GENERATE, "energy_j"]}
    of_windows = sum(each[int(n)] * len(rows) for n, rows in generations.groupby("new_tokens"))
    assert of_windows == pytest.approx(book["windows_j"], rel=0.02)


def test_draws_are_joined_by_their_tokens(tmp_path: Path) -> None:
    # GIVEN two draws: a short batch that is dear by the token and a long one that is cheap
    made_run(tmp_path / "a", Asked(lengths=(10, 10), prompts="random-b2-d0.jsonl"))
    made_run(tmp_path / "b", Asked(lengths=(190, 190), prompts="random-b2-d1.jsonl"))
    (one,) = pooled(collect([tmp_path]).runs)
    joined = one.per("prefill", "energy_per_effective_input_token")
    assert joined is not None
    # THEN it is all joules by all tokens, not the mean of two ratios
    assert joined.value == pytest.approx(2 * Truth().prefill_j / 400, rel=0.03)


def test_what_cannot_be_compared_is_left_out_with_a_reason(tmp_path: Path) -> None:
    made_run(tmp_path / "good", Asked())
    made_run(tmp_path / "torn", Asked())
    (tmp_path / "torn" / "ranges.parquet").write_bytes(b"PAR1")
    found = collect([tmp_path])
    assert [run.folder.name for run in found.runs] == ["good"]
    assert "ranges" in found.left_out["torn"]
    told = state(found, "x", {"never": "it was too large"})
    assert told.failed.keys() == {"torn", "never"}


def test_no_folder_and_no_run_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        collect([tmp_path / "absent"])
    with pytest.raises(UsageError, match="holds no run folder"):
        collect([tmp_path])


def verdicts(folder: Path) -> dict[str, str]:
    return {claim.said[:12]: claim.verdict for claim in claims(pooled(collect([folder]).runs))}


def test_claims_over_precisions_are_seen_where_they_hold(tmp_path: Path) -> None:
    for precision, prefill_s, token_s in (
        ("fp32", 0.2, 0.030),
        ("bf16", 0.05, 0.030),
        ("fp16", 0.05, 0.029),
        ("int8", 0.1, 0.1),
        ("int4", 0.08, 0.031),
    ):
        made_run(
            tmp_path / precision,
            Asked(precision=precision),
            prefill_s=prefill_s,
            token_s=token_s,
            busy_per_token_s=0.005,
        )
    found = verdicts(tmp_path)
    assert [found[name] for name in ("Prefill take", "Decode takes", "int8 (LLM.in", "int4 (NF4) t")] == [SEEN] * 4
    assert found["Energy per o"] == UNKNOWN


def test_claims_over_precisions_are_not_seen_where_they_do_not_hold(tmp_path: Path) -> None:
    for precision, prefill_s, token_s in (("fp32", 0.05, 0.03), ("bf16", 0.05, 0.01), ("int8", 0.05, 0.03)):
        made_run(
            tmp_path / precision,
            Asked(precision=precision),
            prefill_s=prefill_s,
            token_s=token_s,
            busy_per_token_s=0.005,
        )
    found = verdicts(tmp_path)
    assert [found[name] for name in ("Prefill take", "Decode takes", "int8 (LLM.in")] == [NOT_SEEN] * 3


@pytest.mark.parametrize(
    ("held", "mean", "verdict"),
    [
        ([True, True], True, SEEN),
        ([True, None, None], True, SEEN),  # each alone is open, all together are not
        ([None, None], True, SEEN),
        ([True, False], True, PARTLY),
        ([True, False], None, PARTLY),
        ([False, None], True, PARTLY),
        ([True, None], False, PARTLY),
        ([False, None], False, NOT_SEEN),
        ([None, None], None, UNCLEAR),
        ([True, None, None], None, UNCLEAR),
        ([False, None, None], None, UNCLEAR),
    ],
)
def test_what_the_intervals_leave_open_is_no_verdict(held: list[bool | None], mean: bool | None, verdict: str) -> None:
    assert _verdict(held, mean) == verdict


def test_many_models_together_are_known_better_than_each_but_not_what_they_share() -> None:
    random = np.random.default_rng(0)
    found = {f"model-{i}": from_samples(list(2.5 + 0.5 * random.standard_normal(6))) for i in range(9)}
    widths = [each.high - each.low for each in found.values() if each.low is not None and each.high is not None]
    mean = together(found)
    assert mean.low is not None
    assert mean.high is not None
    assert mean.low < 2.5 < mean.high
    assert mean.high - mean.low < 0.6 * np.mean(widths)
    # Ratios to one and the same run are wrong together.
    same = from_samples([2.0, 2.4, 2.5, 2.6, 2.9, 3.1])
    shared = together({"bf16 / fp32, one": same, "fp16 / fp32, one": same})
    assert (shared.low, shared.high) == pytest.approx((same.low, same.high))


def test_int8_that_costs_more_by_another_factor_is_seen_in_part(tmp_path: Path) -> None:
    for precision, token_s in (("fp32", 0.01), ("int8", 0.06)):
        made_run(tmp_path / precision, Asked(precision=precision), token_s=token_s, busy_per_token_s=0.005)
    assert verdicts(tmp_path)["int8 (LLM.in"] == PARTLY


def test_prefill_is_that_of_the_whole_prompt_set(tmp_path: Path) -> None:
    """A run whose batch is one short prompt is told by all prompts that every batch size is prefilled with."""
    lengths_s = (0.05, 0.2, 0.125, 0.1)
    asked = Asked(lengths=(100,), prompts="random-b1-d0.jsonl")
    made_run(tmp_path / "one", asked, set_prefills_s=lengths_s)
    facts = json.loads((tmp_path / "one" / "run.json").read_text())
    facts["prompt_set"] = {"batches": 4, "effective_tokens": 900, "computed_tokens": 1000}
    (tmp_path / "one" / "run.json").write_text(json.dumps(facts))
    truth, collection = Truth(), collect([tmp_path])
    run = collection.runs[0]
    joules = sum(truth.floor_w * s + (truth.kernel_w - truth.floor_w) * s * truth.prefill_busy for s in lengths_s)
    prefill = run.measures["prefill"]
    assert prefill["energy_per_effective_input_token"].value == pytest.approx(joules / 900, rel=0.02)
    assert prefill["energy_per_computed_input_token"].value == pytest.approx(joules / 1000, rel=0.02)
    assert prefill["energy"].value == pytest.approx(joules, rel=0.02)
    assert prefill["latency"].value == pytest.approx(np.mean(lengths_s), rel=0.02)
    # A generation is that of its batch, and so is decode, by difference.
    assert run.measures[GENERATE]["energy"].value == pytest.approx(truth.prefill_j + 15 * truth.token_j, rel=0.03)
    assert run.measures["decode"]["latency_per_token"].value == pytest.approx(truth.token_s, rel=0.03)
    books = collection.books().iloc[0]
    assert (books["effective_tokens"], books["padding_tokens"], books["computed_tokens"]) == (900, 100, 1000)
    assert books["counter_j"] == pytest.approx(books["windows_j"] + books["idle_j"], rel=0.005)
    row = collection.frame().set_index("phase")
    assert row.loc["prefill", "requests"] == 4
    assert row.loc["decode", "requests"] == 1


def test_a_wide_interval_shows_nothing() -> None:
    assert _lies_in(Estimate(0.85, 0.39, 1.40), 0.8, 1.25) is None
    assert _lies_in(Estimate(1.0, 0.9, 1.1), 0.8, 1.25) is True
    assert _lies_in(Estimate(2.70, 2.27, 3.46), 2.0, 3.0) is True
    assert _lies_in(Estimate(1.4, 1.3, 1.5), 0.8, 1.25) is False


def test_the_best_batch_size_has_an_interval_and_padding_its_price(tmp_path: Path) -> None:
    # GIVEN joules that are least per effective token at a batch of four, because from there on padding grows
    for batch, seconds, longest in ((1, 0.05, 100), (2, 0.06, 100), (4, 0.09, 110), (8, 0.3, 400), (16, 0.6, 400)):
        lengths = (100,) * (batch - 1) + (longest,)
        made_run(tmp_path / str(batch), Asked(lengths=lengths, prompts=f"random-b{batch}-d0.jsonl"), prefill_s=seconds)
    told = state(collect([tmp_path]), "x")
    found = {claim.said[:20]: claim for claim in told.claims}
    shape = found["Energy per effective"]
    assert shape.verdict == SEEN
    assert "least at batch 4 [4, 4]" in shape.numbers[0]
    assert found["Padding makes an eff"].verdict == SEEN
    assert found["Energy per output to"].verdict in (SEEN, PARTLY)
    assert any("cheapest at batch 4 [4, 4]" in sentence for sentence in told.answer)
    assert [figure.name for figure in told.figures] == ["figure-2a", "figure-2b", "figure-2c"]
    (curve,) = {series for series in told.figures[0].rows["series"] if "effective" in series}
    rows = told.figures[0].rows
    effective = rows[rows["series"] == curve].set_index("x")["value"]
    assert effective.idxmin() == 4


def test_sizes_that_noise_cannot_tell_apart_are_both_the_optimum() -> None:
    random = np.random.default_rng(0)
    curve = {size: from_samples(list(1 + 0.05 * random.standard_normal(6))) for size in (8, 16)}
    curve[1] = from_samples(list(2 + 0.05 * random.standard_normal(6)))
    best = optimum(dict(sorted(curve.items())))
    assert (best.low, best.high) == (8, 16)
    assert optimum({1: Estimate(2.0), 2: Estimate(1.0)}).low is None


def test_a_day_of_requests(tmp_path: Path) -> None:
    made_run(tmp_path / "before", Asked())
    made_run(tmp_path / "after", Asked(lengths=(100,) * 4))
    before, after = (collect([tmp_path / name]).runs[0] for name in ("before", "after"))
    day = macro(before, after, 1e6, 11.7, 400.0)
    request_j = Truth().prefill_j + 15 * Truth().token_j
    assert day.before.kwh.value == pytest.approx(request_j * 1e6 / 3.6e6, rel=0.03)
    assert day.before.households.value == pytest.approx(day.before.kwh.value / 11.7)
    assert day.before.co2_kg is not None
    assert day.before.co2_kg.value == pytest.approx(day.before.kwh.value * 0.4)
    # Four requests of one batch cost what one did.
    assert day.saved.value == pytest.approx(0.75, abs=0.02)
    assert day.saved.low is not None
    assert 0.7 < day.saved.low <= day.saved.value
    assert "11.7" in " ".join(day.formulas)


def test_the_frame_has_units_in_its_names_and_no_hidden_nothing(padded: Path) -> None:
    frame = collect([padded]).frame()
    assert set(frame["phase"]) == {"prefill", "decode", GENERATE}
    assert {"energy_j", "energy_j_low", "latency_s", "power_w", "inter_token_p99_s"} <= set(frame.columns)
    row = frame[frame["phase"] == "prefill"].iloc[0]
    assert pd.isna(row["energy_per_output_token_j"])
    assert (frame["effective_input_tokens"] + frame["padding_tokens"] == frame["computed_input_tokens"]).all()


def test_what_a_length_costs_at_first_is_told_over_all_runs(tmp_path: Path) -> None:
    truth = Truth()
    whole_s = truth.prefill_s + 15 * truth.token_s
    for name, times in (("dear", 2.5), ("dearer", 3.2), ("as later ones", 1.1), ("unknown", None)):
        run = made_run(tmp_path / name, Asked())
        plan = PlanFacts(new_tokens=16, first_generate_s=None if times is None else times * whole_s)
        (run.path / "run.json").write_bytes(encode(replace(run.facts, plan=plan)))
    told = [line for line in state(collect([tmp_path]), "x").doubts if "first generation" in line]
    assert len(told) == 1
    assert told[0].startswith("In 2 of 4 runs the first generation of its lengths took 2.5 to 3.2 times a later one")
