"""What recording costs: the decode loop bare, weighed, timed, and under torch.profiler, in turn in one process.

python -m bench.overhead --model qwen-7b --precision bf16
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.result import case, metric, write
from llmkern.attribute.estimate import from_samples
from llmkern.record.annotate import Annotator
from llmkern.record.device import Device, choose_device
from llmkern.record.generation import Generation
from llmkern.record.pump import Pump
from llmkern.record.timing import flushed, ranges
from llmkern.record.weigh import RARE_TICK_S, pace
from llmkern.run import RunWriter
from llmkern.workload.load import load_model
from llmkern.workload.models import find_model
from llmkern.workload.prompts import builtin_prompts

WEIGH_LIMIT = 0.01
TIME_LIMIT = 0.05

Condition = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Run:
    """One generation: seconds on the wall, and seconds of CPU that the launching thread used."""

    wall_s: float
    cpu_s: float


class Bench:
    """One loaded model and the conditions under which its decode loop is timed."""

    def __init__(self, model: str, precision: str, device: Device, prompt_tokens: int, new_tokens: int) -> None:
        self.device, self.new_tokens = device, new_tokens
        loaded = load_model(find_model(model), precision=precision, weights="random", device=device.torch_device)
        prompts = builtin_prompts(1, prompt_tokens, loaded.tokenizer, int(loaded.config.vocab_size), 0)
        self.annotator = Annotator()
        self._model = loaded.model
        self._inputs = {
            "input_ids": prompts.input_ids.to(device.torch_device),
            "attention_mask": prompts.attention_mask.to(device.torch_device),
        }
        self.generation = Generation(loaded.model, *self._inputs.values(), self.annotator, device.synchronize)
        self._folder = tempfile.TemporaryDirectory()
        self._writer = RunWriter(Path(self._folder.name) / "run", {})

    def bare(self) -> Run:
        """Run one generation without any hook of ours."""

        def generate() -> None:
            with torch.inference_mode():
                self._model.generate(**self._inputs, max_new_tokens=self.new_tokens, do_sample=False, pad_token_id=0)

        return self._timed(generate)

    def annotated(self) -> Run:
        return self._timed(lambda: self.generation(self.new_tokens))

    def _timed(self, work: Callable[[], object]) -> Run:
        self.device.synchronize()
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        work()
        self.device.synchronize()
        return Run(time.perf_counter() - wall_s, time.thread_time() - cpu_s)

    @contextmanager
    def weighed(self) -> Iterator[None]:
        """The conditions of pass weigh: sensor threads, phase marks, the pump."""
        with ExitStack() as stack:
            meters = self.device.meters()
            for meter in meters:
                meter.start()
                stack.callback(meter.stop)
            # The sensor looks for its tick before it comes to rest.
            time.sleep(0.5)
            pace(meters, RARE_TICK_S)
            drains = [meter.drain for meter in meters]
            stack.enter_context(Pump(self._writer, [lambda: ranges(self.annotator, "weigh"), *drains]))
            yield

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The recorder alone: no sensors, no ranges per layer, nothing written."""
        recorder = self.device.recorder()
        recorder.start()
        try:
            yield
        finally:
            recorder.stop()
            recorder.drain()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The conditions of pass time: all of weigh, the recorder, and ranges per layer."""
        recorder = self.device.recorder()
        with self.weighed():
            recorder.start()
            try:
                with Pump(self._writer, [lambda: flushed(recorder)]), self.generation.layers_annotated():
                    yield
                    recorder.stop()
            finally:
                recorder.stop()


def in_turn(
    bare: Callable[[], Run], other: Callable[[], Run], condition: Condition, rounds: int, each: int
) -> list[tuple[list[Run], list[Run]]]:
    """Run *bare* plainly and *other* under *condition* in turn, *each* times after one that does not count."""
    pairs = []
    for round_ in range(rounds):
        first: list[Run] = []
        second: list[Run] = []

        def plain(into: list[Run] = first) -> None:
            bare()
            into.extend(bare() for _ in range(each))

        def under(into: list[Run] = second) -> None:
            with condition():
                other()
                into.extend(other() for _ in range(each))

        # Either goes first as often as the other, so that a drift of the host favours neither.
        for step in (plain, under) if round_ % 2 == 0 else (under, plain):
            step()
        pairs.append((first, second))
    return pairs


def effects(pairs: list[tuple[list[Run], list[Run]]], value: Callable[[Run], float]) -> list[float]:
    """Return by how much of itself *value* grew in each pair."""
    medians = [[statistics.median(map(value, runs)) for runs in pair] for pair in pairs]
    return [second / first - 1 for first, second in medians]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--each", type=int, default=3)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    bench = Bench(
        arguments.model,
        arguments.precision,
        choose_device(arguments.device),
        arguments.prompt_tokens,
        arguments.new_tokens,
    )
    for _ in range(5):
        bench.bare()
    before = [bench.bare().wall_s for _ in range(2 * arguments.each)]
    cuda = bench.device.kind == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    both = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    few = max(2, arguments.rounds // 3)
    conditions: list[tuple[str, Callable[[], Run], Condition, int, float | None]] = [
        ("the same twice", bench.bare, nullcontext, arguments.rounds, None),
        ("weigh", bench.annotated, bench.weighed, arguments.rounds, WEIGH_LIMIT),
        ("ranges per layer alone", bench.annotated, bench.generation.layers_annotated, few, None),
        ("recorder alone", bench.bare, bench.recorded, few, None),
        ("time", bench.annotated, bench.timed, arguments.rounds, TIME_LIMIT),
        ("torch.profiler, CUDA", bench.bare, lambda: profile(activities=activities), few, None),
        ("torch.profiler, CPU and CUDA", bench.bare, lambda: profile(activities=both), few, None),
    ]
    cases = []
    parameters = {k: getattr(arguments, k) for k in ("model", "precision", "prompt_tokens", "new_tokens", "each")}
    for name, run, condition, rounds, limit in conditions:
        pairs = in_turn(bench.bare, run, condition, rounds, arguments.each)
        wall, cpu = effects(pairs, lambda r: r.wall_s), effects(pairs, lambda r: r.cpu_s)
        per_token_ms = [
            [1e3 * statistics.median(r.wall_s for r in runs) / arguments.new_tokens for runs in side]
            for side in zip(*pairs, strict=True)
        ]
        effect = from_samples(wall)
        cases.append(
            case(
                name,
                {**parameters, "rounds": rounds},
                {
                    "effect": metric(effect, "1"),
                    "effect_on_launching_thread_cpu": metric(from_samples(cpu), "1"),
                    "bare_per_token": metric(statistics.median(per_token_ms[0]), "ms", per_token_ms[0]),
                    "recorded_per_token": metric(statistics.median(per_token_ms[1]), "ms", per_token_ms[1]),
                },
                None if limit is None else effect.value <= limit,
                "" if limit is None or effect.value <= limit else f"above the bar of {limit:.0%}",
            )
        )
        print(
            f"{name:30s} wall {effect.value:+7.2%} [{effect.low:+.2%}, {effect.high:+.2%}]  "
            f"CPU {statistics.median(cpu):+7.2%}  {per_token_ms[0][0]:.1f} ms/token",
            flush=True,
        )
        write("overhead", cases, arguments.results)
    after = [bench.bare().wall_s for _ in range(2 * arguments.each)]
    drift = statistics.median(after) / statistics.median(before) - 1
    cases.append(case("bare after everything / before anything", parameters, {"drift": metric(drift, "1")}, None))
    print(f"bare after everything against before anything: {drift:+.2%}")
    print(write("overhead", cases, arguments.results))


if __name__ == "__main__":
    main()
