"""Gaps without the recorder: what each launch cost is taken off, what the host waited for stays."""

from __future__ import annotations

import pandas as pd
import pytest

from llmkern.attribute.time.stretch import without_recorder

TRUE_NS = {"eager": 100 * 10_000.0, "sleep": 600_000.0, "graph": 50 * 900.0, "wait": 3 * 40_000.0}
LAUNCHES = {"eager": 100.0, "sleep": 1.0, "graph": 50.0, "wait": 3.0}
CAUSE = {"eager": "launch_bound", "sleep": "launch_bound", "graph": "launch_latency", "wait": "sync_stall"}


def traced(each_ns: float, scale: float = 1.0) -> pd.DataFrame:
    """Return gaps of two phases that a recorder lengthened by *each_ns* at every launch, on a host *scale* as slow."""
    rows = [
        {
            "phase": phase,
            "cause": CAUSE[name],
            "launches": LAUNCHES[name],
            "duration_ns": true_ns if CAUSE[name] == "launch_latency" else true_ns * scale + each_ns * LAUNCHES[name],
        }
        for phase in ("prefill", "decode")
        for name, true_ns in TRUE_NS.items()
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("each_ns", [0.0, 500.0, 4_000.0, 30_000.0])
def test_what_each_launch_cost_is_taken_off(each_ns: float) -> None:
    seconds = sum(TRUE_NS.values()) / 1e9
    found = without_recorder(traced(each_ns), {"decode": seconds})
    decode = found[found["phase"] == "decode"]["duration_ns"].to_list()
    assert decode == pytest.approx(list(TRUE_NS.values()), rel=1e-4)
    # A phase that was not weighed stays as it was traced.
    assert found[found["phase"] == "prefill"].equals(traced(each_ns)[found["phase"] == "prefill"])


def test_a_host_that_was_slower_without_the_recorder_was_so_everywhere_but_in_the_queue() -> None:
    seconds = sum(TRUE_NS.values()) / 1e9
    found = without_recorder(traced(0.0, scale=0.5), {"decode": seconds})
    assert found[found["phase"] == "decode"]["duration_ns"].to_list() == pytest.approx(list(TRUE_NS.values()))


@pytest.mark.parametrize("seconds", [0.0, 1e-5, 1e-4])
def test_all_take_what_was_weighed_even_if_that_is_hardly_anything(seconds: float) -> None:
    found = without_recorder(traced(4_000.0), {"decode": seconds})
    decode = found[found["phase"] == "decode"]["duration_ns"]
    assert decode.sum() == pytest.approx(seconds * 1e9)
    assert (decode >= 0).all()


def test_what_the_recorder_caused_goes_first() -> None:
    flush = {"phase": "decode", "cause": "profiler", "launches": 2.0, "duration_ns": 5e6}
    gaps = pd.concat([traced(0.0), pd.DataFrame([flush])], ignore_index=True)
    found = without_recorder(gaps, {"decode": sum(TRUE_NS.values()) / 1e9})
    decode = found[found["phase"] == "decode"]["duration_ns"].to_list()
    assert decode == pytest.approx([*TRUE_NS.values(), 0.0], abs=1.0)


def test_without_causes_every_launch_pays() -> None:
    gaps = traced(4_000.0).drop(columns="cause")
    found = without_recorder(gaps, {"decode": sum(TRUE_NS.values()) / 1e9})
    decode = found[found["phase"] == "decode"]["duration_ns"].to_list()
    assert sum(decode) == pytest.approx(sum(TRUE_NS.values()))
    # The sleeping host's is the one that hardly shrinks.
    assert decode[1] == pytest.approx(TRUE_NS["sleep"], rel=0.01)
