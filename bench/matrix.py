"""The study's matrix by the main command: one model at the five precisions, and int8 with and without outliers.

python -m bench.matrix --model qwen-7b --runs DIR
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.result import case, metric, write
from llmkern.attribute.attribution import Attribution, attribute
from llmkern.estimate import ratio
from llmkern.runfolder import RunFolder

# What the study's finding rests on comes first, should the machine be taken away.
CONFIGURATIONS: dict[str, list[str]] = {
    "fp32": ["--precision", "fp32"],
    "int8": ["--precision", "int8"],
    "bf16": ["--precision", "bf16"],
    "int8 without outliers": ["--precision", "int8", "--outliers", "0"],
    "int4": ["--precision", "int4"],
    "fp16": ["--precision", "fp16"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the run folders and reports")
    parser.add_argument("--only", nargs="*", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--results", type=Path)
    parser.add_argument("rest", nargs="*", help="more options of llmkern.trace, after --")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Attribution] = {}
    cases = []
    for name in arguments.only:
        folder = arguments.runs / f"{arguments.model}-{name.replace(' ', '-')}"
        command = [
            *(sys.executable, "-m", "llmkern.trace", "--model", arguments.model, *CONFIGURATIONS[name]),
            *("--out", str(folder), "--force", "--quick", *arguments.rest),
        ]
        started_s = time.monotonic()
        with open(folder.with_suffix(".txt"), "w") as report:
            done = subprocess.run(command, stdout=report, stderr=subprocess.PIPE, text=True, check=False)
        wall_s = time.monotonic() - started_s
        if done.returncode:
            cases.append(case(name, {"command": command[1:]}, {}, False, done.stderr.strip()[-500:]))
            print(f"{name}: {done.stderr.strip()[-500:]}", flush=True)
            continue
        found[name] = attribute(RunFolder(folder))
        cases.append(_case(name, arguments.model, found[name], wall_s, RunFolder(folder)))
        print(folder.with_suffix(".txt").read_text(), flush=True)
        # Rewritten after every run: a session that ends early keeps what it measured.
        write("matrix", cases + _ratios(found), arguments.results)
    print(write("matrix", cases + _ratios(found), arguments.results))


def _case(name: str, model: str, found: Attribution, wall_s: float, run: RunFolder) -> dict[str, Any]:
    metrics: dict[str, Any] = {"command_to_report_s": metric(wall_s, "s")}
    for phase, account in found.accounts.items():
        weight = account.weight
        metrics[f"{phase}_latency"] = metric(weight.latency_s, "s")
        metrics[f"{phase}_launches"] = metric(account.launches, "1")
        metrics[f"{phase}_busy_share"] = metric(account.busy_share, "1")
        if account.recorder_effect is not None:
            metrics[f"{phase}_recorder_effect"] = metric(account.recorder_effect, "1")
        by_ranges = weight.latency_by_ranges_s.value / weight.latency_s.value - 1
        metrics[f"{phase}_latency_ranges_vs_difference"] = metric(by_ranges, "1")
        if weight.energy_j is not None and account.kernel_j is not None and account.gap_j is not None:
            metrics[f"{phase}_energy"] = metric(weight.energy_j, "J")
            metrics[f"{phase}_kernel_energy"] = metric(account.kernel_j, "J")
            metrics[f"{phase}_gap_energy"] = metric(account.gap_j, "J")
            metrics[f"{phase}_named_energy"] = metric(_named(found, phase), "1")
            if weight.energy_by_ranges_j is not None:
                value = weight.energy_by_ranges_j.value / weight.energy_j.value - 1
                metrics[f"{phase}_energy_ranges_vs_difference"] = metric(value, "1")
    weighed = found.weighed
    if weighed is not None and weighed.counter_j and weighed.residual_j is not None and weighed.floor is not None:
        metrics["books_residual"] = metric(weighed.residual_j / weighed.counter_j, "1")
        metrics["floor"] = metric(weighed.floor.at(weighed.temperature_c), "W")
        metrics["temperature"] = metric(weighed.temperature_c or 0.0, "°C")
        if weighed.samples_j is not None:
            metrics["samples_vs_counter"] = metric(weighed.samples_j / weighed.counter_j - 1, "1")
    dropped = sum(recorder.lost for recorder in run.facts.recorders.values())
    metrics["dropped_records"] = metric(dropped, "1")
    facts = run.facts
    if facts.model is not None and facts.model.build_s is not None:
        metrics["model_build"] = metric(facts.model.build_s, "s")
    kept = ("precision", "batch", "new_tokens", "outliers", "repeats", "seed")
    parameters: dict[str, Any] = {k: getattr(facts.options, k) for k in kept}
    parameters |= {"model": model, "prompt_tokens": facts.prompts.tokens if facts.prompts is not None else None}
    parameters["plan"] = asdict(facts.plan) if facts.plan is not None else None
    return case(name, parameters, metrics, dropped == 0)


def _named(found: Attribution, phase: str) -> float:
    """Return the share of the phase's energy whose kernel has a kind, or whose gap has a cause."""
    energy = found.accounts[phase].weight.energy_j
    assert energy is not None
    kernels, gaps = found.split(phase, ["kind"]), found.split_gaps(phase, ["cause"])
    named_j = kernels.loc[kernels["kind"].astype(str) != "other", "energy_j"].sum()
    named_j += gaps.loc[gaps["cause"].astype(str) != "unknown", "energy_j"].sum()
    # What the books leave over has no name either, on whichever side it is.
    return float(1 - abs(1 - named_j / energy.value))


def _ratios(found: dict[str, Attribution]) -> list[dict[str, Any]]:
    """Return energy and latency per decoded token against fp32 and of int8 with against without outliers."""
    cases = []
    pairs = [(name, "fp32") for name in found if name != "fp32"] + [("int8", "int8 without outliers")]
    for name, base in pairs:
        if name not in found or base not in found:
            continue
        a, b = (found[n].accounts["decode"].weight for n in (name, base))
        metrics = {"decode_latency_ratio": metric(ratio(a.latency_samples_s, b.latency_samples_s), "1")}
        known = [[e for e in weight.energy_samples_j if e == e] for weight in (a, b)]
        if all(known):
            metrics["decode_energy_ratio"] = metric(ratio(*known), "1")
        cases.append(case(f"{name} / {base}", {}, metrics, None))
    return cases


if __name__ == "__main__":
    main()
