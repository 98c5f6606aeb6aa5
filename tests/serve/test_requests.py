"""Joules of requests on a board of known power: shares, idle, and books that close."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmkern.attribute.iterations import iteration_kinds
from llmkern.attribute.requests import Served, relative, served
from llmkern.errors import UsageError
from llmkern.runfolder import RunFolder, RunWriter
from llmkern.runfolder.facts import DeviceFacts
from llmkern.serve.statement import state
from tests.synthetic import synthetic_run
from tests.tables import least_facts

S, MS = 1_000_000_000, 1_000_000
FLOOR_W, TICK_NS = 120.0, 100 * MS
# What an iteration draws above the floor: a prefill more than a decode step.
PREFILL_W, DECODE_W = 400.0, 150.0
Step = tuple[float, dict[int, tuple[int, int]]]
# A recorded iteration: s, whether it prefills, requests in it, its kernels.
Recorded = tuple[float, bool, int, list[tuple[float, float]]]


def made(
    folder: Path,
    steps: list[tuple[float, Step]],
    requests: int,
    between_w: float = 0.0,
    recorded: list[Recorded] | None = None,
    sampled: bool = False,
) -> RunFolder:
    """Write a run whose server idles so many s before each of *steps* (s, tokens of prefill and decode by request).

    In the window the board takes *between_w* more than at rest where no iteration runs. With *sampled* the counter is
    read at the window's ends alone, and the driver keeps samples of the power.
    """
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
    if between_w:
        idle_s = (np.clip(ticks, window_ns, end_ns) - window_ns) / S
        for start, end, _ in spans:
            idle_s = idle_s - (np.clip(ticks, start, end) - start) / S
        joule = joule + between_w * idle_s
    if sampled:
        # Off by a tenth, as another sensor may be.
        moments = np.arange(begin_ns, end_ns + 6 * S, 20 * MS)
        watts = 1.1 * np.diff(np.interp(moments, ticks, joule)) / 0.02
        nothing = dict.fromkeys(("sm_clock_mhz", "temperature_c", "throttle"))
        rows = {"timestamp_ns": moments[1:], "device": 0, "sensor": "samples", **nothing}
        writer.append("power", {**rows, "power_mw": np.round(watts * 1e3).astype(np.int64)})
        outside = (ticks <= window_ns) | (ticks >= end_ns)
        ticks, joule = ticks[outside], joule[outside]
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
    if recorded:
        _record(writer, end_ns + 10 * S, len(steps), recorded)
    writer.merge()
    writer.publish()
    return RunFolder(folder)


def _record(writer: RunWriter, now_ns: int, number: int, steps: list[Recorded]) -> None:
    """Write iterations after the window, with the kernels in each: (s after its start, s)."""
    zeros = dict.fromkeys(("context", "graph_id", "graph_node_id", "registers", "shared_bytes", "copied_bytes"), 0)
    zeros |= {f"{part}_{axis}": 1 for part in ("grid", "block") for axis in "xyz"}
    for seconds, prefill, batch, kernels in steps:
        end_ns = now_ns + round(seconds * S)
        writer.append("iterations", {"iteration": [number], "start_ns": [now_ns], "end_ns": [end_ns]})
        requests = list(range(100, 100 + batch))
        tokens = {"prefill_tokens": 10 if prefill else 0, "decode_tokens": 0 if prefill else 1, "new_tokens": 1}
        writer.append("processed", {"iteration": number, "request": requests, **tokens})
        starts = [now_ns + round(at_s * S) for at_s, _ in kernels]
        ends = [start + round(long_s * S) for start, (_, long_s) in zip(starts, kernels, strict=True)]
        rows = {"pass": "time", "start_ns": starts, "end_ns": ends, "correlation_id": list(range(len(starts)))}
        writer.append("kernels", {**rows, "name": "gemm", "device": 0, "stream": 7, "kind": "kernel", **zeros})
        now_ns, number = end_ns, number + 1


def books(found: Served) -> None:
    assert found.counter_j is not None
    assert found.idle_j is not None
    # Idle is floor x time, and requests are their iterations: that both are the counter can fail.
    claimed_j = float(found.requests["energy_j"].sum()) + found.unclaimed_j
    assert claimed_j + found.idle_j == pytest.approx(found.counter_j, rel=0.005)
    assert claimed_j + found.idle_j + found.residual_j == pytest.approx(found.counter_j, rel=1e-12)
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


def test_between_rare_reads_of_the_counter_the_samples_say_whose_joules(tmp_path: Path) -> None:
    """On a real GPU a read holds up launches, so that whole windows lie between two."""
    steps: list[tuple[float, Step]] = []
    for number in range(6):
        steps += [(0.0, (0.4, {2 * number: (100, 0)})), (0.0, (0.4, {2 * number + 1: (0, 1)}))]
    found = served(made(tmp_path / "run", steps, 12, sampled=True))
    books(found)
    joules = found.requests["energy_j"].to_numpy()
    assert joules[::2] == pytest.approx(0.4 * (FLOOR_W + PREFILL_W), rel=0.02)
    assert joules[1::2] == pytest.approx(0.4 * (FLOOR_W + DECODE_W), rel=0.02)
    assert found.power is not None
    assert found.power["watts"].max() == pytest.approx(FLOOR_W + PREFILL_W, rel=0.02)


def test_the_same_requests_are_held_against_themselves(tmp_path: Path) -> None:
    """That one is fifty times as long as another is no doubt of what a way of serving them saves."""
    random = np.random.default_rng(2)
    seconds = np.exp(random.uniform(np.log(0.1), np.log(5.0), 30))
    runs = [
        served(made(tmp_path / str(part), [(0.2, (part * s, {n: (9, 0)})) for n, s in enumerate(seconds)], 30))
        for part in (0.5, 1.0)
    ]
    own = [run.per_request_j() for run in runs]
    ratio = relative(*runs)
    assert ratio is not None
    assert own[0] is not None
    assert own[1] is not None
    assert ratio.value == pytest.approx(own[0].value / own[1].value)
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < ratio.value < ratio.high
    assert ratio.high - ratio.low < 0.1 * ratio.value
    alone = own[0].of_another_run().with_(own[1], np.divide)
    assert alone.low is not None
    assert alone.high is not None
    assert alone.high - alone.low > 4 * (ratio.high - ratio.low)
    # Other requests tell of the ratio what their intervals do.
    fewer = served(made(tmp_path / "fewer", [(0.2, (s, {n: (9, 0)})) for n, s in enumerate(seconds[:20])], 20))
    unpaired = relative(runs[0], fewer)
    assert unpaired is not None
    assert unpaired.high is not None
    assert unpaired.low is not None
    assert unpaired.high - unpaired.low > 4 * (ratio.high - ratio.low)


def test_no_request_takes_less_than_nothing(tmp_path: Path) -> None:
    seconds = [0.1, 0.1, 0.1, 0.1, 0.1, 8.0]
    found = served(made(tmp_path / "run", [(0.2, (s, {n: (9, 0)})) for n, s in enumerate(seconds)], 6)).per_request_j()
    assert found is not None
    assert found.low is not None
    assert found.low >= 0


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


def test_what_comes_after_the_last_request_is_the_drain(tmp_path: Path) -> None:
    # GIVEN both requests sent at once, and answered one after the other
    steps: list[tuple[float, Step]] = [(0.0, (0.5, {0: (10, 0)})), (0.0, (0.5, {1: (10, 0)}))]
    found = served(made(tmp_path / "run", steps, 2))
    assert found.drain_s == pytest.approx(2.0, abs=0.01)
    assert found.drain_j == pytest.approx(2.0 * FLOOR_W + 1.0 * PREFILL_W, rel=0.02)


def test_a_board_that_takes_more_between_iterations_than_at_rest_is_told(tmp_path: Path) -> None:
    """That requests and idle time are the counter is no law: a busy host warms the board, a cold one rests lower."""
    steps: list[tuple[float, Step]] = [(1.0, (0.5, {0: (10, 0)})), (2.0, (0.5, {1: (10, 0)}))]
    honest, more = (made(tmp_path / str(w), steps, 2, between_w=w) for w in (0.0, 30.0))
    assert not any("leave" in said for said in state([honest.path], {}).doubts)
    # Of the last second the counter's ticks beyond the window are taken for rest as well.
    assert served(more).residual_j == pytest.approx(4 * 30.0, rel=0.1)
    assert any("leave +1" in said and "limit 0.5%" in said for said in state([more.path], {}).doubts)


def test_iterations_consist_of_kernels_and_gaps(tmp_path: Path) -> None:
    # GIVEN ten weighed decode iterations of 100 ms and a prefill, and recorded ones whose kernels take 20 and 300 ms
    steps: list[tuple[float, Step]] = [(1.0, (0.5, {0: (10, 0)})), *[(0.0, (0.1, {0: (0, 1)}))] * 10]
    busy = [(0.01, 0.01), (0.03, 0.015), (0.04, 0.005)]  # the last lies inside the one before
    recorded: list[Recorded] = [(0.6, True, 1, [(0.1, 0.3)]), (0.15, False, 1, busy), (0.15, False, 1, busy)]
    run = made(tmp_path / "run", steps, 1, recorded=recorded)
    found = served(run)
    books(found)
    assert len(found.iterations) == 11
    prefill, decode = iteration_kinds(run, found)
    assert (prefill.kind, prefill.count, prefill.launches) == ("prefill", 1, 1)
    assert prefill.busy_s == pytest.approx(0.3)
    assert (decode.kind, decode.count, decode.launches) == ("decode", 2, 3)
    assert decode.busy_s == pytest.approx(0.025)
    assert decode.span_s.value == pytest.approx(0.15)
    assert decode.longest == (("gemm", pytest.approx(0.025)),)
    # THEN its joules are those of weighed ones, gaps the floor over what of their time no kernel takes
    assert decode.joules is not None
    assert decode.gaps_j is not None
    assert decode.joules.value == pytest.approx(0.1 * (FLOOR_W + DECODE_W), rel=0.03)
    assert decode.gaps_j.value == pytest.approx(FLOOR_W * (0.1 - 0.025), rel=0.03)


def test_recorded_iterations_of_another_batch_say_nothing_of_joules(tmp_path: Path) -> None:
    steps: list[tuple[float, Step]] = [(1.0, (0.5, {0: (0, 1), 1: (0, 1)}))]
    run = made(tmp_path / "run", steps, 2, recorded=[(0.1, False, 3, [(0.0, 0.05)])])
    (decode,) = iteration_kinds(run, served(run))
    assert decode.batch == 3
    assert decode.joules is None
    plain = made(tmp_path / "plain", steps, 2)
    assert iteration_kinds(plain, served(plain)) == []


def test_one_slow_iteration_does_not_make_kernels_longer_than_iterations(tmp_path: Path) -> None:
    """The span was a median and the kernels' time a mean: one slow iteration of seven made them 108 % of it."""
    steps: list[tuple[float, Step]] = [(1.0, (0.5, {0: (0, 1)}))]
    quick: Recorded = (0.01, False, 1, [(0.0, 0.009)])
    slow: Recorded = (0.1, False, 1, [(0.0, 0.09)])
    run = made(tmp_path / "run", steps, 1, recorded=[*[quick] * 6, slow])
    (decode,) = iteration_kinds(run, served(run))
    assert decode.busy_s / decode.span_s.value == pytest.approx(0.9)
