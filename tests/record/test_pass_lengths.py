"""How long the passes go on where a generation is slow: enough is recorded, no minute is waited for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkern import session
from llmkern.attribute.attribution import attribute
from llmkern.progress import Stages
from llmkern.record.generation import Generation
from llmkern.record.options import TraceOptions
from llmkern.record.passes import effect, timeline, weigh
from llmkern.runfolder import RunFolder


def traced(folder: Path, **asked: Any) -> RunFolder:
    """Record a small run of what is *asked* and return it."""
    small: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 4, "warmup": 1}
    session.trace(TraceOptions("qwen-tiny", device="cpu", out=folder / "run", **small | asked), Stages(quiet=True))
    return RunFolder(folder / "run")


@pytest.mark.parametrize(
    ("asked", "slow", "generations", "pairs"), [(None, True, 1, 3), (None, False, 2, 6), (3, True, 3, 3)]
)
def test_a_slow_model_runs_less_often_unless_more_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None, slow: bool, generations: int, pairs: int
) -> None:
    monkeypatch.setattr(weigh, "SHORTEST_WINDOW_S", -weigh.TICK_S)
    for module in (effect, timeline, weigh):
        monkeypatch.setattr(module, "LONG_S", 0.0 if slow else 1e6)
    run = traced(tmp_path, repeats=asked, trace_repeats=asked)
    assert run.facts.plan is not None
    assert sum(run.facts.plan.generate_repeats) == (asked or (6 if slow else 10))
    ranges = run.table("ranges")
    found = ranges[ranges["repeat"].notna()].groupby("pass", observed=True)["repeat"].nunique()
    assert found["time"] == generations
    assert found["bare"] == found["recorded"] == pairs


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_no_weighed_generation_is_the_first_of_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: int
) -> None:
    """What is made for a length at its first time (cuDNN's plans, some 50 ms a token) is no part of a token's cost."""
    met: set[int] = set()
    weighing, late = [], []
    generate, real = Generation.__call__, session.weigh

    def noted(self: Generation, new_tokens: int) -> float:
        if weighing and new_tokens not in met:
            late.append(new_tokens)
        met.add(new_tokens)
        return generate(self, new_tokens)

    def weighed(*args: Any) -> None:
        weighing.append(True)
        real(*args)

    monkeypatch.setattr(Generation, "__call__", noted)
    monkeypatch.setattr(weigh, "SHORTEST_WINDOW_S", -weigh.TICK_S)
    monkeypatch.setattr(session, "weigh", weighed)
    run = traced(tmp_path, new_tokens=20, warmup=warmup, repeats=1, weigh_only=True)
    assert weighing
    assert met >= {1, 20}
    assert not late
    plan = run.facts.plan
    assert plan is not None
    assert (plan.first_generate_s is None) == (warmup == 1)


def test_a_run_that_only_weighs_does_nothing_else(tmp_path: Path) -> None:
    run = traced(tmp_path, repeats=2, weigh_only=True, unweighed_window_s=0.05)
    assert set(run.facts.pass_s) == {"warmup", "weigh"}
    assert not run.has("kernels")
    assert attribute(run).weighed is not None
