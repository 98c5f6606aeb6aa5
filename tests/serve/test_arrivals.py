"""Arrivals as pure functions: their times, their seeds, and what is no pattern."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from llmkern.errors import UsageError
from llmkern.serve.arrivals import schedule

LENGTHS = [(100 + n, 10 + n) for n in range(200)]


def times(pattern: str, seed: int = 0) -> list[float]:
    return [arrival.at_s for arrival in schedule(pattern, LENGTHS, seed).arrivals]


def test_every_pattern_has_its_times() -> None:
    assert times("burst") == [0.0] * 200
    assert times("burst:8@2")[:17] == [0.0] * 8 + [2.0] * 8 + [4.0]
    assert times("fixed:0.3")[:4] == pytest.approx([0, 0.3, 0.6, 0.9])
    gaps = [b - a for a, b in pairwise(times("uniform:0.1-0.5"))]
    assert 0.1 <= min(gaps) <= max(gaps) <= 0.5
    assert statistics.mean(gaps) == pytest.approx(0.3, abs=0.03)
    gaps = [b - a for a, b in pairwise(times("poisson:5"))]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.2)
    # Of a Poisson process the gaps scatter as much as they are long.
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.3)
    closed = schedule("sequential", LENGTHS, 0)
    assert closed.closed
    assert not schedule("burst", LENGTHS, 0).closed


def test_seeds_decide_and_lengths_stay_with_their_requests() -> None:
    assert times("poisson:5", 1) == times("poisson:5", 1) != times("poisson:5", 2)
    found = schedule("fixed:1", LENGTHS, 0).arrivals
    assert [(one.prompt_tokens, one.output_tokens) for one in found] == LENGTHS


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("bursts", "'bursts' are unknown: give one of burst"),
        ("fixed:0", "0 is no rate or interval"),
        ("fixed:", "'' is no number"),
        ("fixed:-1", "'-1' is no number of 0 or more"),
        ("fixed:nan", "'nan' is no number"),
        ("poisson:0", "0 is no rate"),
        ("uniform:0.5-0.1", "give the smaller one first"),
        ("uniform:1", "are unknown"),
        ("burst:0@2", "are unknown"),
        ("fixed:1e6", "would come after 199,000,000 s"),
        ("trace:absent.jsonl", "absent.jsonl cannot be read"),
    ],
)
def test_what_is_no_pattern_is_a_sentence(pattern: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        schedule(pattern, LENGTHS, 0)


def test_a_trace_is_put_in_the_order_of_its_times(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [{"time": t, "prompt_tokens": p, "output_tokens": 5} for t, p in ((12.5, 3), (10.0, 1), (11, 2))]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = schedule(f"trace:{file}", [], 0)
    assert [(one.at_s, one.prompt_tokens) for one in found.arrivals] == [(0.0, 1), (1.0, 2), (2.5, 3)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no object"),
        ('{"time": "1", "prompt_tokens": 1, "output_tokens": 1}', "line 2: \"time\" is '1'"),
        ('{"time": NaN, "prompt_tokens": 1, "output_tokens": 1}', 'line 2: "time" is nan'),
        ('{"time": 1, "output_tokens": 1}', 'line 2: "prompt_tokens" is None'),
        ('{"time": 1, "prompt_tokens": 1, "output_tokens": 0}', 'line 2: "output_tokens" is 0'),
    ],
)
def test_a_broken_line_of_a_trace_is_named(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"time": 0, "prompt_tokens": 1, "output_tokens": 1}\n' + line)
    with pytest.raises(UsageError, match=told):
        schedule(f"trace:{file}", [], 0)
