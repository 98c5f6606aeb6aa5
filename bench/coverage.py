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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.result import case, metric, write
from llmkern.attribute.attribution import attribute
from tests.board import INT8, INT8_SMALL, OPS, Board, Sensor

TOKEN = {"int8": 56, "int8 small": 112, "gemv": 20, "softmax": 20, "norm": 300}
PREFILL = {"gemv": 200, "softmax": 300, "int8": 100, "norm": 100}
REPLAYED = ("int8", "int8 small", "gemv", "softmax")
# What the plan would take apart, but for the heaviest.
ALONE = tuple(("int8", part.name) for part in INT8 if part.name != "gemm s8")
ALONE += tuple(("int8 small", part.name) for part in INT8_SMALL if part.name != "gemm s8")
SCENARIOS: dict[str, dict[str, Any]] = {
    "base": {},
    "replay differs by 2 %": {"unlike": 0.02},
    "replay differs by 10 %": {"unlike": 0.10},
    "hot board": {"first_c": 50.0, "last_c": 58.0},
    "nothing alone": {"alone": ()},
    "counter gain +3 %": {"sensor": Sensor(gain=1.03)},
}
LEAST = 0.02
WANTED = 0.9


def judged(seed: int, scenario: str) -> list[tuple[str, float, bool]]:
    """Return of each row of a board its class, its error (a share) and whether its interval holds the truth."""
    how = {"token": TOKEN, "prefill": PREFILL, "replayed": REPLAYED, "alone": ALONE, **SCENARIOS[scenario]}
    board = Board(seed=seed, **how)
    board.play()
    with tempfile.TemporaryDirectory() as folder:
        found = attribute(board.write(Path(folder) / "run"))
    rows: list[tuple[str, float, bool]] = []
    for phase, launches in (("prefill", PREFILL), ("decode", TOKEN)):
        account = found.accounts[phase]
        floor_w = account.floor_w
        assert floor_w is not None
        celsius = found.weighed.temperature_of(phase) if found.weighed is not None else None
        true_w = board.floor_w + board.slope_w_per_c * ((celsius or board.first_c) - board.first_c)
        assert floor_w.low is not None
        assert floor_w.high is not None
        rows.append((f"floor {phase}", floor_w.value / true_w - 1, floor_w.low <= true_w <= floor_w.high))
        for row in found.split(phase, ["op", "name"]).to_dict("records"):
            op, name = str(row["op"]), str(row["name"])
            parts = {part.name: part for part in OPS[op].parts}
            joule = parts[name].joule if parts else OPS[op].joule
            truth_j = launches[op] * joule + true_w * row["duration_ns"] / 1e9
            if account.kernel_j is None or truth_j < LEAST * account.kernel_j.value:
                continue
            kind = "never" if op not in REPLAYED else "single"
            if parts:
                kind = "main" if joule == max(part.joule for part in parts.values()) else "minor"
            holds = bool(row["low_j"] <= truth_j <= row["high_j"])
            rows.append((f"{kind} {phase}", row["energy_j"] / truth_j - 1, holds))
    return rows


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
                # A gain is in truth's scale, not in doubt.
                bar = None if "gain" in scenario else cover >= WANTED
                cases.append(case(f"{scenario}, {name}", {"boards": arguments.boards}, metrics, bar))
            write("coverage", cases, arguments.results)


if __name__ == "__main__":
    main()
