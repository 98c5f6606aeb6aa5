"""Runs that are ended at random moments: what they leave behind, and what is printed of it.

python -m bench.interrupts [--count 60] [--seed 0]

Each run is to replace an older one of its name and gets one of SIGINT, SIGTERM, SIGHUP and SIGKILL at a random moment
of its
life. Afterwards the older run has to be intact (or, where the new one was complete, replaced by all of it), the signal
and the
folder told in a sentence, at most a second of what was being recorded lost, and each figure that is printed has to lie
within the intervals of uninterrupted runs, or be absent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bench.result import case, metric, write
from llmkern.record.pump import PERIOD_S
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import COMPLETE, INTERRUPTED, KILLED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
# Of the rows that a pump had not yet written, and the time it takes to write them.
MOST_LOST_S = 1.0
_WORKLOAD = (
    *("--model", "qwen-tiny", "--device", "cpu", "--prompt-tokens", "16", "--new-tokens", "8", "--warmup", "1"),
    # There is no energy on a CPU: windows need not outlast a tick.
    *("--unweighed-window-s", "0.5"),
)
# Stages in which something is being recorded.
_PUMPED = ("Weighing", "Timing", "Inspecting")
# Figures by phase and name.
Figures = dict[tuple[str, str], float]
Bounds = dict[tuple[str, str], tuple[float, float]]


@dataclass(frozen=True)
class Ended:
    """One run that was ended: how, in which stage, what it left, and what was wrong about that."""

    signal: str
    after_s: float
    stage: str
    status: str
    lost_s: float | None
    figures: int
    wrong: str


def command(out: Path, repeats: int) -> list[str]:
    return [sys.executable, "-m", "llmkern.trace", *_WORKLOAD, "--repeats", str(repeats), "-o", str(out), "--force"]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def figures(folder: Path) -> tuple[Figures, Bounds]:
    """Return the figures that a report of *folder* prints of each phase, and their intervals where they have one."""
    line = [sys.executable, "-m", "llmkern", "report", str(folder), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise RuntimeError(f"report ended with {done.returncode}: {done.stderr.strip()}")
    found: Figures = {}
    bounds: Bounds = {}
    for row in json.loads(done.stdout)["tables"].get("phases", []):
        for name in ("latency_s", "launches", "busy_s"):
            key = (row["phase"], name)
            if row.get(name) is not None:
                found[key] = row[name]
            if row.get(f"{name}_low") is not None:
                bounds[key] = (row[f"{name}_low"], row[f"{name}_high"])
    return found, bounds


def uninterrupted(folder: Path, count: int, repeats: int) -> tuple[Bounds, float]:
    """Return what *count* whole runs say each figure lies between, and how long one takes in s."""
    together: Bounds = {}
    without: dict[tuple[str, str], list[float]] = {}
    seconds = 0.0
    for number in range(count):
        out = folder / f"whole-{number}"
        begin_s = time.monotonic()
        subprocess.run(command(out, repeats), capture_output=True, check=True, env=environment())
        seconds = max(seconds, time.monotonic() - begin_s)
        values, bounds = figures(out)
        for key, value in values.items():
            if key not in bounds:
                without.setdefault(key, []).append(value)
                continue
            old = together.get(key, bounds[key])
            together[key] = min(old[0], bounds[key][0]), max(old[1], bounds[key][1])
    return {**together, **{key: _next_one(values) for key, values in without.items()}}, seconds


def _next_one(values: list[float]) -> tuple[float, float]:
    """Return between what the next of *values*, which are printed without an interval, lies in 999 of 1,000 cases."""
    mean = float(np.mean(values))
    if len(values) < 3:
        return min(values), max(values)
    half = float(stats.t.ppf(0.9995, len(values) - 1) * np.std(values, ddof=1) * np.sqrt(1 + 1 / len(values)))
    return mean - half, mean + half


class _Stages:
    """The stages that a run has told of on stderr, and when."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.lines: list[tuple[int, str]] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append((time.time_ns(), line.strip()))


def interrupted(out: Path, number: signal.Signals, after_s: float, repeats: int, bounds: Bounds) -> Ended:
    """Begin a run in the place of *out*, end it with *number* after *after_s* seconds, and judge what it left."""
    before = {p.name: p.read_bytes() for p in sorted(out.iterdir())}
    process = subprocess.Popen(
        command(out, repeats), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    told = _Stages(process)
    time.sleep(after_s)
    ended_ns = time.time_ns()
    process.send_signal(number)
    code = process.wait(timeout=120)
    told.thread.join(timeout=10)
    stages = [(t, line) for t, line in told.lines if line.endswith("…") and t <= ended_ns]
    stage = stages[-1][1].rstrip(" …") if stages else "starting"
    errors = "\n".join(line for _, line in told.lines)
    wrong = []
    if "Traceback" in errors:
        wrong.append(f"a traceback: {errors[-300:]}")
    replaced = {p.name: p.read_bytes() for p in sorted(out.iterdir())} != before
    partial = next(iter(sorted(out.parent.glob(f"{out.name}.partial*"))), None)
    status, lost_s, count = "nothing recorded", None, 0
    if replaced or code == 0:
        status = RunFolder(out).status
        if status != COMPLETE:
            wrong.append(f"the older run was replaced by one that is {status}")
    elif partial is not None:
        run = RunFolder(partial)
        status = run.status
        expected = (COMPLETE, KILLED if number == signal.SIGKILL else INTERRUPTED)
        if status not in expected:
            wrong.append(f"status {status}")
        if number != signal.SIGKILL and str(partial) not in errors:
            wrong.append(f"the folder is not told: {errors[-200:]}")
        if stage in _PUMPED:
            looks = run.table("clocks")["timestamp_ns"]
            last_ns = max([stages[-1][0], *([int(looks.max())] if len(looks) else [])])
            lost_s = max(0.0, (ended_ns - last_ns) / 1e9)
            if lost_s > MOST_LOST_S:
                wrong.append(f"{lost_s:.2f} s lost")
    if number != signal.SIGKILL and code not in (0, 128 + number, -number):
        wrong.append(f"exit code {code}: {errors[-300:]}")
    if number != signal.SIGKILL and code == -number and stage != "starting":
        wrong.append(f"the signal was not handled in {stage}")
    left = partial if partial is not None and not replaced else out if replaced else None
    if left is not None:
        values, _ = figures(left)
        count = len(values)
        for key, value in values.items():
            low, high = bounds[key]
            if not low <= value <= high:
                wrong.append(f"{' '.join(key)} = {value:.6g} outside [{low:.6g}, {high:.6g}]")
    return Ended(number.name, round(after_s, 2), stage, status, lost_s, count, "; ".join(wrong))


def widened(bounds: Bounds, factor: float) -> Bounds:
    """Return *bounds* so much wider: for a machine that does something else at the same time."""
    return {key: (low / factor, high * factor) for key, (low, high) in bounds.items()}


def run_all(folder: Path, count: int, seed: int, repeats: int, workers: int, factor: float) -> Iterator[Ended]:
    """End *count* runs, *workers* at a time, and yield what came of each; figures may be *factor* off the bounds."""
    bounds, whole_s = uninterrupted(folder, 2 if repeats == 1 else 5, repeats)
    chance = random.Random(seed)
    wide = widened(bounds, factor)

    def one(index: int, moment: float) -> Ended:
        out = folder / f"run-{index}" / "run"
        out.parent.mkdir()
        subprocess.run(["cp", "-r", str(folder / "whole-0"), str(out)], check=True)
        return interrupted(out, SIGNALS[index % len(SIGNALS)], moment, repeats, wide)

    # Others at the same time make a run longer than it was alone.
    moments = [chance.uniform(1.0, whole_s * (1.0 if repeats > 1 else 1.5)) for _ in range(count)]
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, range(count), moments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, where there are cores for it")
    parser.add_argument("--results", type=Path)
    chosen = parser.parse_args()
    ended = []
    with tempfile.TemporaryDirectory() as folder:
        for one in run_all(Path(folder), chosen.count, chosen.seed, chosen.repeats, chosen.workers, 1.0):
            print(one, flush=True)
            ended.append(one)
            # Rewritten after every run: a session that ends early keeps what it measured.
            written = write("interrupts", judged(ended, chosen.seed), chosen.results)
    print(written)


def judged(ended: list[Ended], seed: int) -> list[dict[str, Any]]:
    """Return a case per signal."""
    cases = []
    for number in SIGNALS:
        own = [one for one in ended if one.signal == number.name]
        wrong = [one for one in own if one.wrong]
        lost = [one.lost_s for one in own if one.lost_s is not None]
        metrics: dict[str, Any] = {
            "runs": metric(len(own), "1"),
            "wrong": metric(len(wrong), "1"),
            "figures_printed": metric(sum(one.figures for one in own), "1"),
            "most_lost": metric(max(lost, default=0.0), "s"),
        }
        parameters = {"seed": seed, "stages": sorted({one.stage for one in own}), "pump_s": PERIOD_S}
        cases.append(case(number.name, parameters, metrics, not wrong, "; ".join(one.wrong for one in wrong)[:500]))
    return cases


if __name__ == "__main__":
    main()
