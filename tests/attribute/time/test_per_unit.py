"""Sums over kernels, gaps and calls: nothing is lost, and what is counted is what was recorded."""

from __future__ import annotations

import numpy as np
import pytest

from llmkern.attribute.time import per_unit, timeline
from llmkern.attribute.time.per_unit import summed_by
from llmkern.attribute.time.timeline import find
from llmkern.runfolder.vocabulary import NONE
from tests.recorded import recorded, recorded_run


@pytest.mark.parametrize("most_keys", [1 << 25, 1])
def test_sums_are_the_same_in_a_table_and_by_sorting(monkeypatch: pytest.MonkeyPatch, most_keys: int) -> None:
    monkeypatch.setattr(per_unit, "_MOST_KEYS", most_keys)
    codes, (count, total) = summed_by([np.array([1, 0, 1, 1]), np.array([2, 0, 2, 0])], np.array([1.0, 2.0, 4.0, 8.0]))
    rows = {(a, b): (n, t) for a, b, n, t in zip(*codes, count, total, strict=True)}
    assert rows == {(0, 0): (1, 2.0), (1, 0): (1, 8.0), (1, 2): (2, 5.0)}


def test_nothing_is_summed_to_nothing() -> None:
    codes, (count,) = summed_by([np.empty(0, int)])
    assert len(codes[0]) == len(count) == 0


@pytest.mark.parametrize("spread", [1, 10**12])
def test_keys_are_found_at_their_first_place(spread: int) -> None:
    keys = np.array([5, 3, 9, 3]) * spread
    assert find(keys, np.array([3, 9, 4, 10**6]) * spread).tolist() == [1, 2, NONE, NONE]
    assert find(keys[:0], keys).tolist() == [NONE] * 4


@pytest.mark.parametrize("name", ["int8", "int4", "bf16-operators"])
def test_every_recorded_kernel_and_gap_is_counted(name: str) -> None:
    found = recorded(name)
    for phase in ("prefill", "decode"):
        units = found.timeline.units(phase)
        kernels = found.timeline.kernels[found.timeline.kernels["phase"] == phase]
        summed = found.kernels[found.kernels["phase"] == phase]
        assert summed["launches"].sum() * units == pytest.approx(len(kernels))
        length_ns = (kernels["end_ns"] - kernels["start_ns"]).sum()
        assert summed["duration_ns"].sum() * units == pytest.approx(length_ns)
        trace = found.host_trace
        assert trace is not None
        gaps = trace.timeline.gaps[trace.timeline.gaps["phase"] == phase]
        own = trace.gaps[trace.gaps["phase"] == phase]
        assert own["launches"].sum() * trace.timeline.units(phase) == pytest.approx(len(gaps))
        assert own["duration_ns"].sum() * trace.timeline.units(phase) == pytest.approx(gaps["duration_ns"].sum())


@pytest.mark.parametrize(("name", "pass_name"), [("bf16-operators", "time"), ("int8", "calls"), ("int4", "calls")])
def test_every_recorded_call_is_counted(name: str, pass_name: str) -> None:
    calls = recorded_run(name).table("launches", where={"pass": pass_name})
    trace = recorded(name).host_trace
    assert trace is not None
    for phase in ("prefill", "decode"):
        span = trace.timeline.phases[trace.timeline.phases["phase"] == phase].iloc[0]
        inside = calls[calls["start_ns"].between(span["start_ns"], span["end_ns"])]
        counted = trace.tally[trace.tally["phase"] == phase].groupby("api")["launches"].sum()
        expected = inside["api"].astype(str).value_counts() / trace.timeline.units(phase)
        assert counted.to_dict() == pytest.approx(expected.to_dict())


def test_operators_are_called_as_often_as_the_model_has_them() -> None:
    rows = recorded("int8").kernels
    decode = rows[rows["phase"] == "decode"]
    calls = decode.groupby(["op", "module"])["calls"].sum()
    assert calls["bitsandbytes.int8_mixed_scaled_mm.default", "model.layers.*.mlp.up_proj"] == 28
    # Each of its calls launches ten kernels or more, and is one call.
    launches = decode.groupby(["op", "module"])["launches"].sum()
    assert launches["bitsandbytes.int8_mixed_scaled_mm.default", "model.layers.*.mlp.up_proj"] >= 280


def test_a_run_without_a_kernel_has_an_empty_timeline() -> None:
    run = recorded_run("int8")
    empty = timeline.read_timeline(run, device=3)
    assert len(empty.kernels) == len(empty.gaps) == 0
