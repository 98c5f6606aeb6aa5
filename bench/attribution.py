"""Planted work: known operators inserted into a decode loop, their joules by the counter and by the attribution.

python -m bench.attribution --model qwen-7b --precision bf16

Truth: windows of the loop with and without the planted operator in random order; the counter's energy above the idle
floor, with minus without, per planted call. Estimate: what the account of one recorded run with the work says of
exactly that operator, from its replay and the run; it knows nothing of the truth windows.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bench.result import case, metric, write
from llmkern.attribute.attribution import attribute
from llmkern.attribute.energy import EnergyCurve, Floor, mean_temperature, measure_floor
from llmkern.attribute.estimate import Estimate, from_samples
from llmkern.attribute.identify import identify
from llmkern.attribute.replayed import account_replays
from llmkern.progress import Stages
from llmkern.record.annotate import Annotator
from llmkern.record.choose import choose_device
from llmkern.record.device import Device, EnergyMeter
from llmkern.record.generation import Generation, decoder_layers
from llmkern.record.inspection import Inspector
from llmkern.record.options import TraceOptions
from llmkern.record.passes import record_passes
from llmkern.record.weigh import IDLE_WINDOW_S, RARE_TICK_S, pace, wait_for_ticks
from llmkern.run import RunFolder, RunWriter
from llmkern.workload.load import load_model
from llmkern.workload.models import find_model
from llmkern.workload.prompts import builtin_prompts

ERROR_LIMIT = 0.08
NEW_TOKENS = 33
WINDOW_S = 2.0


@dataclass(frozen=True)
class Plant:
    """One operator that runs after every *every*-th layer."""

    name: str
    every: int
    make: Callable[[torch.device], Callable[[], object]]


def _product(size: int, dtype: torch.dtype) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return lambda: a @ b

    return make


def _copy(megabytes: int) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        source = torch.randn(megabytes * 2**18, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return make


def _softmax(rows: int, columns: int) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        x = torch.randn(rows, columns, device=device)
        return lambda: torch.softmax(x, -1)

    return make


def _dequantize(rows: int, columns: int) -> Callable[[torch.device], Callable[[], object]]:
    def make(device: torch.device) -> Callable[[], object]:
        from bitsandbytes import functional

        weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        values, state = functional.quantize_4bit(weight, quant_type="nf4")
        return lambda: functional.dequantize_4bit(values, state)

    return make


GPU_PLANTS = [
    Plant("bf16 GEMM 8192", 7, _product(8192, torch.bfloat16)),
    Plant("bf16 GEMM 4096", 2, _product(4096, torch.bfloat16)),
    Plant("fp32 GEMM 2048", 2, _product(2048, torch.float32)),
    Plant("softmax 4096x8192", 1, _softmax(4096, 8192)),
    Plant("copy 256 MB", 1, _copy(256)),
    Plant("NF4 dequantize 3584x18944", 1, _dequantize(3584, 18944)),
]
CPU_PLANTS = [
    Plant("fp32 GEMM 512", 1, _product(512, torch.float32)),
    Plant("softmax 512x1024", 1, _softmax(512, 1024)),
]


@contextmanager
def planted(model: torch.nn.Module, plant: Plant, work: Callable[[], object]) -> Iterator[None]:
    """Run *work* after every *every*-th decoder layer of *model*, in decode only."""

    def after(_module: object, _args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] == 1:
            work()

    with ExitStack() as stack:
        for layer in decoder_layers(model)[:: plant.every]:
            stack.callback(layer.register_forward_hook(after).remove)
        yield


def signatures_of(work: Callable[[], object]) -> dict[str, int]:
    """Return the signatures that *work* dispatches, and how often."""
    inspector = Inspector(torch.nn.Module(), lambda: (None, None))
    with torch.inference_mode(), inspector.watching():
        work()
    found: dict[str, int] = {}
    for call in inspector.calls:
        found[call.signature] = found.get(call.signature, 0) + 1
    return found


class Counter:
    """The counter and temperatures of the first meter, collected window by window."""

    def __init__(self, meters: list[EnergyMeter]) -> None:
        self._meters = meters
        self._energy: list[pd.DataFrame] = []
        self._power: list[pd.DataFrame] = []

    def _drain(self) -> None:
        rows = self._meters[0].drain()
        plain = {
            table: pd.DataFrame({k: getattr(v, "to_pandas", lambda v=v: v)() for k, v in columns.items()})
            for table, columns in rows.items()
        }
        self._energy.append(plain["energy"])
        if "power" in plain:
            self._power.append(plain["power"])

    def window(self, work: Callable[[], object], seconds: float) -> tuple[int, int, int]:
        """Repeat *work* for *seconds* between ticks; return the start and end in ns, and how often it ran."""
        wait_for_ticks(self._meters, 1)
        start_ns = time.time_ns()
        count = 0
        while time.time_ns() - start_ns < seconds * 1e9:
            work()
            count += 1
        end_ns = time.time_ns()
        wait_for_ticks(self._meters, 2)
        self._drain()
        return start_ns, end_ns, count

    def curve(self) -> EnergyCurve:
        energy = pd.concat(self._energy)
        return EnergyCurve(energy["timestamp_ns"].to_numpy(), energy["energy_mj"].to_numpy())

    def temperature(self) -> pd.DataFrame:
        if not self._power:
            return pd.DataFrame({"timestamp_ns": [], "temperature_c": []})
        return pd.concat(self._power)[["timestamp_ns", "temperature_c"]].dropna().sort_values("timestamp_ns")


def truth(
    generation: Generation,
    model: torch.nn.Module,
    meters: list[EnergyMeter],
    plant: Plant,
    work: Callable[[], object],
    rounds: int,
) -> Estimate:
    """Return the J above the floor of one planted call, by the counter."""
    counter = Counter(meters)
    idle = []
    spans: list[tuple[bool, int, int, int]] = []

    def rest() -> None:
        pace(meters, 0.0)
        start_ns, end_ns, _ = counter.window(lambda: time.sleep(0.05), IDLE_WINDOW_S)
        idle.append({"start_ns": start_ns, "end_ns": end_ns})
        pace(meters, RARE_TICK_S)

    rest()
    shuffled = random.Random(plant.name)
    order = [with_ for _ in range(rounds) for with_ in shuffled.sample([True, False], 2)]
    for with_ in order:
        with ExitStack() as stack:
            if with_:
                stack.enter_context(planted(model, plant, work))
            spans.append((with_, *counter.window(lambda: generation(NEW_TOKENS), WINDOW_S)))
    rest()
    curve, temperature = counter.curve(), counter.temperature()
    floor = measure_floor(curve, pd.DataFrame(idle), temperature)
    assert floor is not None
    per_run: dict[bool, list[float]] = {True: [], False: []}
    for with_, start_ns, end_ns, count in spans:
        per_run[with_].append(_dynamic_j(curve, floor, temperature, start_ns, end_ns) / count)
    calls = len(decoder_layers(model)[:: plant.every]) * (NEW_TOKENS - 1)
    differences = np.array(per_run[True]) - np.array(per_run[False])
    return from_samples((differences / calls).tolist())


def _dynamic_j(curve: EnergyCurve, floor: Floor, temperature: pd.DataFrame, start_ns: int, end_ns: int) -> float:
    framed = curve.window(start_ns, end_ns)
    assert framed is not None
    before_ns, after_ns, joule = framed
    celsius = mean_temperature(temperature, pd.DataFrame({"start_ns": [before_ns], "end_ns": [after_ns]}))
    return joule - floor.at(celsius).value * (after_ns - before_ns) / 1e9


def estimate(
    device: Device,
    generation: Generation,
    model: torch.nn.Module,
    annotator: Annotator,
    plant: Plant,
    work: Callable[[], object],
    options: TraceOptions,
) -> tuple[Estimate, float]:
    """Return the J above the floor of one planted call by the account of a recorded run, and by duration alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        writer = RunWriter(path, {"device": device.facts(), "options": options.facts()})
        with planted(model, plant, work):
            record_passes(device, generation, model, annotator, writer, Stages(quiet=True), options)
        writer.finish()
        run = RunFolder(path)
        attribution = attribute(run)
        identified = identify(run, attribution.timeline, int(device.facts()["index"]))
        replays = account_replays(run, attribution, identified)
    assert replays is not None
    wanted = signatures_of(work)
    found = replays.phases["decode"].by_signature.set_index("signature")
    calls = len(decoder_layers(model)[:: plant.every])
    parts = found.loc[[name for name in wanted if name in found.index]]
    decode = attribution.accounts["decode"]
    assert decode.kernel_j is not None
    assert decode.floor_w is not None
    dynamic_j = decode.kernel_j.value - decode.floor_w.value * decode.busy_s
    by_duration = dynamic_j * float(parts["duration_ns"].sum()) / max(float(found["duration_ns"].sum()), 1.0)
    marginals = [replays.marginals.energy_j[name].scaled(count) for name, count in wanted.items()]
    low = sum(m.low or 0.0 for m in marginals)
    high = sum(m.high if m.high is not None else m.value for m in marginals)
    return Estimate(sum(m.value for m in marginals), low, high), by_duration / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=6, help="windows with and without, each, per case")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    loaded = load_model(
        find_model(arguments.model), precision=arguments.precision, weights="random", device=device.torch_device
    )
    prompts = builtin_prompts(1, 128, loaded.tokenizer, int(loaded.config.vocab_size), 0)
    ids, mask = (t.to(device.torch_device) for t in (prompts.input_ids, prompts.attention_mask))
    annotator = Annotator()
    generation = Generation(loaded.model, ids, mask, annotator, device.synchronize)
    options = TraceOptions(
        arguments.model,
        precision=arguments.precision,
        new_tokens=NEW_TOKENS,
        warmup=2,
        repeats=3,
        trace_repeats=1,
        replay=True,
        no_cache=True,
    )
    cases = []
    for plant in GPU_PLANTS if device.kind == "cuda" else CPU_PLANTS:
        if arguments.only and plant.name not in arguments.only:
            continue
        work = plant.make(device.torch_device)
        guessed, by_duration = estimate(device, generation, loaded.model, annotator, plant, work, options)
        meters = device.meters()
        with ExitStack() as stack:
            for meter in meters:
                meter.start()
                stack.callback(meter.stop)
            time.sleep(0.5)
            known = truth(generation, loaded.model, meters, plant, work, arguments.rounds)
        annotator.drain()
        error, naive = guessed.value / known.value - 1, by_duration / known.value - 1
        metrics = {
            "truth": metric(known, "J"),
            "estimate": metric(guessed, "J"),
            "error": metric(error, "1"),
            "error_by_duration": metric(naive, "1"),
        }
        parameters = {"model": arguments.model, "precision": arguments.precision, "every": plant.every}
        passed = abs(error) <= ERROR_LIMIT
        cases.append(case(plant.name, parameters, metrics, passed, "" if passed else f"above {ERROR_LIMIT:.0%}"))
        print(
            f"{plant.name:28s} counter {known.value * 1e3:9.3f} ± {(known.half_width or 0) * 1e3:.3f} mJ  "
            f"account {guessed.value * 1e3:9.3f} ± {(guessed.half_width or 0) * 1e3:.3f} mJ  {error:+6.1%}  "
            f"by duration {naive:+6.1%}",
            flush=True,
        )
        write("attribution", cases, arguments.results)


if __name__ == "__main__":
    main()
