"""What recording costs: the decode loop with and without each part of llmkern, switched every few tokens.

python -m bench.overhead --model qwen-7b --precision bf16

Virtual hosts are noisy: one and the same loop takes 21 ms a token now and 40 ms a second later. So what is compared
lies next to each other: within one long generation a part is switched on and off in the order off, on, on, off, a few
tokens each (the first two after a switch do not count), and every four such blocks give one sample of the effect. The
part "nothing" switches nothing and shows what the method cannot tell apart.

What llmkern does from time to time on threads of its own (reading sensors, writing segments) cannot be switched that
way. For it the bench tells for how much of the time those threads can have held up the launching one: the CPU time in
which they held Python's interpreter, and the time of their calls into the driver.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.result import case, metric, write
from bench.workload import loaded_at, rig_of
from llmkern.estimate import Estimate, from_samples
from llmkern.record.device.choose import choose_device
from llmkern.record.device.cupti import cupti_candidates
from llmkern.record.device.interface import Device, KernelRecorder
from llmkern.record.device.native import native
from llmkern.record.options import TraceOptions
from llmkern.record.passes.timeline import flushed
from llmkern.record.passes.weigh import OwnCost
from llmkern.record.pump import Source
from llmkern.record.rig import RARE_TICK_S

WEIGH_LIMIT = 0.01
TIME_LIMIT = 0.05
# Off, on, on, off: a drift over the four blocks favours neither.
PATTERN = (False, True, True, False)
# Tokens after a switch that do not count: the first launches under a new recorder are slower than those that follow.
SETTLING = 2
# Share of the tokens that count as left alone by whatever else runs on the host.
QUICKEST = 0.1

Condition = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Switched:
    """Token times in ms with a part off and on, one row per four blocks, and what of them the launching thread ran."""

    off_ms: np.ndarray
    on_ms: np.ndarray
    off_cpu_ms: np.ndarray
    on_cpu_ms: np.ndarray

    def effect(self) -> Estimate:
        """Return by how much of itself the median token time of four blocks grew."""
        return from_samples((np.median(self.on_ms, axis=1) / np.median(self.off_ms, axis=1) - 1).tolist())

    def cpu(self) -> Estimate:
        """Return by how much of itself the median CPU time a token grew, of four blocks each."""
        return from_samples((np.median(self.on_cpu_ms, axis=1) / np.median(self.off_cpu_ms, axis=1) - 1).tolist())

    def undisturbed(self, draws: int = 2000) -> Estimate:
        """Return by how much of itself the token time grew that one in ten stays under; rows are drawn anew.

        What else runs on the host only ever adds to a token: the quickest tokens are those that it left alone.
        """
        rng = np.random.default_rng(0)
        rows = np.vstack([np.arange(len(self.on_ms)), rng.integers(0, len(self.on_ms), (draws, len(self.on_ms)))])
        on, off = (np.quantile(t[rows].reshape(len(rows), -1), QUICKEST, axis=1) for t in (self.on_ms, self.off_ms))
        low, high = np.quantile(on[1:] / off[1:] - 1, (0.025, 0.975))
        return Estimate(float(on[0] / off[0] - 1), float(low), float(high))


@contextmanager
def running(bare: Any) -> Iterator[None]:
    """The least client of CUPTI at work."""
    bare.start()
    try:
        yield
    finally:
        bare.stop()


def per_launch(device: Device, condition: Condition, quads: int, launches: int) -> tuple[Estimate, float]:
    """Return by how many µs *condition* lengthens one eager launch of a tiny kernel, and how long that takes without.

    Blocks of *launches* are switched like tokens. They are so short that the host's moods hardly matter.
    """
    tiny = torch.ones(64, device=device.torch_device)

    def block() -> float:
        for _ in range(launches // 8):
            tiny.add_(1.0)
        device.synchronize()
        begin_s = time.perf_counter()
        for _ in range(launches):
            tiny.add_(1.0)
        device.synchronize()
        return (time.perf_counter() - begin_s) / launches * 1e6

    block()
    off_us, added_us = [], []
    for _ in range(quads):
        off, on = [block()], []
        with condition():
            on += [block(), block()]
        off.append(block())
        off_us += off
        added_us.append(float(np.mean(on) - np.mean(off)))
    return from_samples(added_us), float(np.median(off_us))


class Bench:
    """One loaded model and the parts of llmkern that can be switched on in its decode loop."""

    def __init__(self, model: str, precision: str, device: Device, prompt_tokens: int) -> None:
        self.device = device
        loaded = loaded_at(model, precision, device)
        self._model = loaded.model
        self._folder = tempfile.TemporaryDirectory()
        options = TraceOptions(model, precision=precision, prompt_tokens=prompt_tokens)
        self._rig = rig_of(device, loaded, options, Path(self._folder.name) / "run", tuple(device.meters()))
        self.generation = self._rig.generation
        self._inputs = self.generation.inputs

    def generate(self, new_tokens: int) -> None:
        """Generate without any hook of llmkern."""
        with torch.inference_mode():
            self._model.generate(**self._inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        self.device.synchronize()

    def switched(self, condition: Condition, quads: int, block: int) -> Switched:
        """Decode 4 x *quads* blocks of *block* tokens and switch *condition* between them."""
        times_ms: list[float] = []
        cpu_ms: list[float] = []
        active = ExitStack()
        is_on = False
        begin_s = begin_cpu_s = 0.0

        def after_forward(*_: object) -> None:
            nonlocal begin_s, begin_cpu_s, is_on
            times_ms.append((time.perf_counter() - begin_s) * 1e3)
            cpu_ms.append((time.thread_time() - begin_cpu_s) * 1e3)
            # The first forward is the prefill, which belongs to no block.
            token = len(times_ms) - 1
            if token % block == 0:
                wanted = PATTERN[token // block % 4]
                if wanted and not is_on:
                    active.enter_context(condition())
                elif is_on and not wanted:
                    active.close()
                is_on = wanted
            begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()

        hook = self._model.register_forward_hook(after_forward)
        try:
            with active:
                self.generate(1 + 4 * quads * block)
        finally:
            hook.remove()
        on = np.asarray(PATTERN)
        found = []
        for values in (times_ms, cpu_ms):
            # [quad, block of four, tokens without the first ones]
            blocks = np.asarray(values[1 : 1 + 4 * quads * block]).reshape(quads, 4, block)[:, :, SETTLING:]
            found += [blocks[:, ~on].reshape(quads, -1), blocks[:, on].reshape(quads, -1)]
        return Switched(*found)

    @contextmanager
    def recorded(self, recorder: KernelRecorder, *, host_calls: bool) -> Iterator[None]:
        """What pass time adds to every launch; nothing is written."""
        recorder.start(host_calls=host_calls)
        try:
            yield
        finally:
            recorder.stop()
            recorder.drain()

    @contextmanager
    def called(self, recorder: KernelRecorder) -> Iterator[None]:
        """What pass calls adds to every launch: host calls as well, and ranges per layer."""
        with self.recorded(recorder, host_calls=True), self.generation.layers_annotated():
            yield
        self.generation.annotator.drain()

    def own_share(self, *, tracing: bool, seconds: float) -> float:
        """Return for how much of the time llmkern's own threads can hold up the launches in pass weigh or time."""
        with self._rig.metered(), self.device.recorder() as recorder, ExitStack() as stack:
            # The sensor looks for its tick before it comes to rest.
            time.sleep(0.5)
            self._rig.pace(RARE_TICK_S)
            sources: list[Source] = []
            if tracing:
                recorder.start(host_calls=False)
                sources.append(lambda: flushed(recorder, "time"))
            pump = stack.enter_context(self._rig.pumped("weigh", *sources))
            cost = OwnCost(pump, self._rig)
            begin_s = time.monotonic()
            while time.monotonic() - begin_s < seconds:
                with cost.window():
                    self.generation(32)
            if tracing:
                recorder.stop()
        facts = cost.facts()
        assert facts is not None
        return (facts.pump_s + facts.sensors_s) / facts.wall_s


def _launches(bench: Bench, say: Callable[[str, str, dict[str, Any], float | None, float], None]) -> None:
    """Measure what one launch costs with and without host calls."""
    for name, host_calls in (("kernel records", False), ("kernel records and host calls", True)):
        recorder = bench.device.recorder()

        def condition(
            recorder: KernelRecorder = recorder, host_calls: bool = host_calls
        ) -> AbstractContextManager[Any]:
            return bench.recorded(recorder, host_calls=host_calls)

        added_us, bare_us = per_launch(bench.device, condition, quads=60, launches=400)
        metrics = {"added_per_launch": metric(added_us, "µs"), "bare_launch": metric(bare_us, "µs")}
        text = f"{added_us.value:+.2f} [{added_us.low:+.2f}, {added_us.high:+.2f}] µs on {bare_us:.1f} µs"
        say(f"{name}, per launch", text, metrics, None, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--quads", type=int, default=32, help="samples per part; four blocks of tokens each")
    parser.add_argument("--block", type=int, default=8, help="tokens between two switches")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long own threads are watched, per pass")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments.model, arguments.precision, choose_device(arguments.device), arguments.prompt_tokens)
    # At full length: the first long generation asks CUDA for memory at every step.
    bench.generate(1 + 4 * arguments.quads * arguments.block)
    cuda = bench.device.capability() is not None
    gpu = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    both = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    cases = []
    parameters = {k: getattr(arguments, k) for k in ("model", "precision", "prompt_tokens", "quads", "block")}

    def say(name: str, text: str, metrics: dict[str, Any], limit: float | None, bound: float) -> None:
        passed = None if limit is None else bound <= limit
        note = "" if passed is not False else f"above the bar of {limit:.0%}"
        cases.append(case(name, parameters, metrics, passed, note))
        print(f"{name:32s} {text}  {'' if limit is None else 'passed' if passed else note}", flush=True)
        write("overhead", cases, arguments.results)

    def measure(
        name: str, condition: Condition, limit: float | None = None, quads: int = arguments.quads, more: float = 0.0
    ) -> None:
        found = bench.switched(condition, quads, arguments.block)
        effect, undisturbed, cpu = found.effect(), found.undisturbed(), found.cpu()
        metrics = {
            "effect": metric(effect, "1"),
            "effect_undisturbed": metric(undisturbed, "1"),
            "effect_on_cpu_time": metric(cpu, "1"),
            "off_per_token": metric(float(np.median(found.off_ms)), "ms", found.off_ms.ravel().tolist()),
            "on_per_token": metric(float(np.median(found.on_ms)), "ms", found.on_ms.ravel().tolist()),
        }
        text = f"{effect.value:+7.2%} [{effect.low:+.2%}, {effect.high:+.2%}] "
        text += f"{np.median(found.off_ms):.1f} -> {np.median(found.on_ms):.1f} ms/token"
        text += f", undisturbed {undisturbed.value:+.2%} [{undisturbed.low:+.2%}, {undisturbed.high:+.2%}]"
        text += f", CPU {cpu.value:+.2%} [{cpu.low:+.2%}, {cpu.high:+.2%}]"
        if more:
            metrics["with_own_threads"] = metric(effect.value + more, "1")
            text += f", with its own threads {effect.value + more:+.2%}"
        say(name, text, metrics, limit, effect.value + more)

    measure("nothing", nullcontext)
    weigh_share = bench.own_share(tracing=False, seconds=arguments.seconds)
    metrics = {"own_threads": metric(weigh_share, "1")}
    say("weigh: own threads", f"{weigh_share:+7.2%}", metrics, WEIGH_LIMIT, weigh_share)
    if cuda:
        bare = native().testing.BareCupti(cupti_candidates())
        measure("CUPTI's kernel records alone", lambda: running(bare))
        _launches(bench, say)
    recorder = bench.device.recorder()
    time_share = bench.own_share(tracing=True, seconds=arguments.seconds)
    metrics = {"own_threads": metric(time_share, "1")}
    say("time: own threads", f"{time_share:+7.2%}", metrics, None, time_share)
    measure("time", lambda: bench.recorded(recorder, host_calls=False), TIME_LIMIT, more=time_share)
    if cuda:
        measure("calls", lambda: bench.called(recorder))
    # Last: torch.profiler keeps CUPTI once it has it.
    few = max(4, arguments.quads // 4)
    measure("torch.profiler, GPU", lambda: profile(activities=gpu), quads=few)
    measure("torch.profiler, CPU and GPU", lambda: profile(activities=both), quads=few)
    print(write("overhead", cases, arguments.results))


if __name__ == "__main__":
    main()
