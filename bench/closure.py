"""Closure: idle floor and joules per launch from replays alone predict what the counter says of a run.

python -m bench.closure --model qwen-7b --precision bf16 int8 int4
python -m bench.closure --of RUN [RUN ...]

A workload is recorded, or taken as it was (--of). Its weighed windows are in no fit: predicted is floor x latency +
launches x joules per launch, kernels that were not replayed by length, blocks, bytes and FLOPs, and held against the
counter. A case is held where the error is within the limit; where the counter's own interval is wider than 3 %, there
were too few windows to judge, and the case says so.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from bench.attribution import recorded
from bench.result import case, metric, write
from bench.workload import loaded_at, rig_of
from llmkern.attribute.attribution import Attribution, attribute
from llmkern.record.device.choose import choose_device
from llmkern.record.options import TraceOptions
from llmkern.runfolder import RunFolder
from llmkern.text import signed

LIMITS = {"prefill": 0.05, "decode": 0.03}
# Wider the counter's own interval says too little to judge by.
WIDEST = 0.03


def cases_of(found: Attribution) -> list[dict[str, Any]]:
    """Return a case per phase of a run, printed as well."""
    options = found.run.facts.options
    workload = f"{options.precision} batch {options.batch}"
    parameters = {key: getattr(options, key) for key in ("model", "precision", "batch", "prompt_tokens", "new_tokens")}
    cases = []
    for phase, closure in found.closures.items():
        account = found.accounts[phase]
        energy, gap_j, kernel_j = account.weight.energy_j, account.gap_j, account.kernel_j
        assert energy is not None
        assert gap_j is not None
        assert kernel_j is not None
        error = closure.error
        metrics = {
            "counter": metric(energy, "J"),
            "predicted": metric(closure.energy_j, "J"),
            "guessed": metric(closure.guessed_share, "1"),
            "error": metric(error, "1"),
            "mean_power": metric(account.mean_w or 0.0, "W"),
        }
        passed = bool(abs(error.value) <= LIMITS[phase])
        notes = [] if passed else [f"above {LIMITS[phase]:.0%}"]
        if kernel_j.low is not None and kernel_j.high is not None:
            width = (kernel_j.high - kernel_j.low) / 2 / kernel_j.value
            metrics["kernels_half_interval"] = metric(width, "1")
            notes += [f"the counter leaves the kernels' joules open to {width:.0%}"] if width > WIDEST else []
        print(f"{workload:14s} {phase:8s} {signed(error)}, {closure.guessed_share:.1%} guessed", flush=True)
        cases.append(case(f"{workload} {phase}", parameters, metrics, passed, "; ".join(notes)))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precision", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workload", type=int, nargs=3, default=[8, 384, 24], help="batch, prompt tokens, new tokens")
    parser.add_argument("--of", type=Path, nargs="+", help="run folders that are there already")
    parser.add_argument("--runs", type=Path, help="keep the recorded runs in this folder")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    cases: list[dict[str, Any]] = []
    if arguments.of:
        runs = [attribute(RunFolder(path)) for path in arguments.of]
        for found in runs:
            cases += cases_of(found)
        write("closure-runs", cases, arguments.results, gpu=runs[0].run.facts.device.name)
        return
    device = choose_device(arguments.device)
    batch, prompt_tokens, new_tokens = arguments.workload
    for precision in arguments.precision:
        loaded = loaded_at(arguments.model, precision, device)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            options = TraceOptions(
                arguments.model,
                precision=precision,
                batch=batch,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                warmup=2,
                repeats=10,
                trace_repeats=1,
            )
            path = (arguments.runs or Path(folder)) / precision
            cases += cases_of(attribute(recorded(rig_of(device, loaded, options, path, tuple(device.meters())))))
        del loaded
        write("closure", cases, arguments.results)


if __name__ == "__main__":
    main()
