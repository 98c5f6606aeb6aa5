"""Runs that are ended at twelve random moments (bench.interrupts has sixty), and what did not end as no unit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from bench.interrupts import run_all
from llmkern import session
from llmkern.attribute.attribution import attribute
from llmkern.attribute.energy.phases import PhaseWeight, known_phases
from llmkern.attribute.time.recorder_effect import recorder_effects
from llmkern.errors import InterruptedRunError, LlmkernError
from llmkern.estimate import Estimate
from llmkern.explain.doubts import doubts
from llmkern.progress import Stages
from llmkern.record import signals
from llmkern.record.annotate import Annotator
from llmkern.record.generation import Generation
from llmkern.record.options import TraceOptions
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import BARE, RECORDED
from llmkern.workload.load import Source, load_model
from llmkern.workload.models import find_model
from tests.synthetic import Builder, Truth, synthetic_run


def test_runs_that_are_ended_at_random_moments(tmp_path: Path) -> None:
    """L1, L8, R1: older runs deleted, status "recording" for ever, 7.41 ms/token printed where it was 32."""
    ended = list(run_all(tmp_path, 12, 7, repeats=1, workers=2, factor=4.0))
    assert [one for one in ended if one.wrong and "lost" not in one.wrong] == []
    assert {one.signal for one in ended} == {"SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), torch.OutOfMemoryError("no more"), RuntimeError("inside")])
def test_what_did_not_end_is_no_unit(failure: BaseException) -> None:
    """R1: open ranges were closed as if they had ended, and their half was taken for a whole."""
    model = load_model(find_model("qwen-tiny"), Source("random"), "fp32", torch.device("cpu")).model
    note = Annotator()
    ids = torch.randint(10, 4000, (1, 8))
    run = Generation(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, note, lambda: None)
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise failure

    hook = model.model.layers[2].register_forward_hook(fail)

    def window() -> None:
        with note.range("window", "window"):
            run(6)

    with pytest.raises(type(failure)):
        window()
    hook.remove()
    kept = note.drain()
    # The prefill and two tokens ended; the third token, its decode, the generation and its window did not.
    assert [(r.category, r.token) for r in kept] == [("token", 0), ("phase", None), ("token", 1), ("token", 2)]
    assert note.depth == 0
    run(2)
    assert {r.depth for r in note.drain() if r.category == "generate"} == {0}


def interrupted_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> RunFolder:
    """Return what a run leaves whose stage *stage* is ended by SIGTERM."""
    real = getattr(session, stage)

    def ended(*arguments: object) -> object:
        real(*arguments)
        signals._came.append(signal.SIGTERM)
        raise signals.Ended(signal.SIGTERM)

    monkeypatch.setattr(session, stage, ended)
    options = TraceOptions(
        "qwen-tiny",
        device="cpu",
        prompt_tokens=8,
        new_tokens=4,
        warmup=1,
        repeats=1,
        unweighed_window_s=0.2,
        out=tmp_path / "run",
    )
    try:
        with pytest.raises(InterruptedRunError, match=r"ended by SIGTERM") as caught:
            session.trace(options, Stages(quiet=True))
    finally:
        signals.forget()
    assert caught.value.exit_code == 143
    assert f"llmkern report {tmp_path / 'run.partial'}" in str(caught.value)
    return RunFolder(tmp_path / "run")


def test_a_signal_names_the_folder_and_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """U6, L8: ^C named no folder, SIGTERM had no handler."""
    run = interrupted_in(tmp_path, monkeypatch, "weigh")
    assert (run.status, run.facts.reason) == ("interrupted", "ended by SIGTERM")
    # R18: what was weighed whole is told, although nothing of it was traced.
    found = attribute(run)
    assert [weight.phase for weight in found.only_weighed] == ["prefill", "decode"]
    assert any("holds no whole decode" in line for line in doubts(run, found))


def test_a_signal_before_anything_was_recorded_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        raise signals.Ended(signal.SIGINT)

    monkeypatch.setattr(session, "load_model", ended)
    options = TraceOptions("qwen-tiny", device="cpu", prompt_tokens=8, out=tmp_path / "run")
    with pytest.raises(InterruptedRunError, match="before anything was recorded; nothing is left behind"):
        session.trace(options, Stages(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_a_signal_after_the_merge_does_not_undo_a_complete_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L3: ^C after the merge turned a complete run into a failed one."""

    def ended(*_: object) -> None:
        raise signals.Ended(signal.SIGINT)

    monkeypatch.setattr(session, "keep_replays", ended)
    options = TraceOptions(
        "qwen-tiny",
        device="cpu",
        prompt_tokens=8,
        new_tokens=4,
        warmup=1,
        repeats=1,
        unweighed_window_s=0.2,
        out=tmp_path / "run",
    )
    with pytest.raises(InterruptedRunError, match="after the run was complete"):
        session.trace(options, Stages(quiet=True))
    assert RunFolder(tmp_path / "run").complete


@pytest.mark.parametrize("error", [ValueError("unforeseen"), OSError(30, "Read-only file system")])
def test_an_unforeseen_error_leaves_a_true_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """L8: after an unforeseen error the status was still "recording"."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(session, "record_timelines", fail)
    options = TraceOptions(
        "qwen-tiny",
        device="cpu",
        prompt_tokens=8,
        new_tokens=4,
        warmup=1,
        repeats=1,
        unweighed_window_s=0.2,
        out=tmp_path / "run",
    )
    with pytest.raises((ValueError, OSError, LlmkernError)):
        session.trace(options, Stages(quiet=True))
    run = RunFolder(tmp_path / "run")
    assert run.status == "failed"
    assert str(error) in str(run.facts.reason)


def test_a_run_killed_in_its_first_traced_decode_tells_the_decode_that_was_weighed(tmp_path: Path) -> None:
    """R18: it showed prefill only."""
    builder = Builder(Truth())
    builder.play()
    # GIVEN a timeline that was cut off within the first decode
    traced = [r for r in builder.ranges if r[0] == "time"]
    cut = next(i for i, r in enumerate(builder.ranges) if r is traced[0]) + 4
    builder.ranges = builder.ranges[:cut]
    run = builder.write(tmp_path / "run", status="interrupted")
    found = attribute(run)
    assert list(found.accounts) == ["prefill"]
    (decode,) = found.only_weighed
    assert decode.latency_s.value == pytest.approx(0.030, rel=0.01)


def weight(values: list[float], phase: str = "decode") -> dict[str, PhaseWeight]:
    from llmkern.estimate import from_samples

    latency = from_samples(values)
    return {phase: PhaseWeight(phase, "token", latency, values, None, [float("nan")] * len(values), latency, None)}


def test_a_difference_that_holds_zero_is_no_latency() -> None:
    """R19: of 40 valid short runs 8 printed a negative decode latency."""
    known, unknown = known_phases(weight([-0.0463, 0.001, 0.002, -0.01]))
    assert known == {}
    assert "which holds zero" in unknown["decode"]
    known, unknown = known_phases(weight([0.030, 0.031, 0.029, 0.030]))
    assert list(known) == ["decode"]
    assert unknown == {}
    # Two rounds have no interval, but a negative one says that they know nothing.
    assert known_phases(weight([0.03, -0.01]))[0] == {}
    assert list(known_phases(weight([0.03, 0.02]))[0]) == ["decode"]


def test_windows_go_on_until_they_are_long_enough(tmp_path: Path) -> None:
    """R6: planned from one warm-up and never checked, windows were 1.23 s on a GPU and 0.05 s on a CPU."""
    options = TraceOptions(
        "qwen-tiny", device="cpu", prompt_tokens=8, new_tokens=2, warmup=1, repeats=2, quick=True, out=tmp_path / "run"
    )
    ranges = RunFolder(session.trace(options, Stages(quiet=True))).table("ranges")
    windows = ranges[ranges["category"] == "window"]
    assert len(windows) == 4
    assert ((windows["end_ns"] - windows["start_ns"]) / 1e9).min() >= 2.1
    # R8: what the recorder changes comes from generations that took turns.
    assert {BARE, RECORDED} <= set(ranges["pass"])
    effects = recorder_effects(RunFolder(tmp_path / "run"))
    assert set(effects) == {"prefill"}
    assert effects["prefill"].samples == 6
    assert isinstance(effects["prefill"], Estimate)


def test_without_pairs_the_recorders_effect_is_not_known(tmp_path: Path) -> None:
    """R8: +42.6 % were claimed from noise: traced against weighed, minutes apart."""
    run, _ = synthetic_run(tmp_path / "run", jitter=0.05)
    assert recorder_effects(run) == {}
    assert all(account.recorder_effect is None for account in attribute(run).accounts.values())
