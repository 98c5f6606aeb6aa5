"""Planted work: known work inserted into a generation, its joules by the counter and by the attribution.

python -m bench.attribution --model qwen-7b --precision bf16

Truth: windows of the generation with and without the planted work in random order; the counter's energy above the idle
floor, with minus without, per call. Of a gap (a host that sleeps or thinks) it is the energy of its time: the counter
less the floor of the time outside it. Estimate: what the account of one recorded run with the work says of exactly that
operator or gap; it knows nothing of the truth windows. Beside it what two common ways to attribute say of the same run:
every kernel at equal power, and NVML's instant power (field 186) times the kernel's duration.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.planted import CATEGORY, CPU_PLANTS, GPU_PLANTS, Plant, Planted, Work, signatures_of
from bench.result import case, metric, write
from bench.workload import loaded_at, published, rig_of
from llmkern.attribute.attribution import Attribution, attribute
from llmkern.attribute.energy.counter import EnergyCurve
from llmkern.attribute.energy.floor import Floor, mean_temperature, measure_floor
from llmkern.attribute.split.kernel_joules import MarginalJoules
from llmkern.estimate import Estimate, from_samples
from llmkern.record.device.choose import choose_device
from llmkern.record.options import TraceOptions
from llmkern.record.passes.weigh import IDLE_WINDOW_S
from llmkern.record.rig import RARE_TICK_S, Rig
from llmkern.runfolder import RunFolder
from llmkern.session import keep_replays, record
from llmkern.text import with_interval

ERROR_LIMIT = 0.08
NEW_TOKENS = 33
WINDOW_S = 2.0


@dataclass(frozen=True)
class Guess:
    """The J of one planted call: by the account, by equal power and by instant power."""

    account: Estimate
    equal_power: float
    instant_power: float


class Counter:
    """The counter and temperatures of the first meter, collected window by window."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._energy: list[pd.DataFrame] = []
        self._power: list[pd.DataFrame] = []

    def _drain(self) -> None:
        rows = self._rig.meters[0].drain()
        plain = {
            table: pd.DataFrame({k: getattr(v, "to_pandas", lambda v=v: v)() for k, v in columns.items()})
            for table, columns in rows.items()
        }
        self._energy.append(plain["energy"])
        if "power" in plain:
            self._power.append(plain["power"])

    def window(self, work: Callable[[], object], seconds: float) -> tuple[int, int, int]:
        """Repeat *work* for *seconds* between ticks; return the start and end in ns, and how often it ran."""
        self._rig.wait_for_ticks(1)
        start_ns = time.time_ns()
        count = 0
        while time.time_ns() - start_ns < seconds * 1e9:
            work()
            count += 1
        end_ns = time.time_ns()
        self._rig.wait_for_ticks(2)
        self._drain()
        return start_ns, end_ns, count

    def curve(self) -> EnergyCurve:
        energy = pd.concat(self._energy)
        return EnergyCurve(energy["timestamp_ns"].to_numpy(), energy["energy_mj"].to_numpy())

    def temperature(self) -> pd.DataFrame:
        if not self._power:
            return pd.DataFrame({"timestamp_ns": [], "temperature_c": []})
        return pd.concat(self._power)[["timestamp_ns", "temperature_c"]].dropna().sort_values("timestamp_ns")


def truth(rig: Rig, plant: Plant, work: Work, rounds: int) -> Estimate:
    """Return the J of one planted call by the counter: above the floor, or of a gap all of them."""
    counter = Counter(rig)
    new_tokens = NEW_TOKENS if plant.phase == "decode" else 1
    idle, spans = [], []

    def rest() -> None:
        rig.pace(0.0)
        start_ns, end_ns, _ = counter.window(lambda: time.sleep(0.05), IDLE_WINDOW_S)
        idle.append({"start_ns": start_ns, "end_ns": end_ns})
        rig.pace(RARE_TICK_S)

    rest()
    shuffled = random.Random(plant.name)
    order = [with_ for _ in range(rounds) for with_ in shuffled.sample([True, False], 2)]
    steps = max(1, new_tokens - 1)
    planted = Planted(rig.model, plant, work, None)
    for with_ in order:
        planted.seconds = 0.0
        with planted.growing() if with_ else nullcontext():
            span = counter.window(lambda: rig.generation(new_tokens), WINDOW_S)
        spans.append((with_, planted.seconds if plant.is_gap else 0.0, *span))
    rest()
    curve, temperature = counter.curve(), counter.temperature()
    floor = measure_floor(curve, pd.DataFrame(idle), temperature)
    assert floor is not None
    per_run: dict[bool, list[float]] = {True: [], False: []}
    for with_, planted_s, start_ns, end_ns, count in spans:
        above_j = _above_floor_j(curve, floor, temperature, start_ns, end_ns, planted_s)
        per_run[with_].append(above_j / count)
    differences = np.array(per_run[True]) - np.array(per_run[False])
    return from_samples((differences / planted.calls_per_step / steps).tolist())


def _above_floor_j(
    curve: EnergyCurve, floor: Floor, temperature: pd.DataFrame, start_ns: int, end_ns: int, planted_s: float
) -> float:
    """Return the J between the ticks around a window less the floor of all of it but *planted_s*."""
    framed = curve.window(start_ns, end_ns)
    assert framed is not None
    before_ns, after_ns, joule = framed
    celsius = mean_temperature(temperature, pd.DataFrame({"start_ns": [before_ns], "end_ns": [after_ns]}))
    return joule - floor.at(celsius).value * ((after_ns - before_ns) / 1e9 - planted_s)


def recorded(rig: Rig) -> RunFolder:
    """Record all passes of *rig*; what is replayed is cached for the cases to come."""
    record(rig)
    run = RunFolder(published(rig))
    keep_replays(run)
    return run


def guess(run: RunFolder, plant: Plant, work: Work, calls: int) -> Guess:
    """Return what the account of *run* says of one planted call; *calls* of them ran in a prefill or a token."""
    found = attribute(run)
    account = found.accounts[plant.phase]
    assert account.floor_w is not None
    instant_w = _instant_w(run, plant.phase)
    if plant.is_gap:
        seconds = _planted_gap_s(run, found, plant.phase) / calls
        by_account = account.floor_w.scaled(seconds)
        return Guess(by_account, by_account.value, instant_w * seconds)
    wanted = signatures_of(work)
    joules = account.joules
    assert isinstance(joules, MarginalJoules)
    kernels = found.kernels[found.kernels["phase"] == plant.phase]
    own = kernels[kernels["signature"].isin(list(wanted))]
    launches = own.groupby("kernel_class", observed=True)["launches"].sum() / calls
    counts = np.array([float(launches.get(name, 0.0)) for name in joules.classes])
    by_account = Estimate.of(float(joules.launch_j @ counts), joules.launch_draws_j @ counts)
    own_s = float(kernels.loc[kernels["signature"].isin(list(wanted)), "duration_ns"].sum()) / 1e9
    all_s = float(kernels["duration_ns"].sum()) / 1e9
    equal = attribute(run, equal_power=True).accounts[plant.phase]
    assert equal.kernel_j is not None
    dynamic_j = equal.kernel_j.value - account.floor_w.value * equal.busy_s
    per_call_s = own_s / calls
    return Guess(by_account, dynamic_j * own_s / all_s / calls, (instant_w - account.floor_w.value) * per_call_s)


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


def _planted_gap_s(run: RunFolder, found: Attribution, phase: str) -> float:
    """Return the time per unit of *phase* in which the device was idle and the host in the planted work."""
    ranges = run.table("ranges")
    planted = ranges[(ranges["category"] == CATEGORY) & (ranges["pass"] == "time")].sort_values("start_ns")
    gaps = found.timeline.gaps[found.timeline.gaps["phase"] == phase].sort_values("start_ns")
    start, end = planted["start_ns"].to_numpy(), planted["end_ns"].to_numpy()
    idle_ns = 0.0
    for begin_ns, duration_ns in zip(gaps["start_ns"], gaps["duration_ns"], strict=True):
        first = int(np.searchsorted(end, begin_ns))
        while first < len(start) and start[first] < begin_ns + duration_ns:
            idle_ns += max(0.0, min(end[first], begin_ns + duration_ns) - max(start[first], begin_ns))
            first += 1
    phases = found.timeline.phases
    return idle_ns / 1e9 / int(phases.loc[phases["phase"] == phase, "tokens"].sum())


def compare(plant: Plant, known: Estimate, guessed: Guess, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the case of one plant, printed as well."""
    error = guessed.account.value / known.value - 1
    held = (guessed.account.low or 0.0) <= known.value <= (guessed.account.high or guessed.account.value)
    metrics = {
        "truth": metric(known, "J"),
        "estimate": metric(guessed.account, "J"),
        "error": metric(error, "1"),
        "held": metric(float(held), "1"),
        "error_by_equal_power": metric(guessed.equal_power / known.value - 1, "1"),
        "error_by_instant_power": metric(guessed.instant_power / known.value - 1, "1"),
    }
    print(
        f"{plant.name:38s} counter {with_interval(known, 'J')}  "
        f"account {with_interval(guessed.account, 'J')}  {error:+6.1%} "
        f"{'held' if held else 'OUT '}  equal power {guessed.equal_power / known.value - 1:+6.1%}  "
        f"instant power {guessed.instant_power / known.value - 1:+6.1%}",
        flush=True,
    )
    passed = bool(abs(error) <= ERROR_LIMIT)
    note = "" if passed else f"above {ERROR_LIMIT:.0%}"
    return case(plant.name, {**parameters, "every": plant.every, "phase": plant.phase}, metrics, passed, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=6, help="windows with and without, each, per case")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--runs", type=Path, help="keep the recorded runs in this folder")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    loaded = loaded_at(arguments.model, arguments.precision, device)
    options = TraceOptions(
        arguments.model,
        precision=arguments.precision,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=NEW_TOKENS,
        warmup=2,
        repeats=3,
        trace_repeats=1,
    )
    parameters = {k: getattr(arguments, k) for k in ("model", "precision", "prompt_tokens", "rounds")}
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        # What one case replays of the model the next need not; what the user has cached is left alone.
        os.environ["XDG_CACHE_HOME"] = folder
        for number, plant in enumerate(CPU_PLANTS if device.capability() is None else GPU_PLANTS):
            if arguments.only and plant.name not in arguments.only:
                continue
            work = plant.make(device.torch_device)
            path = (arguments.runs or Path(folder)) / f"planted-{number}"
            rig = rig_of(device, loaded, options, path, tuple(device.meters()))
            planted = Planted(loaded.model, plant, work, rig.annotator)
            with planted.growing():
                run = recorded(rig)
            guessed = guess(run, plant, work, planted.calls_per_step)
            with rig.metered():
                time.sleep(0.5)
                known = truth(rig, plant, work, arguments.rounds)
            rig.annotator.drain()
            # With these a case can be judged again from its kept run folder, without the device.
            again = {"run": path.name, "operators": signatures_of(work), "calls": planted.calls_per_step}
            cases.append(compare(plant, known, guessed, parameters | again))
            write("attribution", cases, arguments.results)


if __name__ == "__main__":
    main()
