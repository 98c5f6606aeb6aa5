"""Pass *weigh*: latency and energy of each phase with nothing attached but the sensors' own threads."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from llmkern.record.pump import Pump
from llmkern.record.rig import RARE_TICK_S, Rig
from llmkern.runfolder.facts import OwnCostFacts, PlanFacts
from llmkern.runfolder.vocabulary import PROMPT_SET

# Shorter and the counter's 100 ms tick is more than 5 % of the window.
SHORTEST_WINDOW_S = 2.0
# The tick of NVML's counter, where a meter does not say its own.
TICK_S = 0.1
IDLE_WINDOW_S = 2.5
# The rest after each window, in which the board is as warm as in it.
SHORT_IDLE_S = 0.8
# One window per round and phase: six independent windows give an interval that a disturbed one cannot spoil.
ROUNDS = 6
# By default: more in a window are better, until one is long enough by far.
REPEATS, LONG_S = 10, 3.0
# A warm-up loads kernels, tunes and fills caches; but for its last generation none of that needs the full length.
WARMUP_TOKENS = 8
# Of a slow model half of them say as much of how long a token takes.
SLOW_WARMUP_TOKENS, SLOW_WARMUP_S = 4, 1.0


def plan_windows(
    repeats: int, new_tokens: int, prefill_s: float, generate_s: float, shortest_s: float | None = None
) -> PlanFacts:
    """Return the plan for *repeats* generations in all, in windows of *shortest_s* at least: by default 2 s and a tick.

    How many generations that takes is what one took in the warm-up, and only a guess: a window goes on until it is long
    enough.
    """
    rounds = min(ROUNDS, repeats)
    if shortest_s is None:
        shortest_s = SHORTEST_WINDOW_S + TICK_S

    def spread(one_s: float) -> tuple[int, ...]:
        total = max(repeats, rounds * math.ceil(shortest_s / max(one_s, 1e-4)))
        return tuple(total // rounds + (round_ < total % rounds) for round_ in range(rounds))

    return PlanFacts(
        prefill_repeats=spread(prefill_s),
        generate_repeats=spread(generate_s),
        new_tokens=new_tokens,
        shortest_s=shortest_s,
        generate_s=round(generate_s, 6),
    )


def warm_up(rig: Rig) -> PlanFacts:
    """Run the warm-up and return the plan of the windows.

    Its last generation is as long as the weighed ones: what is made for every length of the cache that was not met
    before (in 16 bits cuDNN plans its attention anew, some 50 ms a token on an H100) is made by then.
    """
    whole = rig.options.new_tokens
    short = min(whole, WARMUP_TOKENS)
    with rig.stages.stage("Warming up", rig.options.warmup) as advance:
        some_s = None
        for number in range(rig.options.warmup - 1):
            some_s = rig.generation(short)
            if number == 1 and some_s > SLOW_WARMUP_S:
                short = min(short, SLOW_WARMUP_TOKENS)
            advance()
        first_s = rig.generation(whole)
        advance()
        for other in rig.prompt_set:
            other(1)
        prefill_s = min(rig.generation(1) for _ in range(2))
    if some_s is None:
        some_s, short = first_s, whole
    per_token_s = max(0.0, some_s - prefill_s) / max(1, short - 1)
    rig.annotator.drain()
    generate_s = prefill_s + per_token_s * (whole - 1)
    repeats = rig.options.repeats or (REPEATS if generate_s <= LONG_S else ROUNDS)
    # Without a counter there is no tick to outlast.
    shortest_s = None if rig.meters else rig.options.unweighed_window_s
    plan = plan_windows(repeats, whole, prefill_s, generate_s, shortest_s)
    # Where it was also the first of all, it says nothing of its length.
    return plan if rig.options.warmup < 2 else replace(plan, first_generate_s=round(first_s, 6))


def idle(rig: Rig, seconds: float = IDLE_WINDOW_S) -> None:
    """Let the device rest with its context alive, for the idle floor."""
    if not rig.meters:
        return
    rig.pace(0.0)
    with rig.annotator.range("idle", "idle"):
        time.sleep(seconds)
    rig.pace(RARE_TICK_S)


class OwnCost:
    """How long llmkern's own threads may have held up the launching thread while windows ran, at the most.

    For the pump that is the CPU time in which it held Python's interpreter, for the sensors the time of their calls
    into the driver.
    """

    def __init__(self, pump: Pump, rig: Rig) -> None:
        self._pump, self._meters = pump, rig.meters
        self._sums = [0.0, 0.0, 0.0]

    def _now(self) -> list[float]:
        return [time.perf_counter(), self._pump.held_s, sum(meter.busy_s() for meter in self._meters)]

    @contextmanager
    def window(self) -> Iterator[None]:
        before = self._now()
        yield
        self._sums = [s + after - b for s, after, b in zip(self._sums, self._now(), before, strict=True)]

    def facts(self) -> OwnCostFacts | None:
        """Return the seconds on the clock, in the pump and in the sensors' own calls; None before the first window."""
        wall_s, pump_s, sensors_s = self._sums
        return OwnCostFacts(wall_s=wall_s, pump_s=pump_s, sensors_s=sensors_s) if wall_s > 0 else None


def weigh(rig: Rig, plan: PlanFacts) -> None:
    """Run the plan's windows, each begun at a counter tick and followed by a rest.

    The idle remainders at both ends are at the floor and taken off in the attribution; the rest leaves the sensor time
    to see all of the window, and shows the floor where it counts. Prefill and generate windows take turns, so that
    drift meets both.
    """
    with rig.pumped("weigh") as pump:
        idle(rig)
        cost = OwnCost(pump, rig)
        total = sum(plan.prefill_repeats) + sum(plan.generate_repeats)
        with rig.stages.stage("Weighing", total) as advance:
            for round_, repeats in enumerate(zip(plan.prefill_repeats, plan.generate_repeats, strict=True)):
                rig.annotator.round = round_
                for new_tokens, planned in zip((1, plan.new_tokens), repeats, strict=True):
                    rig.wait_for_ticks(1)
                    rig.annotator.new_tokens = new_tokens
                    with cost.window():
                        for done in _window(rig, new_tokens, planned, plan.shortest_s or 0.0):
                            pump.check()
                            if done <= planned:
                                advance()
                    idle(rig, SHORT_IDLE_S)
                if rig.prompt_set:
                    rig.wait_for_ticks(1)
                    with cost.window():
                        for _ in _prompt_set_window(rig, plan.shortest_s or 0.0):
                            pump.check()
                    idle(rig, SHORT_IDLE_S)
            rig.annotator.round = None
    rig.writer.note(plan=plan, own_cost=cost.facts())


def _window(rig: Rig, new_tokens: int, planned: int, shortest_s: float) -> Iterator[int]:
    """Generate until there are *planned* generations and *shortest_s* seconds; yield the count after each."""
    with rig.annotator.range(f"window generate({new_tokens})", "window"):
        begin_s, done = time.perf_counter(), 0
        while done < planned or time.perf_counter() - begin_s < shortest_s:
            rig.annotator.repeat = done
            rig.generation(new_tokens)
            done += 1
            yield done
        rig.annotator.repeat = None


def _prompt_set_window(rig: Rig, shortest_s: float) -> Iterator[None]:
    """Prefill every batch of the prompt set, as often as it takes to be *shortest_s* seconds long."""
    with rig.annotator.range("prefills of the prompt set", PROMPT_SET):
        begin_s, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - begin_s < shortest_s:
            rig.annotator.repeat = done
            for other in rig.prompt_set:
                other(1)
                yield
            done += 1
        rig.annotator.repeat = None
