"""A board with known joules per operator, a floor that follows temperature, and sensors with all their vices.

The power curve is exact; what the run folder gets is what a counter and a 20 ms sensor would have shown of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmkern.runfolder import RunFolder, RunWriter
from llmkern.runfolder.schema import TABLES
from tests.synthetic import Truth, facts

MS = 1_000_000
S = 1_000_000_000


@dataclass(frozen=True)
class Part:
    """One kernel of an operator of several: blocks of 128 threads, seconds on the device, J above the floor."""

    name: str
    blocks: int
    seconds: float
    joule: float


@dataclass(frozen=True)
class Op:
    """Seconds on the device, J above the floor, bytes and FLOPs of one launch."""

    seconds: float
    joule: float
    moved_bytes: float
    flops: float
    capped_joule: float | None = None
    parts: tuple[Part, ...] = ()


# What LLM.int8() makes of one product, and what each of its kernels took alone on an H100.
INT8 = (
    Part("select columns", 222, 6.3e-6, 1.0e-3),
    Part("scale columns", 222, 5.1e-6, 0.13e-3),
    Part("gemm s8", 296, 28.9e-6, 14.5e-3),
    Part("dequant", 10, 1.9e-6, 0.028e-3),
    Part("cast", 37, 3.2e-6, 0.027e-3),
    Part("gemv outliers", 296, 3.1e-6, 0.12e-3),
)
INT8_SMALL = (
    Part("select columns", 7, 4.7e-6, 0.022e-3),
    Part("gemm s8", 56, 9.4e-6, 0.45e-3),
    Part("cast", 1, 2.6e-6, 0.011e-3),
)


def of_parts(parts: tuple[Part, ...], moved_bytes: float, flops: float) -> Op:
    """Return the operator of these kernels."""
    return Op(sum(p.seconds for p in parts), sum(p.joule for p in parts), moved_bytes, flops, parts=parts)


OPS = {
    "int8": of_parts(INT8, 68e6, 1.4e8),
    "int8 small": of_parts(INT8_SMALL, 2e6, 4e6),
    "gemv": Op(55e-6, 19e-3, 136e6, 1.4e8),
    "softmax": Op(40e-6, 4.5e-3, 6.7e7, 1e8),
    "cast": Op(3e-6, 0.05e-3, 2e5, 0.0),
    "norm": Op(4e-6, 0.2e-3, 1e6, 1e6),
    "gemm": Op(180e-6, 105e-3, 1e8, 1.4e11, capped_joule=84e-3),
}
TOKEN = {"gemv": 60, "softmax": 20, "cast": 80, "norm": 40}
CAPPED_PREFILL = {"gemm": 250, "cast": 100, "norm": 100}
PREFILL = {"gemv": 200, "softmax": 300, "cast": 100, "norm": 100}


@dataclass(frozen=True)
class Sensor:
    """Refresh periods and faults: *gain* is that of every reading, *noise_mj* per tick, *lag_ms* of the samples."""

    tick_ns: int = 100 * MS
    sample_ns: int = 20 * MS
    lag_ms: float = 5.0
    gain: float = 1.0
    noise_mj: float = 200.0


@dataclass
class Board:
    """Plays a whole run, replays included, and writes what the sensors saw."""

    sensor: Sensor = field(default_factory=Sensor)
    floor_w: float = 121.0
    slope_w_per_c: float = 0.75
    first_c: float = 38.0
    last_c: float = 46.0
    replayed: tuple[str, ...] = ("gemv", "softmax", "cast")
    # (operator, kernel): which kernels are replayed alone.
    alone: tuple[tuple[str, str], ...] = ()
    token: dict[str, int] = field(default_factory=lambda: TOKEN)
    prefill: dict[str, int] = field(default_factory=lambda: PREFILL)
    seed: int = 0
    # By how much of itself what an operator costs in replays differs from what it costs in the run (one sigma).
    unlike: float = 0.0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.start_ns = self.now_ns = 1_790_000_000 * S
        self.knots: list[tuple[int, float]] = []
        self.ranges: list[dict[str, Any]] = []
        self.kernels: list[dict[str, Any]] = []
        self.ops: list[dict[str, Any]] = []
        self.replays: list[dict[str, Any]] = []
        self.capped: list[tuple[int, int]] = []
        # Of its own, so that a board is the same but for this.
        apart = np.random.default_rng([self.seed, 1])
        self.apart = {name: float(np.exp(apart.normal(0.0, self.unlike))) for name in OPS}

    def rest(self, seconds: float) -> None:
        self.now_ns += round(seconds * S)

    def work(self, seconds: float, joule: float) -> None:
        self.knots += [(self.now_ns, 0.0), (self.now_ns + max(1, round(seconds * S)), joule)]
        self.rest(seconds)

    def mark(self, start_ns: int, category: str, pass_: str, **more: Any) -> None:
        self.ranges.append(
            {"start_ns": start_ns, "end_ns": self.now_ns, "category": category, "pass": pass_, "name": category, **more}
        )

    def step(self, launches: dict[str, int], host_s: float, pass_: str) -> None:
        """Launch operators spread over *host_s*; recorded kernel by kernel where *pass_* is time or inspect."""
        order = [name for name, count in launches.items() for _ in range(count)]
        gap_s = max(0.0, host_s - sum(OPS[n].seconds for n in order)) / len(order)
        for name in order:
            self.rest(gap_s)
            begin_ns = self.now_ns
            capped_joule = OPS[name].capped_joule if launches is self.prefill else None
            joule = OPS[name].joule if capped_joule is None else capped_joule
            for part in OPS[name].parts or (Part(name, 0, OPS[name].seconds, joule),):
                part_ns = self.now_ns
                self.work(part.seconds, part.joule)
                if pass_ != "weigh":
                    grid = {f"grid_{axis}": size for axis, size in zip("xyz", (part.blocks, 1, 1), strict=True)}
                    block = {f"block_{axis}": size for axis, size in zip("xyz", (128, 1, 1), strict=True)}
                    shape = {**grid, **block} if part.blocks else {}
                    row = {"start_ns": part_ns, "end_ns": self.now_ns, "name": part.name, "pass": pass_}
                    self.kernels.append({**row, **shape})
            if pass_ == "inspect":
                op = OPS[name]
                self.ops.append(
                    {
                        "start_ns": begin_ns - 100,
                        "end_ns": self.now_ns,
                        "op": name,
                        "signature": name,
                        "module": "model",
                        "moved_bytes": int(op.moved_bytes),
                        "flops": int(op.flops),
                    }
                )

    def generate(self, new_tokens: int, pass_: str, **marks: Any) -> None:
        begin_ns = self.now_ns
        # The host is as moody as a virtual one.
        mood = 1 + 0.2 * abs(self.random.standard_normal())
        # At the cap the device is the one to wait for.
        self.step(self.prefill, 0.040 if "gemm" in self.prefill else 0.050 * mood, pass_)
        self.mark(begin_ns, "token", pass_, phase="prefill", token=0, new_tokens=new_tokens, **marks)
        self.mark(begin_ns, "phase", pass_, phase="prefill", new_tokens=new_tokens, **marks)
        decode_ns = self.now_ns
        for token in range(1, new_tokens):
            start_ns = self.now_ns
            self.step(self.token, 0.025 * mood, pass_)
            self.mark(start_ns, "token", pass_, phase="decode", token=token, new_tokens=new_tokens, **marks)
        if new_tokens > 1:
            self.mark(decode_ns, "phase", pass_, phase="decode", new_tokens=new_tokens, **marks)
        self.mark(begin_ns, "generate", pass_, new_tokens=new_tokens, **marks)

    def align(self, ticks: int) -> None:
        period = self.sensor.tick_ns
        self.now_ns += ticks * period - (self.now_ns - self.start_ns) % period + MS

    def play(self) -> None:
        self.rest(0.5)
        self._idle()
        for round_ in range(6):
            for new_tokens, repeats in ((1, 40), (24, 3)):
                self.align(1)
                begin_ns = self.now_ns
                for repeat in range(repeats):
                    self.generate(new_tokens, "weigh", round=round_, repeat=repeat)
                self.mark(begin_ns, "window", "weigh", round=round_, new_tokens=new_tokens)
                if new_tokens == 1 and "gemm" in self.prefill:
                    self.capped.append((begin_ns, self.now_ns))
                self._idle(seconds=1.0)
        self._idle()
        self.generate(6, "time", repeat=0)
        self.rest(0.1)
        self.generate(3, "inspect")
        for name in self.replayed:
            for duty in (0.5, 0.9):
                self._replay(name, duty, OPS[name].seconds, self._replayed_j(name, duty))
        for name, kernel in self.alone:
            (part,) = (p for p in OPS[name].parts if p.name == kernel)
            self._replay(name, 1.0, part.seconds, part.joule, kernel)
        if self.replayed:
            self._idle("replay")
        self.rest(0.5)

    def _idle(self, pass_: str = "weigh", seconds: float = 2.5) -> None:
        begin_ns = self.now_ns
        self.rest(seconds)
        self.mark(begin_ns, "idle", pass_)

    def _replayed_j(self, name: str, duty: float) -> float:
        op = OPS[name]
        # Only at high duty does the load reach the cap.
        return op.capped_joule if op.capped_joule is not None and duty > 0.8 else op.joule

    def _replay(self, name: str, duty: float, seconds: float, joule: float, kernel: str | None = None) -> None:
        count = max(1, round(0.02 / seconds))
        self.align(1)
        begin_ns, launches = self.now_ns, 0
        while self.now_ns - begin_ns < 2 * S:
            self.work(count * seconds, count * joule * self.apart[name])
            self.rest(count * seconds * (1 / duty - 1))
            launches += count
        self.replays.append(
            {
                "signature": name,
                "kernel": kernel,
                "start_ns": begin_ns,
                "end_ns": self.now_ns,
                "launches": launches,
                "duty": duty,
                "captured": True,
            }
        )
        if kernel is None and joule != OPS[name].joule:
            self.capped.append((begin_ns, self.now_ns))
        self.align(2)

    def temperature_c(self, times_ns: np.ndarray) -> np.ndarray:
        share = (times_ns - self.start_ns) / (self.now_ns - self.start_ns)
        return self.first_c + (self.last_c - self.first_c) * share

    def energy_j(self, times_ns: np.ndarray) -> np.ndarray:
        """Return the true energy in J since the start."""
        at = np.array([k[0] for k in self.knots]) - self.start_ns
        dynamic = np.interp(times_ns - self.start_ns, at, np.cumsum([k[1] for k in self.knots]))
        seconds = (times_ns - self.start_ns) / S
        mean_c = (self.temperature_c(times_ns) + self.first_c) / 2
        result: np.ndarray = dynamic + seconds * (self.floor_w + self.slope_w_per_c * (mean_c - self.first_c))
        return result

    def write(self, path: Path) -> RunFolder:
        known = facts(Truth(new_tokens=24))
        writer = RunWriter(path, replace(known, device=replace(known.device, multiprocessors=132)))
        sensor = self.sensor
        ticks = np.arange(self.start_ns, self.now_ns, sensor.tick_ns)
        noise_j = self.random.normal(0.0, sensor.noise_mj / 1e3, len(ticks))
        energy_mj = np.round((1e6 + self.energy_j(ticks) * sensor.gain + noise_j) * 1e3).astype(np.int64)
        samples = np.arange(self.start_ns + sensor.sample_ns, self.now_ns, sensor.sample_ns)
        power_w = np.diff(self.energy_j(samples - int(sensor.lag_ms * MS))) / (sensor.sample_ns / S) * sensor.gain
        self._append(
            writer,
            "energy",
            [
                {"timestamp_ns": t, "device": 0, "sensor": "nvml_total", "energy_mj": e, "uncertainty_ns": 1000}
                for t, e in zip(ticks, energy_mj, strict=True)
            ],
        )
        readings = [
            {"timestamp_ns": t, "device": 0, "sensor": "samples", "power_mw": round(w * 1e3)}
            for t, w in zip(samples[1:], power_w, strict=True)
        ]
        readings += [
            {
                "timestamp_ns": t,
                "device": 0,
                "sensor": "instant",
                "power_mw": 0,
                "temperature_c": round(c),
                "throttle": 4 * any(a <= t <= b for a, b in self.capped),
            }
            for t, c in zip(ticks, self.temperature_c(ticks), strict=True)
        ]
        self._append(writer, "power", readings)
        self._append(writer, "ranges", [{"thread": 7, "domain": "llmkern", "depth": 0, **r} for r in self.ranges])
        kernels = [{"device": 0, "kind": "kernel", "correlation_id": i, **k} for i, k in enumerate(self.kernels, 1)]
        self._append(writer, "kernels", kernels)
        self._append(
            writer,
            "launches",
            [
                {
                    "pass": k["pass"],
                    "start_ns": k["start_ns"] - 50,
                    "end_ns": k["start_ns"] - 10,
                    "correlation_id": k["correlation_id"],
                    "api": "cudaLaunchKernel",
                }
                for k in kernels
            ],
        )
        self._append(writer, "ops", self.ops)
        self._append(writer, "replays", self.replays)
        writer.merge()
        writer.publish()
        return RunFolder(path)

    @staticmethod
    def _append(writer: RunWriter, name: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            writer.append(name, {c: [row.get(c) for row in rows] for c in TABLES[name].names})
