"""Kinds of kernels by joules, with a joule per launch of each kernel and, as it was once, by duration within operators.

python -m bench.split --of RUN

Both splits have the same joules for each operator; by duration its kernels share them as if all drew the same power.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from bench.result import case, metric, write
from llmkern.attribute.attribution import Attribution, attribute
from llmkern.attribute.split.kernel_joules import MarginalJoules
from llmkern.estimate import Estimate
from llmkern.runfolder import RunFolder
from llmkern.text import with_interval

# Of an energy below this share of the phase's kernels nothing is told.
LEAST = 0.002


def by_duration(found: Attribution, phase: str) -> pd.Series:
    """Return the joules above the floor of each kind when those of each operator go to its kernels by duration."""
    joules = found.accounts[phase].joules
    assert isinstance(joules, MarginalJoules)
    rows = found.kernels_of(phase)
    rows = rows.assign(dynamic_j=joules.dynamic(rows), signature=rows["signature"].astype(object))
    of_op = rows.groupby("signature")[["dynamic_j", "duration_ns"]].transform("sum")
    shared = of_op["dynamic_j"] * rows["duration_ns"] / of_op["duration_ns"].clip(lower=1.0)
    kinds: pd.Series = shared.groupby(rows["kind"].astype(object)).sum()
    return kinds


def cases_of(found: Attribution) -> list[dict[str, Any]]:
    """Return a case per phase and kind, printed as well."""
    facts = found.run.facts
    options = {
        key: getattr(facts.options, key) for key in ("model", "precision", "batch", "prompt_tokens", "new_tokens")
    }
    cases = []
    for phase, account in found.accounts.items():
        old = by_duration(found, phase)
        parameters = {**options, "recorded": facts.started, "unit": account.unit}
        frame, draws = found.drawn(phase, ["kind"])
        assert draws is not None
        total_j = account.kernel_j.value if account.kernel_j is not None else 0.0
        for i, row in enumerate(frame.to_dict("records")):
            if row["energy_j"] < LEAST * total_j:
                continue
            dynamic = Estimate.of(row["dynamic_j"], draws[i] - row["floor_j"])
            old_j = float(old[row["kind"]])
            metrics = {
                "launches": metric(row["launches"], "1"),
                "time": metric(row["duration_ns"] / 1e9, "s"),
                "dynamic": metric(dynamic, "J"),
                "dynamic_by_duration": metric(old_j, "J"),
                "times": metric(old_j / max(row["dynamic_j"], 1e-12), "1"),
            }
            print(
                f"{phase:8s} {row['kind']:12s} {with_interval(dynamic, 'J'):30s} by duration {old_j:9.4f} J", flush=True
            )
            cases.append(case(f"{phase} {row['kind']}", parameters, metrics, None))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", type=Path, required=True, help="a run folder with replays")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    found = attribute(RunFolder(arguments.of))
    write("split", cases_of(found), arguments.results, gpu=found.run.facts.device.name)


if __name__ == "__main__":
    main()
