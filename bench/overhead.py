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
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.result import case, metric, write
from llmkern.record.annotate import Annotator
from llmkern.record.device import Device, choose_device
from llmkern.record.generation import Generation
from llmkern.record.pump import Pump
from llmkern.record.timing import flushed, ranges
from llmkern.run import RunWriter
from llmkern.workload.load import load_model
from llmkern.workload.models import find_model
from llmkern.workload.prompts import builtin_prompts

WEIGH_LIMIT = 0.01
TIME_LIMIT = 0.05

Condition = Callable[[], AbstractContextManager[Any]]


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

    def bare(self) -> float:
        """Return the seconds of one generation without any hook of ours."""
        self.device.synchronize()
        start_s = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(**self._inputs, max_new_tokens=self.new_tokens, do_sample=False, pad_token_id=0)
        self.device.synchronize()
        return time.perf_counter() - start_s

    def annotated(self) -> float:
        return self.generation(self.new_tokens)

    @contextmanager
    def weighed(self) -> Iterator[None]:
        """The conditions of pass weigh: sensor threads, phase marks, the pump."""
        with ExitStack() as stack:
            meters = self.device.meters()
            for meter in meters:
                meter.start()
                stack.callback(meter.stop)
            time.sleep(0.5)
            drains = [meter.drain for meter in meters]
            stack.enter_context(Pump(self._writer, [lambda: ranges(self.annotator, "weigh"), *drains]))
            yield

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The conditions of pass time: all of weigh, CUPTI, and ranges per layer."""
        recorder = self.device.recorder()
        with self.weighed():
            recorder.start()
            try:
                self.annotated()
                with Pump(self._writer, [lambda: flushed(recorder)]), self.generation.layers_annotated():
                    yield
                    recorder.stop()
            finally:
                recorder.stop()


def in_turn(a: Callable[[], float], b: Callable[[], float], condition: Condition, rounds: int, each: int) -> list[Any]:
    """Time *a* plainly and *b* under *condition* in turn; return the pairs of medians of *each* runs."""
    pairs = []
    for round_ in range(rounds):
        first: list[float] = []
        second: list[float] = []

        def plain(into: list[float] = first) -> None:
            a()
            into.extend(a() for _ in range(each))

        def under(into: list[float] = second) -> None:
            with condition():
                b()
                into.extend(b() for _ in range(each))

        for step in (plain, under) if round_ % 2 == 0 else (under, plain):
            step()
        pairs.append((statistics.median(first), statistics.median(second)))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--each", type=int, default=4)
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
    before = [bench.bare() for _ in range(arguments.each)]
    cuda = bench.device.kind == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    both = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    conditions: list[tuple[str, Callable[[], float], Condition, int, float | None]] = [
        ("the same twice", bench.bare, nullcontext, arguments.rounds, None),
        ("weigh", bench.annotated, bench.weighed, arguments.rounds, WEIGH_LIMIT),
        ("time", bench.annotated, bench.timed, arguments.rounds, TIME_LIMIT),
        ("torch.profiler, CUDA", bench.bare, lambda: profile(activities=activities), 2, None),
        ("torch.profiler, CPU and CUDA", bench.bare, lambda: profile(activities=both), 2, None),
    ]
    cases = []
    parameters = {k: getattr(arguments, k) for k in ("model", "precision", "prompt_tokens", "new_tokens", "each")}
    for name, run, condition, rounds, limit in conditions:
        pairs = in_turn(bench.bare, run, condition, rounds, arguments.each)
        effects = [second / first - 1 for first, second in pairs]
        effect = statistics.median(effects)
        milliseconds = [1e3 * p / arguments.new_tokens for p, _ in pairs], [1e3 * p / arguments.new_tokens for _, p in pairs]
        cases.append(
            case(
                name,
                {**parameters, "rounds": rounds},
                {
                    "effect": metric(effect, "1", effects),
                    "bare_per_token": metric(statistics.median(milliseconds[0]), "ms", milliseconds[0]),
                    "recorded_per_token": metric(statistics.median(milliseconds[1]), "ms", milliseconds[1]),
                },
                None if limit is None else effect <= limit,
                "" if limit is None or effect <= limit else f"above the bar of {limit:.0%}",
            )
        )
        print(f"{name:32s} {effect:+7.2%}  pairs {', '.join(f'{e:+.2%}' for e in effects)}", flush=True)
        write("overhead", cases, arguments.results)
    after = [bench.bare() for _ in range(arguments.each)]
    drift = statistics.median(after) / statistics.median(before) - 1
    cases.append(case("bare after everything / before anything", parameters, {"drift": metric(drift, "1")}, None))
    print(f"bare after everything against before anything: {drift:+.2%}")
    print(write("overhead", cases, arguments.results))


if __name__ == "__main__":
    main()
