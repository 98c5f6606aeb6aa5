"""What recording costs: the decode loop bare and recorded in turn in one process, token by token.

python -m bench.overhead --model qwen-7b --precision bf16

Virtual hosts are noisy: the same loop takes 21 or 40 ms a token from one second to the next. So bare and recorded
generations take turns every half second, either first as often as the other, and what is compared are the medians of all
their token times; "the same twice" shows what the method itself cannot tell apart. The 25th percentile beside it is that
of the tokens the host disturbed least.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.result import case, metric, write
from llmkern.attribute.estimate import Estimate
from llmkern.record.annotate import Annotator
from llmkern.record.cuda import CuptiRecorder
from llmkern.record.device import Device, KernelRecorder, choose_device
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
DRAWS = 2000

Condition = Callable[[], AbstractContextManager[Any]]
Rounds = list[tuple[np.ndarray, np.ndarray]]


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
        self._forward_ends_ns: list[int] = []
        # The only thing of ours in the bare loop, and in every other: one time stamp per forward.
        loaded.model.register_forward_hook(lambda *_: self._forward_ends_ns.append(time.perf_counter_ns()))

    def bare(self, new_tokens: int) -> None:
        """Generate without any hook of llmkern."""
        with torch.inference_mode():
            self._model.generate(**self._inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

    def annotated(self, new_tokens: int) -> None:
        self.generation(new_tokens)

    def token_times_ms(self, work: Callable[[int], object]) -> np.ndarray:
        """Return the time of each decoded token of one generation, after a short one that does not count."""
        work(3)
        self.device.synchronize()
        self._forward_ends_ns.clear()
        work(self.new_tokens)
        self.device.synchronize()
        return np.diff(self._forward_ends_ns) / 1e6

    @contextmanager
    def weighed(self) -> Iterator[None]:
        """The conditions of pass weigh: sensor threads, phase marks, the pump."""
        with ExitStack() as stack:
            meters = self.device.meters()
            for meter in meters:
                meter.start()
                stack.callback(meter.stop)
            # The sensor looks for its tick before it comes to rest.
            time.sleep(0.4)
            pace(meters, RARE_TICK_S)
            drains = [meter.drain for meter in meters]
            stack.enter_context(Pump(self._writer, [lambda: ranges(self.annotator, "weigh"), *drains]))
            yield

    @contextmanager
    def recorded(self, recorder: KernelRecorder) -> Iterator[None]:
        """A recorder alone: no sensors, no ranges per layer, nothing written."""
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


def in_turn(bench: Bench, other: Callable[[int], object], condition: Condition, rounds: int) -> Rounds:
    """Return the token times in ms of the bare loop and of *other* under *condition*, one pair per round."""
    pairs = []
    for round_ in range(rounds):

        def under() -> np.ndarray:
            with condition():
                return bench.token_times_ms(other)

        # Either goes first as often as the other, so that a drift of the host favours neither.
        if round_ % 2 == 0:
            first = bench.token_times_ms(bench.bare)
            second = under()
        else:
            second = under()
            first = bench.token_times_ms(bench.bare)
        pairs.append((first, second))
    return pairs


def effect(pairs: Rounds, percentile: float) -> Estimate:
    """Return by how much of itself the *percentile* of all token times grew, with its bootstrap interval over rounds."""

    def grown(chosen: Rounds) -> float:
        before, after = (np.percentile(np.concatenate(side), percentile) for side in zip(*chosen, strict=True))
        return float(after / before - 1)

    random = np.random.default_rng(0)
    draws = [grown([pairs[i] for i in random.integers(0, len(pairs), len(pairs))]) for _ in range(DRAWS)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(grown(pairs), float(low), float(high), len(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=16, help="of one generation; its tokens are timed one by one")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    bench = Bench(
        arguments.model,
        arguments.precision,
        choose_device(arguments.device),
        arguments.prompt_tokens,
        arguments.new_tokens,
    )
    for _ in range(4):
        bench.bare(arguments.new_tokens)
    before = np.concatenate([bench.token_times_ms(bench.bare) for _ in range(4)])
    cuda = bench.device.kind == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    both = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    half, third = max(2, arguments.rounds // 2), max(2, arguments.rounds // 3)
    whole_recorder = bench.device.recorder()
    kernel_recorder = CuptiRecorder(host_calls=False) if cuda else whole_recorder
    # torch.profiler comes last: it keeps CUPTI once it has it.
    conditions: list[tuple[str, Callable[[int], object], Condition, int, float | None]] = [
        ("the same twice", bench.bare, nullcontext, arguments.rounds, None),
        ("weigh", bench.annotated, bench.weighed, arguments.rounds, WEIGH_LIMIT),
        ("ranges per layer alone", bench.annotated, bench.generation.layers_annotated, half, None),
        ("kernel records alone", bench.bare, lambda: bench.recorded(kernel_recorder), half, None),
        ("kernel records and host calls", bench.bare, lambda: bench.recorded(whole_recorder), half, None),
        ("time", bench.annotated, bench.timed, arguments.rounds, TIME_LIMIT),
        ("torch.profiler, CUDA", bench.bare, lambda: profile(activities=activities), third, None),
        ("torch.profiler, CPU and CUDA", bench.bare, lambda: profile(activities=both), third, None),
    ]
    cases = []
    parameters = {k: getattr(arguments, k) for k in ("model", "precision", "prompt_tokens", "new_tokens")}
    for name, run, condition, rounds, limit in conditions:
        pairs = in_turn(bench, run, condition, rounds)
        bare, recorded = (np.concatenate(side) for side in zip(*pairs, strict=True))
        median, quartile = effect(pairs, 50), effect(pairs, 25)
        metrics = {
            "effect_on_median": metric(median, "1"),
            "effect_on_25th_percentile": metric(quartile, "1"),
            "bare_per_token": metric(float(np.median(bare)), "ms", bare.tolist()),
            "recorded_per_token": metric(float(np.median(recorded)), "ms", recorded.tolist()),
        }
        passed = None if limit is None else median.value <= limit
        note = "" if passed is not False else f"above the bar of {limit:.0%}"
        cases.append(case(name, {**parameters, "rounds": rounds}, metrics, passed, note))
        print(
            f"{name:30s} median {median.value:+7.2%} [{median.low:+.2%}, {median.high:+.2%}]  "
            f"25th percentile {quartile.value:+7.2%} [{quartile.low:+.2%}, {quartile.high:+.2%}]  "
            f"{np.median(bare):.1f} -> {np.median(recorded):.1f} ms/token",
            flush=True,
        )
        write("overhead", cases, arguments.results)
    after = np.concatenate([bench.token_times_ms(bench.bare) for _ in range(4)])
    drift = float(np.median(after) / np.median(before) - 1)
    cases.append(case("bare after everything / before anything", parameters, {"drift": metric(drift, "1")}, None))
    print(f"bare after everything against before anything: {drift:+.2%}")
    print(write("overhead", cases, arguments.results))


if __name__ == "__main__":
    main()
