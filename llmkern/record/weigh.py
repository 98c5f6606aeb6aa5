"""Pass *weigh*: latency and energy of each phase with nothing attached but the sensors' own threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmkern.record.annotate import Annotator
from llmkern.record.device import EnergyMeter
from llmkern.record.generation import Generation
from llmkern.record.pump import Pump

# Shorter and the counter's 100 ms tick is more than 5 % of the window.
SHORTEST_WINDOW_S = 2.0
IDLE_WINDOW_S = 2.5
# One window per round and phase: six independent windows give an interval that a disturbed one cannot spoil.
ROUNDS = 6
# A read of the NVML counter takes about 3 ms inside the driver, and launches wait for it. Ticks between the ends of a
# window are not needed: the counter integrates.
RARE_TICK_S = 60.0
# A warm-up loads kernels, tunes and fills caches; none of that needs the full length.
WARMUP_TOKENS = 8


@dataclass(frozen=True)
class WeighPlan:
    """How often each phase runs: per round one window of generate(1) and one of generate(n), repeated so many times."""

    prefill_repeats: tuple[int, ...]
    generate_repeats: tuple[int, ...]
    new_tokens: int

    @property
    def generations(self) -> int:
        return sum(self.prefill_repeats) + sum(self.generate_repeats)


def plan_windows(repeats: int, new_tokens: int, prefill_s: float, generate_s: float, shortest_s: float) -> WeighPlan:
    """Return the plan for *repeats* generations in all, more where a window would be under *shortest_s* seconds."""
    rounds = min(ROUNDS, repeats)

    def spread(one_s: float) -> tuple[int, ...]:
        total = max(repeats, rounds * math.ceil(shortest_s / max(one_s, 1e-4)))
        return tuple(total // rounds + (round_ < total % rounds) for round_ in range(rounds))

    return WeighPlan(spread(prefill_s), spread(generate_s), new_tokens)


def warm_up(generation: Generation, warmup: int, new_tokens: int, advance: Callable[[], None]) -> tuple[float, float]:
    """Run the warm-up and return the seconds that generate(1) and generate(*new_tokens*) will take."""
    short = min(new_tokens, WARMUP_TOKENS)
    for _ in range(max(1, warmup)):
        some_s = generation(short)
        advance()
    prefill_s = min(generation(1) for _ in range(2))
    per_token_s = max(0.0, some_s - prefill_s) / max(1, short - 1)
    return prefill_s, prefill_s + per_token_s * (new_tokens - 1)


def idle(annotator: Annotator, meters: list[EnergyMeter], seconds: float = IDLE_WINDOW_S) -> None:
    """Let the device rest with its context alive, for the idle floor."""
    if not meters:
        return
    pace(meters, 0.0)
    with annotator.range("idle", "idle"):
        time.sleep(seconds)
    pace(meters, RARE_TICK_S)


class OwnCost:
    """How long llmkern's own threads may have held up the launching thread while windows ran, at the most.

    For the pump that is the CPU time in which it held Python's interpreter, for the sensors the time of their calls
    into the driver.
    """

    def __init__(self, pump: Pump, meters: list[EnergyMeter]) -> None:
        self._pump, self._meters = pump, meters
        self._sums = [0.0, 0.0, 0.0]

    def _now(self) -> list[float]:
        return [time.perf_counter(), self._pump.held_s, sum(meter.busy_s() for meter in self._meters)]

    @contextmanager
    def window(self) -> Iterator[None]:
        before = self._now()
        yield
        self._sums = [s + after - b for s, after, b in zip(self._sums, self._now(), before, strict=True)]

    def facts(self) -> dict[str, float]:
        """Return the seconds on the clock, in the pump and in the sensors' own calls."""
        return dict(zip(("wall_s", "pump_s", "sensors_s"), self._sums, strict=True))


def weigh(
    generation: Generation,
    annotator: Annotator,
    meters: list[EnergyMeter],
    plan: WeighPlan,
    advance: Callable[[], None],
    cost: OwnCost,
) -> None:
    """Run the plan's windows, each begun at a counter tick and followed by two.

    The idle remainders at both ends are at the floor and taken off in the attribution; two ticks at the end leave the
    sensor time to see all of the window. Prefill and generate windows take turns, so that drift meets both.
    """
    for round_, (prefills, generations) in enumerate(zip(plan.prefill_repeats, plan.generate_repeats, strict=True)):
        annotator.round = round_
        for new_tokens, repeats in ((1, prefills), (plan.new_tokens, generations)):
            wait_for_ticks(meters, 1)
            annotator.new_tokens = new_tokens
            with cost.window(), annotator.range(f"window generate({new_tokens})", "window"):
                for repeat in range(repeats):
                    annotator.repeat = repeat
                    generation(new_tokens)
                    advance()
            annotator.repeat = None
            wait_for_ticks(meters, 2)
    annotator.round = None


def pace(meters: list[EnergyMeter], every_s: float) -> None:
    for meter in meters:
        meter.pace(every_s)


def wait_for_ticks(meters: list[EnergyMeter], count: int) -> None:
    """Wait for *count* ticks of the first meter; without a meter return at once."""
    if meters:
        for _ in range(count):
            # A counter that stands still must not stop the run: the attribution will find the window without ticks.
            meters[0].wait_for_tick(1.0)
