"""Gaps planted into hand-built timelines: each cause is named, and no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from llmkern.attribute.time.causes import CAUSES, gap_causes
from llmkern.attribute.time.timeline import build_timeline

US = 1_000
BASE_NS = 1_790_000_000_000_000_000


class Trace:
    """Kernels, calls and ranges of one decode phase in µs since its start; two tokens of 1 ms each."""

    def __init__(self) -> None:
        self.kernels: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.overheads: list[dict[str, Any]] = []
        self.tokens = [(0.0, 1000.0), (1100.0, 2100.0)]

    def launch(self, issue: float, start: float, end: float, *, stream: int = 7, call: float = 5.0) -> None:
        number = len(self.calls) + 1
        self.call("cudaLaunchKernel", issue, issue + call)
        self.kernels.append(
            {
                "pass": "calls",
                "start_ns": start,
                "end_ns": end,
                "device": 0,
                "stream": stream,
                "correlation_id": number,
                "name": f"k{number}",
                "kind": "kernel",
            }
        )

    def call(self, api: str, start: float, end: float) -> None:
        number = len(self.calls) + 1
        self.calls.append({"pass": "calls", "api": api, "start_ns": start, "end_ns": end, "correlation_id": number})

    def causes(self) -> pd.DataFrame:
        ranges = [{"category": "phase", "phase": "decode", "token": None, "start_ns": 0.0, "end_ns": 2200.0}]
        ranges += [
            {"category": "token", "phase": "decode", "token": i, "start_ns": a, "end_ns": b}
            for i, (a, b) in enumerate(self.tokens, 1)
        ]
        frames = []
        for rows in (self.kernels, self.calls, [{"pass": "calls", "new_tokens": 3, **r} for r in ranges]):
            frame = pd.DataFrame(rows)
            for column in ("start_ns", "end_ns"):
                frame[column] = BASE_NS + (frame[column] * US).astype(np.int64)
            frames.append(frame)
        kernels, calls, marks = frames
        overheads = pd.DataFrame(self.overheads, columns=["pass", "start_ns", "end_ns"])
        overheads[["start_ns", "end_ns"]] = BASE_NS + (overheads[["start_ns", "end_ns"]].astype(float) * US).astype(
            np.int64
        )
        timeline = build_timeline(kernels, calls, marks, 0, "calls")
        return gap_causes(timeline, calls, overheads)


def first(trace: Trace) -> pd.Series:
    found = trace.causes()
    assert set(found["cause"]) <= set(CAUSES)
    return found.iloc[0]


def test_a_host_that_comes_late_is_launch_bound() -> None:
    trace = Trace()
    trace.launch(0, 6, 20)
    trace.launch(500, 506, 520)
    assert (first(trace)["cause"], first(trace)["duration_ns"]) == ("launch_bound", 486 * US)


@pytest.mark.parametrize("api", ["cudaStreamSynchronize", "cuCtxSynchronize", "cudaMemcpyAsync", "cudaFree"])
def test_a_host_that_was_blocked_when_the_device_ran_dry_is_a_stall(api: str) -> None:
    trace = Trace()
    trace.launch(0, 6, 200)
    trace.call(api, 10, 210)
    trace.launch(230, 236, 250)
    assert (first(trace)["cause"], first(trace)["api"]) == ("sync_stall", api)


def test_a_call_that_ended_before_the_device_ran_dry_stalled_nothing() -> None:
    trace = Trace()
    trace.launch(0, 6, 200)
    trace.call("cudaStreamSynchronize", 10, 50)
    trace.launch(230, 236, 250)
    assert first(trace)["cause"] == "launch_bound"


def test_a_short_call_within_a_long_one_does_not_hide_it() -> None:
    trace = Trace()
    trace.launch(0, 6, 200)
    trace.call("cudaDeviceSynchronize", 10, 210)
    trace.call("cudaMemcpyAsync", 20, 25)
    trace.launch(230, 236, 250)
    assert (first(trace)["cause"], first(trace)["api"]) == ("sync_stall", "cudaDeviceSynchronize")


def test_a_memset_queued_in_passing_is_no_stall() -> None:
    trace = Trace()
    trace.launch(0, 6, 200)
    trace.call("cudaMemsetAsync", 198, 203)
    trace.launch(230, 236, 250)
    assert first(trace)["cause"] == "launch_bound"


def test_between_two_forwards_is_the_token_boundary_even_where_the_host_waits() -> None:
    trace = Trace()
    trace.launch(900, 906, 990)
    trace.call("cudaStreamSynchronize", 950, 1000)
    trace.launch(1040, 1046, 1060)  # sampling, after the forward
    trace.launch(1150, 1156, 1170)  # the next forward
    trace.launch(1400, 1406, 1420)  # and inside it
    assert list(trace.causes()["cause"]) == ["token_boundary", "token_boundary", "launch_bound"]


def test_queued_in_time_is_latency_or_waits_for_another_stream() -> None:
    trace = Trace()
    trace.launch(0, 6, 100)
    trace.launch(20, 102, 150)
    trace.launch(40, 190, 250, stream=8)
    trace.launch(60, 255, 260, stream=8)
    # An event may also be waited for in a stream that had the kernel before.
    trace.launch(80, 330, 340, stream=8)
    assert list(trace.causes()["cause"]) == ["launch_latency", "dependency", "launch_latency", "dependency"]


def test_kernels_of_one_graph_follow_each_other_by_latency() -> None:
    trace = Trace()
    trace.launch(0, 50, 60)
    trace.kernels += [{**trace.kernels[0], "start_ns": 61.5, "end_ns": 70}]
    assert list(trace.causes()["cause"]) == ["launch_latency"]


def test_a_graph_may_begin_before_its_launch_call_is_back() -> None:
    trace = Trace()
    trace.launch(0, 20, 30, call=100)
    trace.kernels += [{**trace.kernels[0], "start_ns": 31, "end_ns": 40}]
    assert list(trace.causes()["cause"]) == ["launch_latency"]


@pytest.mark.parametrize(("issue", "cause"), [(300, "dependency"), (700, "launch_bound")])
def test_of_a_late_kernel_that_is_held_back_as_well_the_longer_part_is_the_cause(issue: float, cause: str) -> None:
    trace = Trace()
    trace.launch(0, 6, 20)
    trace.launch(issue, 950, 960, stream=8)
    assert list(trace.causes()["cause"]) == [cause]


def test_what_cupti_covers_is_its_own_and_an_unrecorded_launch_is_unknown() -> None:
    trace = Trace()
    trace.launch(0, 6, 20)
    trace.launch(300, 306, 320)
    trace.launch(500, 506, 520)
    trace.calls[2]["correlation_id"] = 99
    trace.overheads = [
        {"pass": "calls", "start_ns": 30, "end_ns": 250},
        {"pass": "calls", "start_ns": 100, "end_ns": 200},
    ]
    assert list(trace.causes()["cause"]) == ["profiler", "unknown"]


def test_no_gap_has_no_cause() -> None:
    trace = Trace()
    trace.launch(0, 6, 20)
    assert trace.causes().empty
