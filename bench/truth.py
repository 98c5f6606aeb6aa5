"""What a planted call takes by the counter: windows of a generation with and without it, in random order."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bench.planted import Planted, growing
from llmkern.attribute.energy.counter import EnergyCurve
from llmkern.attribute.energy.floor import Floor, mean_temperature, measure_floor
from llmkern.estimate import Estimate, from_samples
from llmkern.record.rig import RARE_TICK_S, Rig

WINDOW_S, REST_S = 1.5, 1.2
# After so many windows comes a rest, and between two of them one without anything planted.
_BETWEEN_RESTS = 8
_WITHOUT = 4


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

    def rest(self) -> tuple[int, int]:
        """Let the device rest, with the ticks of the counter close together, and return the start and end in ns."""
        self._rig.pace(0.0)
        start_ns, end_ns, _ = self.window(lambda: time.sleep(0.05), REST_S)
        self._rig.pace(RARE_TICK_S)
        return start_ns, end_ns

    def curve(self) -> EnergyCurve:
        energy = pd.concat(self._energy)
        return EnergyCurve(energy["timestamp_ns"].to_numpy(), energy["energy_mj"].to_numpy())

    def temperature(self) -> pd.DataFrame:
        if not self._power:
            return pd.DataFrame({"timestamp_ns": [], "temperature_c": []})
        return pd.concat(self._power)[["timestamp_ns", "temperature_c"]].dropna().sort_values("timestamp_ns")


@dataclass(frozen=True)
class _Seen:
    """One window: what grew in it (None: nothing), in which round, and *planted_s* of the host in planted gaps."""

    what: str | None
    round: int
    start_ns: int
    end_ns: int
    count: int
    planted_s: float


def truths(
    rig: Rig, planted: Mapping[str, Planted], new_tokens: int, rounds: int, *, taken_away: bool = False
) -> dict[str, Estimate]:
    """Return the J of one call of each of *planted* by the counter: above the floor, of a gap all of them.

    A round has a window with each, in random order, and some without any: what these took is taken off. If they are to
    be *taken_away*, a window is without one of them and the others have all.
    """
    counter, shuffled = Counter(rig), random.Random(new_tokens)
    rests, seen = [counter.rest()], []
    for round_ in range(rounds):
        names: list[str | None] = [*planted, *[None] * max(2, len(planted) // _WITHOUT)]
        shuffled.shuffle(names)
        for number, name in enumerate(names):
            there = [one for other, one in planted.items() if (other == name) != taken_away]
            with growing(there):
                # What grew only now is slow at first.
                rig.generation(min(2, new_tokens))
                for one in there:
                    one.seconds = 0.0
                span = counter.window(lambda: rig.generation(new_tokens), WINDOW_S)
            gap_s = sum(one.seconds for one in there if one.plant.is_gap)
            seen.append(_Seen(name, round_, *span, gap_s))
            if number % _BETWEEN_RESTS == _BETWEEN_RESTS - 1:
                rests.append(counter.rest())
    rests.append(counter.rest())
    curve, temperature = counter.curve(), counter.temperature()
    floor = measure_floor(curve, pd.DataFrame(rests, columns=["start_ns", "end_ns"]), temperature)
    assert floor is not None
    joules: dict[str | None, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for window in seen:
        above_j = _above_floor_j(curve, floor, temperature, window)
        joules[window.what][window.round].append(above_j / window.count)
    others = {round_: float(np.median(found)) for round_, found in joules[None].items()}
    steps = (-1 if taken_away else 1) * max(1, new_tokens - 1)
    return {
        name: from_samples(
            [(found[0] - others[round_]) / own.calls_per_step / steps for round_, found in joules[name].items()]
        )
        for name, own in planted.items()
    }


def slope(calls: Sequence[tuple[int, Estimate]], recorded: int) -> tuple[Estimate, Estimate]:
    """Return the J of a call with *recorded* equal kernels less these, and of one of these: the slope over *calls*."""
    counts = np.array([count for count, _ in calls], float)
    # Windows of another kind share no error.
    every = [np.random.default_rng(i).permutation(e.draws) for i, (_, e) in enumerate(calls) if e.draws is not None]
    values = np.array([[estimate.value] for _, estimate in calls])
    draws = np.array(every) if len(every) == len(calls) else np.empty((len(calls), 0))
    one_j = np.polyfit(counts, np.hstack([values, draws]), 1)[0]
    rest_j = np.hstack([values, draws])[counts == recorded][0] - recorded * one_j
    if not draws.size:
        return Estimate(float(rest_j[0])), Estimate(float(one_j[0]))
    return Estimate.of(float(rest_j[0]), rest_j[1:]), Estimate.of(float(one_j[0]), one_j[1:])


def _above_floor_j(curve: EnergyCurve, floor: Floor, temperature: pd.DataFrame, window: _Seen) -> float:
    """Return the J between the ticks around a window less the floor of all of it but the planted gaps."""
    framed = curve.window(window.start_ns, window.end_ns)
    assert framed is not None
    before_ns, after_ns, joule = framed
    celsius = mean_temperature(temperature, pd.DataFrame({"start_ns": [before_ns], "end_ns": [after_ns]}))
    return joule - floor.at(celsius).value * ((after_ns - before_ns) / 1e9 - window.planted_s)
