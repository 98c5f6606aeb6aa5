"""Joules of requests on a board of known power: shares, idle, and books that close."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmkern.attribute.requests import Served, served
from llmkern.errors import UsageError
from llmkern.runfolder import RunFolder, RunWriter
from llmkern.runfolder.facts import DeviceFacts
from tests.synthetic import synthetic_run
from tests.tables import least_facts

S, MS = 1_000_000_000, 1_000_000
FLOOR_W, TICK_NS = 120.0, 100 * MS
# What an iteration draws above the floor: a prefill more than a decode step.
PREFILL_W, DECODE_W = 400.0, 150.0
Step = tuple[float, dict[int, tuple[int, int]]]


def made(folder: Path, steps: list[tuple[float, Step]], requests: int) -> RunFolder:
    """Write a run whose server idles so many s before each of *steps* (s, tokens of prefill and decode by request)."""
    device = DeviceFacts(kind="cuda", index=0, name="Synthetic GPU")
    writer = RunWriter(folder, replace(least_facts(), device=device, labels={"arrivals": "x"}))
    begin_ns = 1_790_000_000 * S
    spans: list[tuple[int, int, float]] = []
    iterations, processed = [], []
    window_ns = now_ns = begin_ns + 4 * S
    first, last = {}, {}
    for number, (rest_s, (seconds, tokens)) in enumerate(steps):
        start_ns = now_ns + round(rest_s * S)
        now_ns = start_ns + round(seconds * S)
        prefill = any(p for p, _ in tokens.values())
        spans.append((start_ns, now_ns, PREFILL_W if prefill else DECODE_W))
        iterations.append((number, start_ns, now_ns))
        for request, (p, d) in tokens.items():
            processed.append((number, request, p, d, 1))
            first.setdefault(request, now_ns)
            last[request] = now_ns
    end_ns = now_ns + S
    ticks = np.arange(begin_ns, end_ns + 6 * S, TICK_NS)
    joule = FLOOR_W * (ticks - begin_ns) / S
    for start, end, watts in spans:
        joule = joule + watts * (np.clip(ticks, start, end) - start) / S
    rests = [(begin_ns + S * i, begin_ns + S * (i + 1)) for i in range(3)]
    rests += [(end_ns + S * i, end_ns + S * (i + 1)) for i in range(1, 4)]
    rows = [("idle", *rest) for rest in rests] + [("window", window_ns, end_ns)]
    empty = dict.fromkeys(("phase", "token", "round", "repeat", "new_tokens"))
    category, starts, ends = map(list, zip(*rows, strict=True))
    writer.append(
        "ranges",
        {
            **{"pass": "serve", "start_ns": starts, "end_ns": ends, "thread": 1, "domain": "llmkern"},
            **{"name": category, "category": category, "depth": 0, "process": 0, **empty},
        },
    )
    writer.append(
        "energy",
        {
            **{"timestamp_ns": ticks, "device": 0, "sensor": "nvml_total", "uncertainty_ns": 0},
            "energy_mj": np.round(joule * 1e3).astype(np.int64),
        },
    )
    columns = ("iteration", "start_ns", "end_ns")
    writer.append("iterations", dict(zip(columns, map(list, zip(*iterations, strict=True)), strict=True)))
    columns = ("iteration", "request", "prefill_tokens", "decode_tokens", "new_tokens")
    writer.append("processed", dict(zip(columns, map(list, zip(*processed, strict=True)), strict=True)))
    numbers = list(range(requests))
    writer.append(
        "requests",
        {
            **{"request": numbers, "intended_ns": window_ns, "sent_ns": window_ns + MS, "reason": ""},
            "first_token_ns": [first.get(n) for n in numbers],
            "last_token_ns": [last.get(n) for n in numbers],
            **{"prompt_tokens": 10, "output_tokens": 5},
            "status": ["finished" if n in last else "unanswered" for n in numbers],
        },
    )
    writer.merge()
    writer.publish()
    return RunFolder(folder)


def books(found: Served) -> None:
    assert found.counter_j is not None
    assert found.idle_j is not None
    assert float(found.requests["energy_j"].sum()) + found.idle_j == pytest.approx(found.counter_j, rel=1e-12)
    assert float(found.requests["floor_j"].sum() + found.requests["dynamic_j"].sum()) == pytest.approx(
        float(found.requests["energy_j"].sum()), rel=1e-12
    )


def test_requests_apart_get_what_their_iterations_took(tmp_path: Path) -> None:
    # GIVEN two requests, a second apart: half a second of prefill each, then ten and twenty decode steps of 50 ms
    def request(number: int, steps: int) -> list[tuple[float, Step]]:
        decode = [(0.0, (0.05, {number: (0, 1)}))] * steps
        return [(1.0, (0.5, {number: (100, 0)})), *decode]

    found = served(made(tmp_path / "run", [*request(0, 10), *request(1, 20)], 2))
    books(found)
    truth = [0.5 * (FLOOR_W + PREFILL_W) + 0.05 * n * (FLOOR_W + DECODE_W) for n in (10, 20)]
    assert found.requests["energy_j"].to_list() == pytest.approx(truth, rel=0.01)
    # Idle: a second before each, and one after the last.
    assert found.idle_j == pytest.approx(3 * FLOOR_W, rel=0.02)
    assert found.busy_s == pytest.approx(2.5)
    assert found.unclaimed_j == pytest.approx(0, abs=0.5)


def test_equal_requests_in_one_batch_get_equal_joules_and_unequal_ones_by_tokens(tmp_path: Path) -> None:
    steps: list[tuple[float, Step]] = [(1.0, (0.4, {0: (50, 0), 1: (50, 0), 2: (100, 0)}))]
    steps += [(0.0, (0.1, {0: (0, 1), 1: (0, 1)}))] * 10
    found = served(made(tmp_path / "run", steps, 3))
    books(found)
    one, other, long = found.requests["energy_j"]
    assert one == other
    prefill, decode = 0.4 * (FLOOR_W + PREFILL_W), 1.0 * (FLOOR_W + DECODE_W)
    assert long == pytest.approx(prefill / 2, rel=0.03)
    assert one == pytest.approx(prefill / 4 + decode / 2, rel=0.03)
    assert found.iterations["batch"].to_list() == [3, *[2] * 10]


def test_a_request_that_nothing_answered_costs_nothing_and_the_books_still_close(tmp_path: Path) -> None:
    found = served(made(tmp_path / "run", [(0.5, (0.6, {0: (10, 0)}))], 2))
    books(found)
    assert found.requests["status"].to_list() == ["finished", "unanswered"]
    assert found.requests["energy_j"].iloc[1] == 0
    assert np.isnan(found.requests["ttft_s"].iloc[1])
    assert found.requests["ttft_s"].iloc[0] == pytest.approx(1.1)


def test_joules_per_request_have_an_interval_over_blocks(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    steps: list[tuple[float, Step]] = [
        (0.5, (float(0.5 + 0.2 * random.random()), {number: (100, 0)})) for number in range(30)
    ]
    found = served(made(tmp_path / "run", steps, 30))
    books(found)
    whole, own = found.per_request_j(), found.per_request_j(with_idle=False)
    assert whole is not None
    assert own is not None
    assert found.counter_j is not None
    assert whole.value == pytest.approx(found.counter_j / 30)
    assert own.value == pytest.approx(0.6 * (FLOOR_W + PREFILL_W), rel=0.05)
    assert own.low is not None
    assert own.high is not None
    assert own.low < 0.6 * (FLOOR_W + PREFILL_W) < own.high
    assert own.high - own.low < 0.2 * own.value


def test_a_run_that_served_nothing_is_a_sentence(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    with pytest.raises(UsageError, match="served no requests"):
        served(run)
