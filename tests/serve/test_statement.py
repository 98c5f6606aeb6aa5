"""What is told of several patterns: who saves what, whose interval, which page; and what ends a run keeps it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from bench.serving import order
from llmkern.estimate import from_samples
from llmkern.report.serve import print_serve, serve_document
from llmkern.report.serve_page import serve_page
from llmkern.runfolder import RunFolder
from llmkern.runfolder.document import encode
from llmkern.serve.figures import figures, over_time
from llmkern.serve.statement import ServeStatement, state
from tests.serve.test_requests import DECODE_W, FLOOR_W, PREFILL_W, Step, made
from tests.serve.test_shape import apart

COUNT = 20


def alone() -> list[tuple[float, Step]]:
    """Requests one after the other, of 0.3 s of prefill and ten steps of 30 ms."""
    found: list[tuple[float, Step]] = []
    for number in range(COUNT):
        found.append((0.1, (0.3, {number: (100, 0)})))
        found += [(0.0, (0.03, {number: (0, 1)}))] * 10
    return found


def together() -> list[tuple[float, Step]]:
    """All at once: ten times as long for twenty times as much."""
    everyone = range(COUNT)
    first: tuple[float, Step] = (0.1, (3.0, dict.fromkeys(everyone, (100, 0))))
    return [first, *[(0.0, (0.06, dict.fromkeys(everyone, (0, 1))))] * 10]


@pytest.fixture(scope="module")
def statement(tmp_path_factory: pytest.TempPathFactory) -> ServeStatement:
    folder = tmp_path_factory.mktemp("patterns")
    for name, steps in (("sequential", alone()), ("burst", together())):
        run = made(folder / name, steps, COUNT)
        (run.path / "run.json").write_bytes(encode(replace(run.facts, labels={"arrivals": name})))
    return state([folder / "sequential", folder / "burst", folder / "absent"], {"poisson-5": "it was too large"})


def test_what_a_burst_saves_is_told_with_its_interval(statement: ServeStatement) -> None:
    first, burst = statement.arrivals
    assert first.saved is None
    assert burst.saved is not None
    assert burst.own_j is not None
    joules = (3.0 * (FLOOR_W + PREFILL_W) + 0.6 * (FLOOR_W + DECODE_W)) / COUNT
    assert burst.own_j.value == pytest.approx(joules, rel=0.02)
    assert burst.request_j is not None
    assert first.request_j is not None
    assert burst.saved.value == pytest.approx(1 - burst.request_j.value / first.request_j.value, rel=1e-6)
    assert (first.mean_batch, burst.mean_batch) == (pytest.approx(1), pytest.approx(COUNT))
    # Nine tenths of a second of the window belong to nobody.
    assert burst.idle_share is not None
    assert burst.idle_share == pytest.approx(1.1 * FLOOR_W / (burst.found.counter_j or 0), rel=0.05)
    assert statement.failed.keys() == {"absent", "poisson-5"}


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_every_pattern_and_what_is_missing(statement: ServeStatement, width: int) -> None:
    console = Console(width=width, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    print_serve(statement, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for word in ("sequential", "burst", "poisson-5: it was too large"):
        assert word in " ".join(text.split())


def test_the_page_has_the_figures_and_no_network(statement: ServeStatement) -> None:
    text = serve_page(statement)
    assert [figure.name for figure in figures(statement.arrivals)] == ["figure-3a", "figure-3b", "figure-3c"]
    assert text.count('data-chart="chart-time-') == 2
    assert "A request takes from" in text
    assert "it was too large" in text
    assert serve_document(statement)["arrivals"][1]["mean_batch"] == pytest.approx(COUNT)


def test_over_time_nothing_between_two_points_is_lost(statement: ServeStatement) -> None:
    burst = statement.arrivals[1]
    rows = over_time(burst)
    batch = rows[rows["what"] == "batch"]["value"]
    assert batch.max() == pytest.approx(COUNT)
    assert batch.mean() * burst.found.seconds == pytest.approx(3.6 * COUNT, rel=1e-3)


def test_power_over_time_is_the_counters(statement: ServeStatement) -> None:
    burst = statement.arrivals[1].found
    assert burst.power is not None
    assert burst.power["watts"].mean() * burst.seconds == pytest.approx(burst.counter_j, rel=0.01)
    assert burst.power["watts"].max() == pytest.approx(FLOOR_W + PREFILL_W, rel=0.01)
    assert burst.power["watts"].min() == pytest.approx(FLOOR_W, rel=0.01)


def answered(partial: Path) -> int:
    """Return how many requests of the schedule have had their three tokens, by what is on disk so far."""
    parts = [pd.read_parquet(part) for part in partial.glob("segments/processed-*.parquet")]
    rows = pd.concat(parts) if parts else pd.DataFrame({"request": [], "new_tokens": []})
    return int((rows[rows["request"] < 1000].groupby("request")["new_tokens"].sum() >= 3).sum())


def test_what_was_answered_before_ctrl_c_is_kept(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "llmkern", "serve-study", "--model", "qwen-tiny", "--device", "cpu"),
        *("--precision", "fp32", "--requests", "1000", "--prompt-tokens", "4", "--new-tokens", "3"),
        *("--arrivals", "fixed:0.05", "--out", "out"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "out" / "runs" / "fixed-0.05.partial"
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s and answered(partial) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in told
    assert "ended by SIGINT: what is complete is kept in out/runs, and the same command goes on" in told
    run = RunFolder(partial)
    assert run.status == "interrupted"
    requests = run.table("requests")
    assert (requests["status"] == "finished").sum() >= 5
    assert len(requests) < 1000


def test_the_bench_says_whether_the_studys_order_holds() -> None:
    def arrivals(pattern: str, joules: float, spread: float) -> Any:
        estimate = from_samples([joules * (1 + spread * step) for step in (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)])
        return SimpleNamespace(pattern=pattern, request_j=estimate)

    found = order(
        (
            *(arrivals("sequential", 90.0, 0.01), arrivals("burst", 40.0, 0.01), arrivals("fixed:0.05", 30.0, 0.3)),
            *(arrivals("fixed:0.5", 80.0, 0.01), arrivals("uniform:0-1", 32.0, 0.01)),
        ),
        apart,
    )
    # Of two fixed intervals the one that takes least stands for them.
    assert [(one["less"], one["more"], one["holds"]) for one in found] == [
        ("fixed:0.05", "uniform:0-1", None),
        ("uniform:0-1", "burst", True),
        ("burst", "sequential", True),
    ]
    (other,) = order((arrivals("burst", 90.0, 0.01), arrivals("sequential", 40.0, 0.01)), apart)
    assert other["holds"] is False


def test_runs_of_one_pattern_are_told_together_with_what_varies_between_them(tmp_path: Path) -> None:
    # GIVEN three runs of each, of which the second finds a host that takes a fifth longer
    folders = []
    for number, slow in enumerate((1.0, 1.2, 1.0)):
        for name, steps in (("sequential", alone()), ("burst", together())):
            slower: list[tuple[float, Step]] = [(rest, (slow * seconds, step)) for rest, (seconds, step) in steps]
            run = made(tmp_path / f"{name}-{number}", slower, COUNT)
            (run.path / "run.json").write_bytes(encode(replace(run.facts, labels={"arrivals": name})))
            folders.append(run.path)
    told = state(folders, {})
    first, burst = told.arrivals
    assert (len(first.runs), len(burst.runs)) == (3, 3)
    assert burst.status == {"finished": 3 * COUNT}
    each = [run.per_request_j() for run in burst.runs]
    assert burst.request_j is not None
    assert burst.request_j.value == pytest.approx(sum(e.value for e in each if e is not None) / 3)
    assert burst.request_j.low is not None
    assert burst.request_j.high is not None
    # A fifth in one of three runs is more than three equal ones would say.
    assert burst.request_j.high - burst.request_j.low > 0.3 * burst.request_j.value
    # It is slower in both: their ratio is known better, and by its three values.
    assert burst.saved is not None
    assert burst.saved.low is not None
    assert burst.saved.high is not None
    assert burst.saved.high - burst.saved.low < 0.05
    document = serve_document(told)
    runs = document["arrivals"][1]["runs"]
    assert len(runs) == 3
    for one in runs:
        claimed_j = one["requests_j"] + one["idle_j"] + one["unclaimed_j"] + one["residual_j"]
        assert claimed_j == pytest.approx(one["counter_j"])
    console = Console(width=100, record=True, file=io.StringIO())
    print_serve(told, console)
    assert "burst, run 2: requests" in console.export_text()
