"""Joules of a call by the estimator of the attribution: windows of nothing else, less the idle floor of this board."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from llmkern.attribute.energy.counter import EnergyCurve
from llmkern.attribute.energy.floor import Floor, mean_temperature, measure_floor
from llmkern.attribute.split.estimator import estimate_marginals
from llmkern.attribute.split.prior import Features
from llmkern.attribute.split.unknowns import Window
from llmkern.estimate import Estimate
from llmkern.evaluate.job import Energy
from llmkern.evaluate.timing import Turns
from llmkern.record.device.interface import Device, EnergyMeter

WINDOW_S = 1.2
REST_S = 1.3
ROUNDS = 3
# A burst of this length, then a rest: the mean power of a decode step rather than that of a furnace.
_BURST_S = 0.002
DUTY = 0.8


@dataclass
class Span:
    """A stretch of work or rest; *calls* were made in it."""

    start_ns: int
    end_ns: int
    calls: int = 0


@dataclass
class Scale:
    """The board's energy counter while a worker lives: windows of work and of rest, in the order they came."""

    device: Device
    meter: EnergyMeter
    rests: list[Span] = field(default_factory=list)
    ticks: list[pd.DataFrame] = field(default_factory=list)
    power: list[pd.DataFrame] = field(default_factory=list)

    def rest(self) -> None:
        """Let the board rest for a floor sample."""
        self.device.synchronize()
        begin = time.time_ns()
        time.sleep(REST_S)
        self.rests.append(Span(begin, time.time_ns()))
        self._drain()

    def weigh(self, turns: Turns, us_of_call: float) -> list[Span]:
        """Run *turns* in windows, each begun at a tick of the counter and followed by two."""
        graph = self.device.captured(turns.in_turn)
        run = turns.in_turn if graph is None else graph.replay
        bursts = max(1, round(_BURST_S * 1e6 / max(us_of_call * turns.calls, 0.1)))
        spans = []
        for _ in range(ROUNDS):
            self.meter.wait_for_tick(1.0)
            span = Span(time.time_ns(), 0)
            end_s = time.monotonic() + WINDOW_S
            while time.monotonic() < end_s:
                begin_s = time.perf_counter()
                for _ in range(bursts):
                    run()
                self.device.synchronize()
                span.calls += bursts * turns.calls
                time.sleep((time.perf_counter() - begin_s) * (1 / DUTY - 1))
            span.end_ns = time.time_ns()
            for _ in range(2):
                self.meter.wait_for_tick(1.0)
            spans.append(span)
        if graph is not None:
            graph.reset()
        self._drain()
        return spans

    def _drain(self) -> None:
        rows = self.meter.drain()
        for columns, into in ((rows["energy"], self.ticks), (rows["power"], self.power)):
            into.append(pd.DataFrame({name: np.asarray(_plain(values)) for name, values in columns.items()}))

    def joules(self, spans: list[Span], us_of_call: float, stored_bytes: int) -> Energy | None:
        """Return the mJ per call of the work in *spans*; None where the counter or the floor says too little."""
        curve, floor, temperature = self._curve(), self._floor(), self._temperature()
        if floor is None:
            return None
        windows = []
        for number, span in enumerate(spans):
            framed = curve.window(span.start_ns, span.end_ns)
            if framed is None:
                continue
            before, after, joule = framed
            celsius = mean_temperature(temperature, pd.DataFrame({"start_ns": [before], "end_ns": [after]}))
            floor_w = floor.at(celsius).value
            degrees = floor.degrees(celsius)
            launches = {"call": float(span.calls)}
            windows.append(Window(f"{number}", joule, (after - before) / 1e9, floor_w, launches, degrees=degrees))
        if len(windows) < 2:
            return None
        features = {"call": Features(us_of_call / 1e6, float(stored_bytes), 0.0)}
        mean_w = float(np.mean([w.mean_w for w in windows]))
        dynamic = estimate_marginals(windows, features, doubt=floor.doubt).per_launch("call", regime=mean_w)
        at_floor_j = float(np.mean([w.floor_w for w in windows])) * us_of_call / 1e6
        return Energy(
            dynamic_mj=_mj(dynamic, 0.0),
            total_mj=_mj(dynamic, at_floor_j),
            floor_w=float(np.mean([w.floor_w for w in windows])),
            mean_w=mean_w,
            windows=len(windows),
        )

    def joules_of(self, spans: list[Span]) -> list[float]:
        """Return the J per call of each of *spans*, rests at its ends taken off at the floor; NaN where unknown."""
        curve, floor, temperature = self._curve(), self._floor(), self._temperature()
        found = []
        for span in spans:
            framed = curve.window(span.start_ns, span.end_ns)
            if framed is None or floor is None:
                found.append(float("nan"))
                continue
            before, after, joule = framed
            celsius = mean_temperature(temperature, pd.DataFrame({"start_ns": [before], "end_ns": [after]}))
            idle_s = ((after - before) - (span.end_ns - span.start_ns)) / 1e9
            found.append((joule - floor.at(celsius).value * idle_s) / span.calls)
        return found

    def _curve(self) -> EnergyCurve:
        ticks = pd.concat(self.ticks)
        return EnergyCurve(ticks["timestamp_ns"].to_numpy(), ticks["energy_mj"].to_numpy())

    def _temperature(self) -> pd.DataFrame:
        power = pd.concat(self.power)
        return power[["timestamp_ns", "temperature_c"]].dropna().astype(float)

    def _floor(self) -> Floor | None:
        spans = pd.DataFrame([{"start_ns": s.start_ns, "end_ns": s.end_ns} for s in self.rests])
        return None if spans.empty else measure_floor(self._curve(), spans, self._temperature())


def _mj(joules: Estimate, more_j: float) -> tuple[float, float, float]:
    low = joules.value if joules.low is None else joules.low
    high = joules.value if joules.high is None else joules.high
    return (1e3 * (joules.value + more_j), 1e3 * (low + more_j), 1e3 * (high + more_j))


def _plain(values: object) -> object:
    to_pandas = getattr(values, "to_pandas", None)
    return values if to_pandas is None else to_pandas()


@contextmanager
def scale_of(device: Device) -> Iterator[Scale | None]:
    """Yield the board's scale, reading every tick, or None where it has no energy counter."""
    meters = device.meters()
    if not meters:
        yield None
        return
    meter = meters[0]
    meter.start()
    try:
        meter.pace(0.0)
        meter.wait_for_tick(1.0)
        scale = Scale(device, meter)
        scale.rest()
        yield scale
    finally:
        meter.stop()
