"""A run folder with known truth: a board of known floor and kernel power, seen through a ticking counter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmkern.runfolder import RunFolder, RunWriter
from llmkern.runfolder.facts import (
    DeviceFacts,
    HostFacts,
    ModelFacts,
    OptionFacts,
    PromptFacts,
    RecorderFacts,
    RunFacts,
)

S = 1_000_000_000
MS = 1_000_000


@dataclass
class Truth:
    """The board and the workload; powers in W, times in s."""

    floor_w: float = 120.0
    kernel_w: float = 400.0
    prefill_s: float = 0.050
    prefill_busy: float = 0.9
    token_s: float = 0.030
    kernels_per_token: int = 10
    busy_per_token_s: float = 0.006
    new_tokens: int = 16
    rounds: int = 4
    tick_ns: int = 100 * MS
    slope_w_per_c: float = 0.0
    temperature_c: float = 50.0
    energy: bool = True
    jitter: float = 0.0
    # Lengths of prefills of other prompts, weighed after each round.
    set_prefills_s: tuple[float, ...] = ()

    @property
    def prefill_j(self) -> float:
        busy_s = self.prefill_s * self.prefill_busy
        return self.floor_w * self.prefill_s + (self.kernel_w - self.floor_w) * busy_s

    @property
    def token_j(self) -> float:
        return self.floor_w * self.token_s + (self.kernel_w - self.floor_w) * self.busy_per_token_s


class Builder:
    """Plays a run on a clock of its own and writes what sensors and recorder would have seen."""

    def __init__(self, truth: Truth, seed: int = 0) -> None:
        self.truth = truth
        self.now_ns = 1_790_000_000 * S
        self.ranges: list[tuple] = []
        self.kernels: list[tuple] = []
        self.launches: list[tuple] = []
        self.busy: list[tuple[int, int]] = []
        self.start_ns = self.now_ns
        self.random = np.random.default_rng(seed)
        self.correlation = 0

    def rest(self, seconds: float) -> None:
        self.now_ns += round(seconds * S)

    def range(self, start: int, name: str, category: str, pass_: str, **more: object) -> None:
        self.ranges.append((pass_, start, self.now_ns, name, category, more))

    def run(self, busy_s: float, total_s: float, kernels: int, traced: bool) -> None:
        """Run *kernels* kernels spread evenly over *total_s*."""
        total_s *= 1 + self.truth.jitter * self.random.standard_normal()
        slot = round(total_s * S / kernels)
        length = round(busy_s * S / kernels)
        for i in range(kernels):
            start = self.now_ns + i * slot + (slot - length)
            self.busy.append((start, start + length))
            if traced:
                self.correlation += 1
                self.kernels.append((start, start + length, self.correlation, f"void kernel_{i % 3}<float>(int)"))
                self.launches.append((start - 5_000, start - 2_000, self.correlation))
        self.now_ns += slot * kernels

    def generate(self, new_tokens: int, pass_: str, round_: int | None, repeat: int) -> None:
        t = self.truth
        traced = pass_ == "time"
        begin = self.now_ns
        marks = {"round": round_, "repeat": repeat, "new_tokens": new_tokens}
        self.run(t.prefill_s * t.prefill_busy, t.prefill_s, 5, traced)
        self.range(begin, "token 0", "token", pass_, phase="prefill", token=0, **marks)
        self.range(begin, "prefill", "phase", pass_, phase="prefill", **marks)
        decode = self.now_ns
        for token in range(1, new_tokens):
            start = self.now_ns
            self.run(t.busy_per_token_s, t.token_s, t.kernels_per_token, traced)
            self.range(start, f"token {token}", "token", pass_, phase="decode", token=token, **marks)
        if new_tokens > 1:
            self.range(decode, "decode", "phase", pass_, phase="decode", **marks)
        self.range(begin, f"generate({new_tokens})", "generate", pass_, **marks)

    def align(self) -> None:
        """Go on to just after the next counter tick."""
        tick = self.truth.tick_ns
        self.now_ns += tick - (self.now_ns - self.start_ns) % tick + MS

    def play(self) -> None:
        t = self.truth
        self.rest(0.5)
        self._idle()
        for round_ in range(t.rounds):
            for new_tokens, length_s in (
                (1, t.prefill_s),
                (t.new_tokens, t.prefill_s + t.token_s * (t.new_tokens - 1)),
            ):
                self.align()
                begin = self.now_ns
                for repeat in range(int(np.ceil(2.0 / length_s))):
                    self.generate(new_tokens, "weigh", round_, repeat)
                self.range(begin, "window", "window", "weigh", round=round_, new_tokens=new_tokens)
                self.align()
                self.align()
            if t.set_prefills_s:
                self._prefill_set(round_)
        self._idle()
        for repeat in range(2):
            self.generate(t.new_tokens, "time", None, repeat)
        self.rest(0.5)

    def _prefill_set(self, round_: int) -> None:
        self.align()
        window = self.now_ns
        for repeat in range(int(np.ceil(2.0 / sum(self.truth.set_prefills_s)))):
            for length_s in self.truth.set_prefills_s:
                begin = self.now_ns
                self.run(length_s * self.truth.prefill_busy, length_s, 5, False)
                self.range(begin, "generate(1)", "generate", "weigh", round=round_, repeat=repeat, new_tokens=1)
        self.range(window, "prefills of the prompt set", "prompt set", "weigh", round=round_)
        self.align()
        self.align()

    def _idle(self) -> None:
        begin = self.now_ns
        self.rest(2.5)
        self.range(begin, "idle", "idle", "weigh")

    def energy_j(self, times_ns: np.ndarray) -> np.ndarray:
        """Return the true energy in J from the start to each time."""
        starts = np.array([b[0] for b in self.busy])
        ends = np.array([b[1] for b in self.busy])
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
        before = np.searchsorted(starts, times_ns, side="right")
        full = np.concatenate([[0], np.cumsum(ends - starts)])[before]
        last = np.maximum(before - 1, 0)
        overhang = np.where(before > 0, np.maximum(0, ends[last] - times_ns), 0)
        busy_s = (full - overhang) / S
        t = self.truth
        return t.floor_w * (times_ns - self.start_ns) / S + (t.kernel_w - t.floor_w) * busy_s

    def write(self, path: Path, status: str = "complete") -> RunFolder:
        t = self.truth
        writer = RunWriter(path, facts(t))
        keys = ("phase", "token", "round", "repeat", "new_tokens")
        for pass_ in ("weigh", "time"):
            rows = [r for r in self.ranges if r[0] == pass_]
            writer.append(
                "ranges",
                {
                    "pass": pass_,
                    "start_ns": [r[1] for r in rows],
                    "end_ns": [r[2] for r in rows],
                    "thread": 7,
                    "domain": "llmkern",
                    "name": [r[3] for r in rows],
                    "category": [r[4] for r in rows],
                    "depth": 0,
                    **{k: [r[5].get(k) for r in rows] for k in keys},
                },
            )
        zeros = dict.fromkeys(
            ("context", "graph_id", "graph_node_id", "registers", "shared_bytes", "copied_bytes"), 0
        ) | {f"{p}_{a}": 1 for p in ("grid", "block") for a in "xyz"}
        writer.append(
            "kernels",
            {
                "pass": "time",
                "start_ns": [k[0] for k in self.kernels],
                "end_ns": [k[1] for k in self.kernels],
                "correlation_id": [k[2] for k in self.kernels],
                "name": [k[3] for k in self.kernels],
                "device": 0,
                "stream": 7,
                "kind": "kernel",
                **zeros,
            },
        )
        writer.append(
            "launches",
            {
                "pass": "time",
                "start_ns": [x[0] for x in self.launches],
                "end_ns": [x[1] for x in self.launches],
                "correlation_id": [x[2] for x in self.launches],
                "process": 1,
                "thread": 7,
                "api": "cudaLaunchKernel",
            },
        )
        if t.energy:
            ticks = np.arange(self.start_ns, self.now_ns, t.tick_ns)
            writer.append(
                "energy",
                {
                    "timestamp_ns": ticks,
                    "device": 0,
                    "sensor": "nvml_total",
                    "energy_mj": np.round(self.energy_j(ticks) * 1e3).astype(np.int64),
                    "uncertainty_ns": 1000,
                },
            )
            samples = np.arange(self.start_ns, self.now_ns, 20 * MS)
            power_w = np.diff(self.energy_j(samples)) / 0.020
            writer.append(
                "power",
                {
                    "timestamp_ns": samples[1:],
                    "device": 0,
                    "sensor": "samples",
                    "power_mw": np.round(power_w * 1e3).astype(np.int64),
                    "sm_clock_mhz": None,
                    "temperature_c": None,
                    "throttle": None,
                },
            )
            writer.append(
                "power",
                {
                    "timestamp_ns": ticks,
                    "device": 0,
                    "sensor": "instant",
                    "power_mw": 100_000,
                    "sm_clock_mhz": 1980,
                    "temperature_c": round(t.temperature_c),
                    "throttle": 0,
                },
            )
        writer.merge()
        if status == "complete":
            writer.publish()
            return RunFolder(path)
        writer.give_up(status, "as a test wants it")
        return RunFolder(writer.path)


def facts(truth: Truth) -> RunFacts:
    return RunFacts(
        started="2026-11-23T08:00:00+00:00",
        options=OptionFacts(model="qwen-tiny", precision="bf16", batch=1, new_tokens=truth.new_tokens),
        device=DeviceFacts(kind="cuda", index=0, name="Synthetic GPU", power_limit_mw=700_000),
        host=HostFacts(memory_bytes=64 * 2**30),
        versions={"torch": "0"},
        model=ModelFacts(
            name="qwen-tiny",
            weights="random",
            weights_note="Weights are random.",
            weight_bytes=10**7,
            parameters=10**7,
        ),
        prompts=PromptFacts(tokens=100, effective_tokens=(100,), computed_tokens=100),
        recorders={"time": RecorderFacts(source="synthetic", kernels=1, launches=1)},
    )


def synthetic_run(
    path: Path, truth: Truth | None = None, *, seed: int = 0, **changes: object
) -> tuple[RunFolder, Truth]:
    """Write a synthetic run and return it with its truth."""
    truth = truth or Truth(**changes)  # type: ignore[arg-type]
    builder = Builder(truth, seed)
    builder.play()
    return builder.write(path), truth
