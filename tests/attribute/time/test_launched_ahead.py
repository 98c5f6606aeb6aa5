"""A host that is whole tokens ahead, and kernels that are there before their predecessor has ended."""

from __future__ import annotations

import pandas as pd

from llmkern.attribute.time.recorder_effect import _lengths
from llmkern.attribute.time.timeline import build_timeline

US = 1_000


def frames(tokens: int, each: int, host_us: int, device_us: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return kernels, no launches, and ranges of a decode whose graph launches the host issues *host_us* apart."""
    begin = 1_000_000
    kernels = pd.DataFrame(
        [
            {
                "start_ns": begin + (step * each + number) * device_us * US,
                "end_ns": begin + (step * each + number + 1) * device_us * US,
                "stream": 7,
                "correlation_id": 10 + step,
                "name": f"k{number}",
            }
            for step in range(tokens)
            for number in range(each)
        ]
    )
    marks = [(0, begin + tokens * each * device_us * US, "phase", None)]
    marks += [(step * host_us * US, (step + 1) * host_us * US, "token", step + 1) for step in range(tokens)]
    columns = ["start_ns", "end_ns", "category", "token"]
    ranges = pd.DataFrame(marks, columns=columns).assign(phase="decode", new_tokens=tokens + 1, name="r")
    ranges["token"] = pd.to_numeric(ranges["token"])
    return kernels, pd.DataFrame({"start_ns": [], "end_ns": [], "correlation_id": [], "api": []}), ranges


def test_steps_that_are_one_launch_each_are_told_apart_by_it() -> None:
    timeline = build_timeline(*frames(tokens=5, each=4, host_us=20, device_us=100), device=0)
    assert timeline.kernels["token"].tolist() == [step + 1 for step in range(5) for _ in range(4)]


def test_other_steps_are_told_apart_by_their_time() -> None:
    kernels, launches, ranges = frames(tokens=5, each=4, host_us=20, device_us=100)
    # Every kernel a launch of its own: the last token is where the host was when most of them began.
    timeline = build_timeline(kernels.assign(correlation_id=range(20)), launches, ranges, 0)
    assert set(timeline.kernels["token"]) == {5}


def test_a_kernel_that_waits_for_its_predecessor_begins_with_its_end() -> None:
    kernels, launches, ranges = frames(tokens=1, each=4, host_us=20, device_us=100)
    early = kernels.assign(start_ns=kernels["start_ns"] - [0, 90 * US, 90 * US, 90 * US])
    timeline = build_timeline(early, launches, ranges, 0)
    assert (timeline.kernels["end_ns"] - timeline.kernels["start_ns"]).tolist() == [100 * US] * 4
    assert int(timeline.phases["busy_ns"].sum()) == 400 * US
    # On another stream it is work of its own.
    beside = build_timeline(early.assign(stream=[7, 8, 7, 8]), launches, ranges, 0)
    assert int((beside.kernels["end_ns"] - beside.kernels["start_ns"]).sum()) > 400 * US


def test_a_branch_that_ended_first_keeps_its_time() -> None:
    kernels, launches, ranges = frames(tokens=1, each=2, host_us=20, device_us=100)
    inside = kernels.assign(start_ns=[1_000_000, 1_010_000], end_ns=[1_100_000, 1_030_000])
    timeline = build_timeline(inside, launches, ranges, 0)
    assert (timeline.kernels["end_ns"] - timeline.kernels["start_ns"]).tolist() == [100_000, 20_000]


def test_what_the_recorder_changes_is_seen_although_the_host_is_ahead() -> None:
    def generation(begin_us: int, decode_us: int) -> pd.DataFrame:
        rows = [(begin_us, begin_us + 100, "phase", "prefill", None)]
        rows += [(begin_us + 100, begin_us + 100 + decode_us, "phase", "decode", None)]
        # Issued within 5 µs each, whatever the device takes for them.
        rows += [(begin_us + 100 + 5 * t, begin_us + 105 + 5 * t, "token", "decode", t) for t in range(1, 21)]
        frame = pd.DataFrame(rows, columns=["start_ns", "end_ns", "category", "phase", "token"])
        return frame.assign(start_ns=frame["start_ns"] * US, end_ns=frame["end_ns"] * US, repeat=0)

    bare, recorded = (_lengths(generation(0, us))["decode"][0] for us in (10_000, 10_100))
    assert recorded / bare == 1.01
