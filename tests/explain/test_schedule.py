"""The model of host and device: by hand where every time is known, on recorded runs where the latency is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmkern.explain.schedule import Schedule, schedule
from llmkern.explain.whatif import captured
from tests.recorded import recorded

US = 1_000.0


def plan(count: int = 10, **changes: Any) -> Schedule:
    """Return *count* kernels of 2 µs, each 10 µs of the host's time apart and 3 µs in its launch."""
    whole = np.ones(count)
    parts: dict[str, Any] = {
        "steps": 1,
        "op": np.arange(count),
        "name": np.zeros(count, int),
        "inside": np.ones(count, bool),
        "launched": np.ones(count, bool),
        "before_ns": 0 * whole,
        "after_ns": 10 * US * whole,
        "call_ns": 3 * US * whole,
        "waits": np.zeros(count, bool),
        "return_ns": 0 * whole,
        "duration_ns": 2 * US * whole,
        "waits_inside": np.zeros(count, bool),
        "latency_ns": 5 * US,
        "gap_ns": 1 * US,
    }
    return Schedule(**(parts | changes))


def test_a_slow_host_is_what_takes_the_time() -> None:
    # The last kernel starts 5 µs after its launch began, 3 µs before the launch returned plus 5 µs and 2 µs of its own.
    assert plan().latency_s() == pytest.approx((10 * 13 - 3 + 5 + 2) * 1e-6)
    assert plan().latency_s(host_factor=2) == pytest.approx((10 * 26 - 6 + 5 + 2) * 1e-6)


def test_a_slow_device_is_what_takes_the_time() -> None:
    # The first starts at 15 µs; the others follow 1 µs after the one before.
    slow = plan(duration_ns=np.full(10, 50 * US))
    assert slow.latency_s() == pytest.approx((15 + 10 * 50 + 9) * 1e-6)
    assert slow.latency_s(0.1) < slow.latency_s()


def test_a_wait_holds_the_host_until_the_device_is_done() -> None:
    waits = np.zeros(10, bool)
    waits[5] = True
    back = np.where(waits, 4 * US, 0.0)
    # GIVEN a device behind the host: kernels of 50 µs, and a wait for five of them
    waiting = plan(waits=waits, return_ns=back, duration_ns=np.full(10, 50 * US))
    done_us = 15 + 5 * 50 + 4
    assert waiting.latency_s() == pytest.approx((done_us + 4 + 10 + 5 + 5 * 50 + 4) * 1e-6)


def test_what_is_gone_takes_its_host_time_along() -> None:
    gone = np.arange(10) % 2 == 1
    assert plan().without(gone).latency_s() == pytest.approx((5 * 13 - 3 + 5 + 2) * 1e-6)


def test_a_captured_forward_costs_one_launch() -> None:
    # 10 µs to come to it, then kernel after kernel.
    assert captured(plan()).latency_s() == pytest.approx((10 + 5 + 10 * 2 + 9) * 1e-6)


def test_the_host_before_the_first_and_after_the_last_kernel_counts() -> None:
    """A prefill has a millisecond of both; without them a fast host looked as if it saved more than it can."""
    edged = plan(lead_ns=1000 * US, trail_ns=200 * US)
    assert edged.latency_s() == pytest.approx(plan().latency_s() + 1200e-6)
    assert edged.host_times(0.5).latency_s() == pytest.approx(plan().host_times(0.5).latency_s() + 600e-6)


def test_a_wait_between_two_forwards_outlives_a_captured_forward() -> None:
    """The kernel after it may be in a forward; the wait is not."""
    waits = np.zeros(10, bool)
    waits[5] = True
    slow = {"duration_ns": np.full(10, 50 * US), "waits": waits, "return_ns": np.where(waits, 4 * US, 0.0)}
    outside, inside = plan(**slow), plan(**slow, waits_inside=waits)
    one = 10 + 5 + 10 * 50 + 9
    assert captured(inside).latency_s() == pytest.approx(one * 1e-6)
    # Two graphs: back after 4 us, 10 us of the host's time and 5 us to the device, where 1 us was between two kernels.
    assert captured(outside).latency_s() == pytest.approx((one + 4 + 10 + 5 - 1) * 1e-6)


def test_waits_at_the_end_of_a_token_are_in_no_forward() -> None:
    trace = recorded("int8").host_trace
    assert trace is not None
    found = schedule(trace, "decode")
    assert found is not None
    between = found.waits & ~found.waits_inside
    assert 1 <= between.sum() / found.steps <= 2
    assert found.waits_inside.sum() / found.steps == pytest.approx(336, abs=1)


def test_what_is_between_two_forwards_stays() -> None:
    inside = np.ones(10, bool)
    inside[9] = False
    graph = captured(plan(inside=inside))
    # The host is back from the launch at 20 µs; the last kernel is issued at 30 µs, while the device is at work.
    assert graph.latency_s() == pytest.approx((10 + 5 + 9 * 2 + 8 + 1 + 2) * 1e-6)


@pytest.mark.parametrize("name", ["int8", "int4", "bf16-operators", "bf16"])
def test_recorded_steps_take_as_long_as_they_took(name: str) -> None:
    trace = recorded(name).host_trace
    assert trace is not None
    for phase in ("prefill", "decode"):
        found = schedule(trace, phase)
        assert found is not None
        own = trace.timeline.phases[trace.timeline.phases["phase"] == phase].iloc[0]
        recorded_s = own["wall_ns"] / own["tokens"] / 1e9
        assert found.latency_s() == pytest.approx(recorded_s, rel=0.003)


def test_waits_are_where_the_records_have_them() -> None:
    trace = recorded("int8").host_trace
    assert trace is not None
    found = schedule(trace, "decode")
    assert found is not None
    # 336 in the layers and two at the end of each token; every one returns, most within 20 µs.
    assert found.waits.sum() / found.steps == pytest.approx(338, abs=1)
    assert 0 < np.median(found.return_ns[found.waits]) < 20 * US


def test_a_phase_that_was_not_traced_has_no_schedule() -> None:
    trace = recorded("int8").host_trace
    assert trace is not None
    nothing = replace(trace.timeline, phases=trace.timeline.phases.iloc[:0])
    assert schedule(replace(trace, timeline=nothing), "decode") is None


@pytest.mark.parametrize("name", ["int8", "int4", "bf16-operators"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0])
def test_stretches_are_as_long_as_kernel_after_kernel(name: str, phase: str, factor: float) -> None:
    trace = recorded(name).host_trace
    assert trace is not None
    plan = schedule(trace, phase)
    assert plan is not None
    host, device = plan.lead_ns * factor, 0.0
    for i in range(len(plan.op)):
        host += plan.before_ns[i] * factor
        if plan.waits[i]:
            host = max(host, device) + plan.return_ns[i]
        host += plan.after_ns[i] * factor
        issued = host + plan.latency_ns if plan.launched[i] else 0.0
        device = max(issued, device + plan.gap_ns) + plan.duration_ns[i]
        host += plan.call_ns[i] * factor
    step_s = (max(host, device) + plan.trail_ns * factor) / 1e9 / plan.steps
    assert plan.latency_s(factor) == pytest.approx(step_s, rel=1e-9)
