"""A board with known joules per operator, a floor that follows temperature, and sensors with all their vices.

The power curve is exact; what the run folder gets is what a counter and a 20 ms sensor would have shown of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmkern.runfolder import RunFolder, RunWriter
from llmkern.runfolder.schema import TABLES
from tests.synthetic import Truth, facts

MS = 1_000_000
S = 1_000_000_000
# Of the floor's power; how long work takes to warm a board, and the floor to wander.
GRID_NS = 50 * MS
WARMING_S, WANDER_S = 5.0, 3.0


@dataclass(frozen=True)
class Part:
    """One kernel of an operator of several: blocks of 128 threads, seconds on the device, J above the floor."""

    name: str
    blocks: int
    seconds: float
    joule: float


@dataclass(frozen=True)
class Op:
    """Seconds on the device, J above the floor (*capped_joule* at CAPPED_MHZ), bytes and FLOPs of one launch."""

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


# The clock at full speed, and that at which an operator takes its capped_joule.
FULL_MHZ, CAPPED_MHZ = 1980.0, 1500.0


@dataclass(frozen=True)
class Vices:
    """What a real board and its host do beside the work.

    *wander_w*: rests and loads scatter about the line of the floor (one sigma, anew every few seconds). *convex*: by
    how much of itself the floor's slope grows per °C. *thermal_c_per_w*: by how much work warms the board. *gap_w*:
    what a busy host adds between launches. *stretch_s*: by how much a recorder lengthens every kernel. *replay_share*:
    what a replay of an operator takes of what it takes in the run. *clocks_mhz* at the power cap: of run and replays.
    """

    wander_w: float = 0.0
    convex: float = 0.0
    thermal_c_per_w: float = 0.0
    gap_w: float = 0.0
    stretch_s: float = 0.0
    replay_share: Mapping[str, float] = field(default_factory=dict)
    clocks_mhz: tuple[float, float] | None = None


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
    # Until the host has launched a token.
    host_s: float = 0.025
    vices: Vices = field(default_factory=Vices)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.start_ns = self.now_ns = 1_790_000_000 * S
        self.knots: list[tuple[int, float]] = []
        self.ranges: list[dict[str, Any]] = []
        self.kernels: list[dict[str, Any]] = []
        self.ops: list[dict[str, Any]] = []
        self.replays: list[dict[str, Any]] = []
        # (start, end, clock)
        self.capped: list[tuple[int, int, float]] = []
        # Of its own, so that a board is the same but for this.
        apart = np.random.default_rng([self.seed, 1])
        self.apart = {
            name: float(np.exp(apart.normal(0.0, self.unlike))) * self.vices.replay_share.get(name, 1.0) for name in OPS
        }

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
            self.work(gap_s, gap_s * self.vices.gap_w)
            begin_ns = self.now_ns
            joule = self.joule_of(name, "prefill" if launches is self.prefill else "decode")
            for part in OPS[name].parts or (Part(name, 0, OPS[name].seconds, joule),):
                part_ns = self.now_ns
                self.work(part.seconds + (self.vices.stretch_s if pass_ != "weigh" else 0.0), part.joule)
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

    def joule_of(self, name: str, phase: str) -> float:
        """Return the J above the floor of a launch of operator *name* in *phase* of the run."""
        return self._at(name, self._clocks[0] if phase == "prefill" and "gemm" in self.prefill else FULL_MHZ)

    @property
    def _clocks(self) -> tuple[float, float]:
        return self.vices.clocks_mhz or (CAPPED_MHZ, CAPPED_MHZ)

    @staticmethod
    def _at(name: str, clock_mhz: float) -> float:
        op = OPS[name]
        if op.capped_joule is None:
            return op.joule
        share = (FULL_MHZ - clock_mhz) / (FULL_MHZ - CAPPED_MHZ)
        return op.joule + (op.capped_joule - op.joule) * share

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
            self.step(self.token, self.host_s * mood, pass_)
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
                    self.capped.append((begin_ns, self.now_ns, self._clocks[0]))
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
        # Only at high duty does the load reach the cap.
        return self._at(name, self._clocks[1] if duty > 0.8 else FULL_MHZ)

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
            self.capped.append((begin_ns, self.now_ns, self._clocks[1]))
        self.align(2)

    def _dynamic_j(self, times_ns: np.ndarray) -> np.ndarray:
        at = np.array([k[0] for k in self.knots]) - self.start_ns
        return np.interp(times_ns - self.start_ns, at, np.cumsum([k[1] for k in self.knots]))

    @cached_property
    def _grid(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return times in ns, temperatures and watts of the floor there; made when all has been played."""
        times_ns = np.arange(self.start_ns, self.now_ns + GRID_NS, GRID_NS)
        share = (times_ns - self.start_ns) / (self.now_ns - self.start_ns)
        celsius = self.first_c + (self.last_c - self.first_c) * share
        load_w = np.diff(self._dynamic_j(times_ns), append=np.nan) / (GRID_NS / S)
        load_w[-1] = load_w[-2]
        warmer, keep = 0.0, np.exp(-GRID_NS / S / WARMING_S)
        for i, watts in enumerate(load_w if self.vices.thermal_c_per_w else ()):
            warmer = warmer * keep + watts * self.vices.thermal_c_per_w * (1 - keep)
            celsius[i] += warmer
        floor_w = self.floor_at(celsius)
        if self.vices.wander_w:
            wander = np.random.default_rng([self.seed, 2]).normal(0.0, self.vices.wander_w, len(times_ns))
            floor_w += np.repeat(wander, round(WANDER_S * S / GRID_NS))[: len(times_ns)]
        return times_ns, celsius, floor_w

    def floor_at(self, celsius: np.ndarray) -> np.ndarray:
        """Return the idle power in W at *celsius*, but for what it wanders."""
        warmer = celsius - self.first_c
        result: np.ndarray = self.floor_w + self.slope_w_per_c * warmer * (1 + self.vices.convex * warmer / 2)
        return result

    def temperature_c(self, times_ns: np.ndarray) -> np.ndarray:
        grid_ns, celsius, _ = self._grid
        return np.interp(times_ns - self.start_ns, grid_ns - self.start_ns, celsius)

    def energy_j(self, times_ns: np.ndarray) -> np.ndarray:
        """Return the true energy in J since the start."""
        grid_ns, _, floor_w = self._grid
        until_j = np.concatenate([[0.0], np.cumsum((floor_w[1:] + floor_w[:-1]) / 2)]) * GRID_NS / S
        return self._dynamic_j(times_ns) + np.interp(times_ns - self.start_ns, grid_ns - self.start_ns, until_j)

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
                "throttle": 4 * any(a <= t <= b for a, b, _ in self.capped),
                **self._clock(int(t)),
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

    def _clock(self, time_ns: int) -> dict[str, int]:
        if self.vices.clocks_mhz is None:
            return {}
        capped = [mhz for start_ns, end_ns, mhz in self.capped if start_ns <= time_ns <= end_ns]
        return {"sm_clock_mhz": round(capped[0] if capped else FULL_MHZ)}

    @staticmethod
    def _append(writer: RunWriter, name: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            writer.append(name, {c: [row.get(c) for row in rows] for c in TABLES[name].names})
