"""Boards of known truth: how often intervals of kernels and of the floor hold it, and how far values are from it.

python -m bench.coverage --boards 60

A board plays a run of operators of one and of several kernels, whose joules are known, and shows it through a counter
and sensors with their vices (tests/board.py). Classes: single (an operator of one kernel), main and minor (of an
operator of several, the heaviest and the others), never (in no replay). Rows of at least 2 % of the kernels' energy.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.result import case, metric, write
from llmkern.attribute.attribution import attribute
from tests.board import INT8, INT8_SMALL, MS, OPS, Board, Part, Sensor, Vices

TOKEN = {"int8": 56, "int8 small": 112, "gemv": 20, "softmax": 20, "norm": 300}
PREFILL = {"gemv": 200, "softmax": 300, "int8": 100, "norm": 100}
CAPPED = {"gemm": 200, "softmax": 100, "int8": 60, "norm": 100}
REPLAYED = ("int8", "int8 small", "gemv", "softmax")
# What the plan would take apart, but for the heaviest.
ALONE = tuple(("int8", part.name) for part in INT8 if part.name != "gemm s8")
ALONE += tuple(("int8 small", part.name) for part in INT8_SMALL if part.name != "gemm s8")
# What every board does; measured on H100s: rests scatter by 0.6 W, a prefill is some °C warmer than a token.
REAL = Vices(wander_w=0.6, thermal_c_per_w=0.02)
QUICK = "no replays (--quick)"
GAIN = "counter gain +3 %"
SCENARIOS: dict[str, dict[str, Any]] = {
    "base": {},
    "replay differs by 2 %": {"unlike": 0.02},
    "replay differs by 10 %": {"unlike": 0.10},
    "hard power cap": {
        "prefill": CAPPED,
        "replayed": (*REPLAYED, "gemm"),
        "vices": replace(REAL, clocks_mhz=(1620.0, 1500.0)),
    },
    "hot board": {"first_c": 50.0, "last_c": 58.0, "vices": replace(REAL, convex=0.03)},
    "host adds 2 W in gaps": {"vices": replace(REAL, gap_w=2.0)},
    "90 % gaps, host adds 3 W": {"host_s": 0.08, "vices": replace(REAL, gap_w=3.0)},
    "recorder lengthens by 0.5 us": {"vices": replace(REAL, stretch_s=0.5e-6)},
    "nothing alone": {"alone": ()},
    "replay with warm L2": {"vices": replace(REAL, replay_share={"gemv": 0.9, "int8": 0.95})},
    GAIN: {"sensor": Sensor(gain=1.03)},
    QUICK: {"replayed": (), "alone": ()},
}
LEAST = 0.02
WANTED = 0.9


def judged(seed: int, scenario: str) -> list[tuple[str, float, bool]]:
    """Return of each row of a board its class, its error (a share) and whether its interval holds the truth."""
    how = {"token": TOKEN, "prefill": PREFILL, "replayed": REPLAYED, "alone": ALONE, "vices": REAL}
    board = Board(seed=seed, **{**how, **SCENARIOS[scenario]})
    board.play()
    with tempfile.TemporaryDirectory() as folder:
        found = attribute(board.write(Path(folder) / "run"))
    rows: list[tuple[str, float, bool]] = []
    assert found.weighed is not None
    for phase, launches in (("prefill", board.prefill), ("decode", board.token)):
        account = found.accounts[phase]
        floor_w, kernel_j = account.floor_w, account.kernel_j
        assert floor_w is not None
        assert kernel_j is not None
        true_w = _floor_w(board, phase)
        rows.append((f"floor {phase}", floor_w.value / true_w - 1, _holds(floor_w.low, true_w, floor_w.high)))
        parts = {op: OPS[op].parts or (Part(op, 0, OPS[op].seconds, board.joule_of(op, phase)),) for op in launches}
        joules = {
            (op, part.name): launches[op] * (part.joule + true_w * part.seconds)
            for op in launches
            for part in parts[op]
        }
        all_j = sum(joules.values())
        rows.append((f"all kernels {phase}", kernel_j.value / all_j - 1, _holds(kernel_j.low, all_j, kernel_j.high)))
        for row in found.split(phase, ["op", "name"]).to_dict("records"):
            op, name = str(row["op"]), str(row["name"])
            truth_j = joules[op, name]
            if truth_j < LEAST * all_j:
                continue
            kind = "single" if op in board.replayed else "never"
            if len(parts[op]) > 1 and op in board.replayed:
                kind = "main" if name == max(parts[op], key=lambda part: part.joule).name else "minor"
            holds = _holds(row["low_j"], truth_j, row["high_j"])
            rows.append((f"{kind} {phase}", row["energy_j"] / truth_j - 1, holds))
    return rows


def _holds(low: float | None, truth: float, high: float | None) -> bool:
    return low is not None and high is not None and bool(low <= truth <= high)


def _floor_w(board: Board, phase: str) -> float:
    """Return the idle power at what the board's temperature was while *phase* was weighed."""
    windows = [m for m in board.ranges if (m["category"], m["pass"]) == ("window", "weigh")]
    own = [m for m in windows if (m["new_tokens"] == 1) == (phase == "prefill")]
    times = np.concatenate([np.arange(m["start_ns"], m["end_ns"], 20 * MS) for m in own])
    return float(board.floor_at(board.temperature_c(times)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=60)
    parser.add_argument("--scenario", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    cases: list[dict[str, Any]] = []
    with ProcessPoolExecutor(arguments.workers) as pool:
        for scenario in arguments.scenario:
            every: dict[str, list[tuple[float, bool]]] = defaultdict(list)
            for rows in pool.map(partial(judged, scenario=scenario), range(arguments.boards)):
                for name, error, held in rows:
                    every[name].append((error, held))
            for name, found in sorted(every.items()):
                errors = np.abs([error for error, _ in found])
                cover = float(np.mean([held for _, held in found]))
                metrics = {
                    "rows": metric(len(found), "1"),
                    "cover": metric(cover, "1"),
                    "median_error": metric(float(np.median(errors)), "1"),
                    "p95_error": metric(float(np.percentile(errors, 95)), "1"),
                }
                print(
                    f"{scenario:24s} {name:16s} {len(found):4d} rows, cover {cover:4.0%}, error median "
                    f"{np.median(errors):5.1%}, p95 {np.percentile(errors, 95):5.1%}",
                    flush=True,
                )
                # A gain is in truth's scale, not in doubt; what all kernels take together no row of a report says.
                bar = None if scenario == GAIN or name.startswith("all") else cover >= WANTED
                cases.append(case(f"{scenario}, {name}", {"boards": arguments.boards}, metrics, bar))
            write("coverage", cases, arguments.results)


if __name__ == "__main__":
    main()
