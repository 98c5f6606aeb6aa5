"""Phases, token steps and layers: as many as there are, at the right times, and nothing of ours stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkern.record.annotate import Annotator, Range, columns
from llmkern.record.generation import Generation, decoder_layers
from llmkern.record.passes.weigh import ROUNDS, plan_windows
from llmkern.runfolder.schema import to_table
from llmkern.workload.load import Source, load_model
from llmkern.workload.models import find_model


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(find_model("qwen-tiny"), Source("random"), "fp32", torch.device("cpu")).model


def generation(model: Any, tokens: int = 8, batch: int = 1) -> tuple[Generation, Annotator]:
    ids = torch.randint(10, 4000, (batch, tokens))
    note = Annotator()
    return Generation(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, note, lambda: None), note


def by_category(ranges: list[Range]) -> dict[str, list[Range]]:
    found: dict[str, list[Range]] = {}
    for r in ranges:
        found.setdefault(r.category, []).append(r)
    return found


def test_phases_and_token_steps_cover_a_generation(model: Any) -> None:
    run, note = generation(model)
    elapsed_s = run(5)
    ranges = by_category(note.drain())
    assert [r.phase for r in ranges["phase"]] == ["prefill", "decode"]
    assert [r.token for r in ranges["token"]] == [0, 1, 2, 3, 4]
    assert [r.phase for r in ranges["token"]] == ["prefill", *["decode"] * 4]
    (whole,) = ranges["generate"]
    assert elapsed_s == pytest.approx((whole.end_ns - whole.start_ns) / 1e9)
    prefill, decode = ranges["phase"]
    assert whole.start_ns <= prefill.start_ns <= prefill.end_ns <= decode.start_ns <= decode.end_ns <= whole.end_ns
    assert whole.end_ns - whole.start_ns == pytest.approx(
        prefill.end_ns - prefill.start_ns + decode.end_ns - decode.start_ns, rel=0.05
    )
    assert {r.new_tokens for r in note.drain() or [whole]} == {5}


def test_one_token_has_no_decode(model: Any) -> None:
    run, note = generation(model)
    run(1)
    ranges = by_category(note.drain())
    assert [r.phase for r in ranges["phase"]] == ["prefill"]
    assert len(ranges["token"]) == 1


def test_an_end_of_sequence_token_ends_nothing(model: Any) -> None:
    run, note = generation(model)
    model.generation_config.eos_token_id = list(range(4096))
    inputs = {"input_ids": torch.arange(10, 18)[None], "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    run2 = Generation(model, inputs, note, lambda: None)
    run2(6)
    assert len(by_category(note.drain())["token"]) == 6
    assert run is not run2


def test_layers_are_marked_only_when_wanted_and_left_as_they_were(model: Any) -> None:
    run, note = generation(model)
    layers = decoder_layers(model)
    with run.layers_annotated():
        run(3)
    marked = by_category(note.drain())["layer"]
    assert len(marked) == 3 * len(layers) == 12
    assert {r.name for r in marked} == {f"layer {i}" for i in range(4)}
    assert all("forward" not in vars(layer) for layer in layers)
    run(3)
    assert "layer" not in by_category(note.drain())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_failing_model_leaves_no_range_open_and_no_hook(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, note = generation(model)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(decoder_layers(model)[2], "forward", fail)
    with pytest.raises(RuntimeError, match="inside"), run.layers_annotated():
        run(3)
    assert note.depth == 0
    assert not model._forward_hooks
    assert vars(decoder_layers(model)[2])["forward"] is fail


def test_ranges_become_rows(model: Any) -> None:
    run, note = generation(model)
    run(2)
    drained = note.drain()
    table = to_table("ranges", columns(drained, "weigh"))
    assert table.num_rows == len(drained) == 5
    assert set(table["pass"].to_pylist()) == {"weigh"}
    assert to_table("ranges", columns([], "weigh")).num_rows == 0


@pytest.mark.parametrize(
    ("repeats", "prefill_s", "generate_s", "prefills", "generations"),
    [
        (10, 0.026, 0.9, 81 * 6, 3 * 6),  # short ones fill 2 s and a tick each
        (10, 0.2, 6.6, 11 * 6, 10),  # long ones run as often as asked for
        (1, 0.026, 5.0, 81, 1),
        (100, 1.0, 9.0, 100, 100),
    ],
)
def test_windows_last_two_seconds_and_repeats_are_kept(
    repeats: int, prefill_s: float, generate_s: float, prefills: int, generations: int
) -> None:
    plan = plan_windows(repeats, 32, prefill_s, generate_s)
    assert sum(plan.prefill_repeats) == prefills
    assert sum(plan.generate_repeats) == generations
    assert len(plan.prefill_repeats) == len(plan.generate_repeats) == min(ROUNDS, repeats)
    assert max(plan.generate_repeats) - min(plan.generate_repeats) <= 1
    assert min(plan.prefill_repeats) * prefill_s >= 2.0 or plan.prefill_repeats[0] == repeats
