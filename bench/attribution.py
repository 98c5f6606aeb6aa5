"""Planted work: known work inserted into a generation, its joules by the counter and by the attribution.

python -m bench.attribution --model qwen-7b --precision bf16 int8

One run is recorded with every plant in it, each behind layers of its own. Estimate: what the account of that run says
of exactly that operator, kernel or gap; it knows nothing of the truth windows. Truth: windows of the generation with
one plant behind every layer and without any, in random order; the counter's energy above the idle floor, with minus
without, per call. In a prefill, where the power cap may hold, with all as they were recorded and without one. Of a
gap (a host that sleeps or thinks) it is the energy of its time: the counter less the floor of the time outside it. Of
the minor kernels of one operator it is the slope over how many of them it launches, of its main kernel the rest. Held:
the interval of their difference holds zero. A case whose truth is not known to a tenth is none. Beside it what two
common ways to attribute say of the same run: every kernel at equal power, and NVML's instant power (field 186) times
the kernel's duration.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.planted import CATEGORY, CPU_PLANTS, GPU_PLANTS, IDLE_PLANTS, Plant, Planted, Work, growing, signatures_of
from bench.result import case, metric, write
from bench.truth import slope, truths
from bench.workload import loaded_at, published, rig_of
from llmkern.attribute.attribution import Attribution, attribute
from llmkern.attribute.split.account import PhaseAccount
from llmkern.attribute.split.kernel_joules import MarginalJoules
from llmkern.estimate import Estimate
from llmkern.record.device.choose import choose_device
from llmkern.record.device.interface import Device
from llmkern.record.options import TraceOptions
from llmkern.record.rig import Rig
from llmkern.runfolder import RunFolder
from llmkern.session import keep_replays, record
from llmkern.text import with_interval

# Of a plant of one kernel or of none, of the main kernel of several, of the others, of several together, and of what
# was not replayed.
LIMITS = {"single": 0.08, "main": 0.05, "minor": 0.30, "several": math.inf, "never": math.inf}
# Better than this the truth has to be known.
TRUTH_DOUBT = 0.10
NEW_TOKENS = 33
# In a truth window a plant runs so often that a step takes about so much more.
TRUTH_J, MOST_AGAIN = 4.0, 40


@dataclass(frozen=True)
class Guess:
    """The J of one planted call (or kernel): by the account, by equal power and by instant power."""

    name: str
    kind: str
    account: Estimate
    equal_power: float
    instant_power: float


def recorded(rig: Rig) -> RunFolder:
    """Record all passes of *rig*; what is replayed is cached for the cases to come."""
    record(rig)
    run = RunFolder(published(rig))
    keep_replays(run)
    return run


class Guesses:
    """What the account of *run* says of what was *planted* in it."""

    def __init__(self, run: RunFolder, planted: list[tuple[Planted, Work]]) -> None:
        self._run, self._found, self._equal = run, attribute(run), attribute(run, equal_power=True)
        self._signatures = {p.plant.name: signatures_of(work) for p, work in planted}

    def of(self, planted: Planted) -> list[Guess]:
        """Return what it says of one call, or of the main and one minor kernel of a call."""
        plant = planted.plant
        account = self._found.accounts[plant.phase]
        assert account.floor_w is not None
        if plant.is_gap:
            return [self._of_gap(planted, account)]
        kernels = self._found.kernels[self._found.kernels["phase"] == plant.phase]
        own = self._own(plant, kernels)
        if plant.series is None:
            replayed = set(self._found.marginals.replayed) if self._found.marginals is not None else set()
            seen = own["kernel_class"].astype(str).isin(replayed).mean() > 0.5
            kind = "never" if not seen else "single" if own["name"].nunique() == 1 else "several"
            return [self._of_kernels(plant.name, kind, account, kernels, own, planted.calls_per_step)]
        minor = own["name"].astype(str).str.contains(plant.series.minor)
        calls, casts = planted.calls_per_step, plant.series.recorded
        return [
            self._of_kernels(f"{plant.name}: the product", "main", account, kernels, own[~minor], calls),
            self._of_kernels(f"{plant.name}: a cast", "minor", account, kernels, own[minor], calls * casts),
        ]

    def _own(self, plant: Plant, kernels: pd.DataFrame) -> pd.DataFrame:
        if not plant.kernel:
            return kernels[kernels["signature"].isin(list(self._signatures[plant.name]))]
        others = {s for name, found in self._signatures.items() if name != plant.name for s in found}
        return kernels[kernels["name"].astype(str).str.contains(plant.kernel) & ~kernels["signature"].isin(others)]

    def _of_gap(self, planted: Planted, account: PhaseAccount) -> Guess:
        plant = planted.plant
        seconds = _planted_gap_s(self._run, self._found, plant) / planted.calls_per_step
        assert account.floor_w is not None
        watts = account.floor_w if account.host_adds_w is None else account.floor_w + account.host_adds_w
        by_instant = _instant_w(self._run, plant.phase) * seconds
        return Guess(plant.name, "single", watts.scaled(seconds), account.floor_w.value * seconds, by_instant)

    def _of_kernels(
        self, name: str, kind: str, account: PhaseAccount, kernels: pd.DataFrame, own: pd.DataFrame, calls: int
    ) -> Guess:
        joules = account.joules
        assert isinstance(joules, MarginalJoules)
        assert account.floor_w is not None
        launches = (own.groupby("kernel_class", observed=True)["launches"].sum() / calls).to_dict()
        counts = np.array([float(launches.get(found, 0.0)) for found in joules.classes])
        by_account = Estimate.of(float(joules.launch_j @ counts), joules.launch_draws_j @ counts)
        own_s, all_s = (float(rows["duration_ns"].sum()) / 1e9 for rows in (own, kernels))
        equal = self._equal.accounts[account.phase]
        assert equal.kernel_j is not None
        dynamic_j = equal.kernel_j.value - account.floor_w.value * equal.busy_s
        above_w = _instant_w(self._run, account.phase) - account.floor_w.value
        return Guess(name, kind, by_account, dynamic_j * own_s / all_s / calls, above_w * own_s / calls)


def _instant_w(run: RunFolder, phase: str) -> float:
    """Return the mean of NVML's instant power over the weigh windows of *phase*; NaN without that field."""
    ranges, power = run.table("ranges"), run.table("power")
    windows = ranges[(ranges["category"] == "window") & (ranges["pass"] == "weigh")]
    windows = windows[(windows["new_tokens"] == 1) == (phase == "prefill")]
    readings = power[power["sensor"] == "instant"]
    times = readings["timestamp_ns"].to_numpy()
    inside = np.zeros(len(times), bool)
    for start_ns, end_ns in windows[["start_ns", "end_ns"]].itertuples(index=False):
        inside |= (times >= start_ns) & (times <= end_ns)
    watts = readings["power_mw"].to_numpy(float)[inside] / 1e3
    return float(np.nanmean(watts)) if len(watts) else float("nan")


def _planted_gap_s(run: RunFolder, found: Attribution, plant: Plant) -> float:
    """Return the time per unit of its phase in which the device was idle and the host in *plant*."""
    ranges = run.table("ranges")
    own = (ranges["category"] == CATEGORY) & (ranges["pass"] == "time") & (ranges["name"] == plant.name)
    planted = ranges[own].sort_values("start_ns")
    gaps = found.timeline.gaps[found.timeline.gaps["phase"] == plant.phase].sort_values("start_ns")
    start, end = planted["start_ns"].to_numpy(), planted["end_ns"].to_numpy()
    idle_ns = 0.0
    for begin_ns, duration_ns in zip(gaps["start_ns"], gaps["duration_ns"], strict=True):
        first = int(np.searchsorted(end, begin_ns))
        while first < len(start) and start[first] < begin_ns + duration_ns:
            idle_ns += max(0.0, min(end[first], begin_ns + duration_ns) - max(start[first], begin_ns))
            first += 1
    phases = found.timeline.phases
    return idle_ns / 1e9 / int(phases.loc[phases["phase"] == plant.phase, "tokens"].sum())


def compare(guessed: Guess, known: Estimate, phase: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the case of one plant, or of a kernel of it, printed as well."""
    error = guessed.account.value / known.value - 1
    off = guessed.account - known.of_another_run()
    held = off.low is not None and off.high is not None and off.low <= 0 <= off.high
    doubt = math.inf if known.low is None or known.high is None else (known.high - known.low) / 2 / abs(known.value)
    metrics = {
        "truth": metric(known, "J"),
        "estimate": metric(guessed.account, "J"),
        "error": metric(error, "1"),
        "held": metric(float(held), "1"),
        "error_by_equal_power": metric(guessed.equal_power / known.value - 1, "1"),
        "error_by_instant_power": metric(guessed.instant_power / known.value - 1, "1"),
    }
    limit = LIMITS[guessed.kind]
    passed: bool | None = bool(abs(error) <= limit)
    note = "" if passed else f"above {limit:.0%}"
    if doubt > TRUTH_DOUBT:
        passed, note = None, f"no case: the truth is known to {doubt:.0%} only"
    print(
        f"{guessed.name:44s} counter {with_interval(known, 'J')}  account {with_interval(guessed.account, 'J')}  "
        f"{error:+6.1%} {'held' if held else 'OUT '}  equal power {guessed.equal_power / known.value - 1:+6.1%}  "
        f"instant power {guessed.instant_power / known.value - 1:+6.1%}  {note}",
        flush=True,
    )
    return case(guessed.name, {**parameters, "phase": phase, "kind": guessed.kind}, metrics, passed, note)


def _known(
    rig: Rig, guesses: dict[str, list[Guess]], planted: list[tuple[Planted, Work]], rounds: int
) -> list[Estimate]:
    """Return the truth of each of *guesses*, in their order."""
    found: dict[str, Estimate] = {}
    decode, prefill = ([p for p, _ in planted if p.plant.phase == phase] for phase in ("decode", "prefill"))
    alone: dict[str, Planted] = {}
    for own, work in planted:
        plant, works = own.plant, {own.plant.name: work}
        if own not in decode:
            continue
        if plant.series is not None:
            make, device = plant.series.make, next(rig.model.parameters()).device
            works = {f"{plant.name} {count}": make(device, count) for count in plant.series.counts}
        step_j = Planted(rig.model, plant, work, None).calls_per_step * guesses[plant.name][0].account.value
        # A host that waits again has nothing left to wait for.
        again = 1 if plant.is_gap else int(np.clip(math.ceil(TRUTH_J / max(step_j, 1e-6)), 1, MOST_AGAIN))
        alone |= {name: Planted(rig.model, plant, one, None, again=again) for name, one in works.items()}
    if alone:
        found |= truths(rig, alone, NEW_TOKENS, rounds)
    if prefill:
        # What they take depends on the power that all of them draw together: each is taken away from all.
        quiet = {p.plant.name: p.quiet() for p in prefill}
        found |= truths(rig, quiet, 1, rounds, taken_away=True)
    result: list[Estimate] = []
    for own, _ in planted:
        series = own.plant.series
        if series is None:
            result.append(found[own.plant.name])
        else:
            calls = [(count, found[f"{own.plant.name} {count}"]) for count in series.counts]
            result += slope(calls, series.recorded)
    return result


def judged(device: Device, plants: list[Plant], arguments: argparse.Namespace, precision: str) -> list[dict[str, Any]]:
    """Record one run at *precision* with *plants* in it, and return a case of each."""
    options = TraceOptions(
        arguments.model,
        precision=precision,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=NEW_TOKENS,
        warmup=2,
        repeats=arguments.repeats,
        trace_repeats=1,
    )
    parameters = {"model": arguments.model, "precision": precision, "prompt_tokens": arguments.prompt_tokens}
    with tempfile.TemporaryDirectory() as folder:
        # What the user has cached is left alone.
        os.environ["XDG_CACHE_HOME"] = folder
        loaded = loaded_at(arguments.model, precision, device)
        rig = rig_of(
            device, loaded, options, (arguments.runs or Path(folder)) / f"planted-{precision}", tuple(device.meters())
        )
        planted: list[tuple[Planted, Work]] = []
        for phase in ("decode", "prefill"):
            own = [plant for plant in plants if plant.phase == phase]
            for index, plant in enumerate(own):
                work = plant.make(device.torch_device)
                turn = (index, len(own))
                planted.append((Planted(loaded.model, plant, work, rig.annotator, turn=turn), work))
        with growing(one for one, _ in planted):
            run = recorded(rig)
        told = Guesses(run, planted)
        guesses = {one.plant.name: told.of(one) for one, _ in planted}
        for guess in (guess for found in guesses.values() for guess in found):
            print(f"account: {guess.name} {with_interval(guess.account, 'J')}", flush=True)
        with rig.metered():
            time.sleep(0.5)
            known = _known(rig, guesses, planted, arguments.rounds)
        rig.annotator.drain()
    flat = [(guess, one.plant.phase) for one, _ in planted for guess in guesses[one.plant.name]]
    return [compare(guess, truth, phase, parameters) for (guess, phase), truth in zip(flat, known, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precision", nargs="+", default=["bf16", "int8"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6, help="windows of each plant")
    parser.add_argument("--runs", type=Path, help="keep the recorded runs in this folder")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    cases: list[dict[str, Any]] = []
    for precision in arguments.precision:
        plants = CPU_PLANTS if device.capability() is None else IDLE_PLANTS if precision == "int8" else GPU_PLANTS
        cases += judged(device, plants, arguments, precision)
        write("attribution", cases, arguments.results)


if __name__ == "__main__":
    main()
