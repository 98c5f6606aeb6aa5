"""Held-out closure: joules per launch from replays and one workload predict the counter on another.

python -m bench.closure --model qwen-7b --precision fp32 bf16 int8 int4

The first workload is recorded and weighed; of the second (another batch, prompt length and number of tokens) only the
replays of its operators are used. Predicted: floor x latency + launches x joules per launch, operators that neither
replayed by bytes, FLOPs and time. Held against what the counter said of the second.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.attribution import recorded
from bench.result import case, metric, write
from bench.workload import loaded_at, rig_of
from llmkern.attribute.attribution import Attribution, attribute
from llmkern.attribute.split.estimator import Marginals, estimate_marginals
from llmkern.record.device.choose import choose_device
from llmkern.record.options import TraceOptions
from llmkern.text import with_interval

LIMITS = {"prefill": 0.05, "decode": 0.03}


def held_out(known: Attribution, other: Attribution) -> Marginals:
    """Return the joules per launch from all of *known* and from the replays of *other*, its weighed phases left out."""
    assert known.evidence is not None
    assert other.evidence is not None
    windows = known.evidence.windows + [
        replace(w, name=f"other {w.name}") for w in other.evidence.windows if not w.context
    ]
    features = {**other.evidence.features, **known.evidence.features}
    return estimate_marginals(windows, features, doubt=known.evidence.doubt, most_w=known.evidence.most_w)


def predicted_j(marginals: Marginals, other: Attribution, phase: str) -> tuple[float, float]:
    """Return the J per unit of *phase* in *other*, and how many of them are of operators that nobody replayed."""
    assert other.evidence is not None
    account = other.accounts[phase]
    assert account.floor_w is not None
    total_j, guessed_j = account.floor_w.value * account.weight.latency_s.value, 0.0
    for name, launches in other.evidence.steps[phase]["launches"].items():
        if str(name) in marginals.unknowns.names:
            total_j += launches * marginals.per_launch(str(name), phase, account.mean_w or 0.0).value
        else:
            guessed_j += launches * marginals.guess_j(other.evidence.features[str(name)])
    return total_j + guessed_j, guessed_j


def compare(precision: str, known: Attribution, other: Attribution, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a case per phase, printed as well."""
    marginals = held_out(known, other)
    cases = []
    for phase, account in other.accounts.items():
        energy = account.weight.energy_j
        assert energy is not None
        value_j, guessed_j = predicted_j(marginals, other, phase)
        error = value_j / energy.value - 1
        metrics = {
            "counter": metric(energy, "J"),
            "predicted": metric(value_j, "J"),
            "guessed": metric(guessed_j, "J"),
            "error": metric(error, "1"),
            "mean_power": metric(account.mean_w or 0.0, "W"),
        }
        passed = bool(abs(error) <= LIMITS[phase])
        print(
            f"{precision:5s} {phase:8s} counter {with_interval(energy, 'J')}  predicted "
            f"{value_j:8.3f} J ({guessed_j:.3f} J guessed)  {error:+6.1%}",
            flush=True,
        )
        note = "" if passed else f"above {LIMITS[phase]:.0%}"
        cases.append(case(f"{precision} {phase}", parameters, metrics, passed, note))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--known", type=int, nargs=3, default=[1, 512, 32], help="batch, prompt tokens, new tokens")
    parser.add_argument("--other", type=int, nargs=3, default=[8, 384, 24], help="the same of the workload held out")
    parser.add_argument("--runs", type=Path, help="keep the recorded runs in this folder")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    parameters = {k: getattr(arguments, k) for k in ("model", "known", "other")}
    cases: list[dict[str, Any]] = []
    for precision in arguments.precision:
        loaded = loaded_at(arguments.model, precision, device)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            found = []
            for name, (batch, prompt_tokens, new_tokens) in (("known", arguments.known), ("other", arguments.other)):
                options = TraceOptions(
                    arguments.model,
                    precision=precision,
                    batch=batch,
                    prompt_tokens=prompt_tokens,
                    new_tokens=new_tokens,
                    warmup=2,
                    repeats=6,
                    trace_repeats=1,
                )
                path = (arguments.runs or Path(folder)) / f"{precision}-{name}"
                found.append(attribute(recorded(rig_of(device, loaded, options, path, tuple(device.meters())))))
        del loaded
        cases += compare(precision, found[0], found[1], parameters)
        write("closure", cases, arguments.results)


if __name__ == "__main__":
    main()
