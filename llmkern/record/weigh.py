"""Pass *weigh*: latency and energy of each phase with nothing attached but the sensors' own threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmkern.record.annotate import Annotator
from llmkern.record.device import EnergyMeter
from llmkern.record.generation import Generation

# Shorter and the counter's 100 ms tick is more than 5 % of the window.
SHORTEST_WINDOW_S = 2.0
IDLE_WINDOW_S = 2.5
# One window per round and phase: ten independent windows give an interval that a disturbed one cannot spoil.
ROUNDS = 10
# A read of the NVML counter takes about 3 ms inside the driver, and launches wait for it. Ticks between the ends of a
# window are not needed: the counter integrates.
RARE_TICK_S = 1.0
# A warm-up loads kernels, tunes and fills caches; none of that needs the full length.
WARMUP_TOKENS = 8


@dataclass(frozen=True)
class WeighPlan:
    """How often each phase runs: *rounds* windows of *prefill_repeats* generate(1) and *generate_repeats* generate(n)."""

    rounds: int
    prefill_repeats: int
    generate_repeats: int
    new_tokens: int

    @property
    def generations(self) -> int:
        return self.rounds * (self.prefill_repeats + self.generate_repeats)


def plan_windows(repeats: int, new_tokens: int, prefill_s: float, generate_s: float, shortest_s: float) -> WeighPlan:
    """Return the plan for *repeats* generations in all, more where a window would be shorter than *shortest_s* seconds."""
    rounds = min(ROUNDS, repeats)
    least = math.ceil(repeats / rounds)
    return WeighPlan(
        rounds,
        max(least, math.ceil(shortest_s / max(prefill_s, 1e-4))),
        max(least, math.ceil(shortest_s / max(generate_s, 1e-4))),
        new_tokens,
    )


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


def weigh(
    generation: Generation,
    annotator: Annotator,
    meters: list[EnergyMeter],
    plan: WeighPlan,
    advance: Callable[[], None],
) -> None:
    """Run the plan's windows, each begun at a counter tick and followed by two.

    The idle remainders at both ends are at the floor and taken off in the attribution; two ticks at the end leave the
    sensor time to see all of the window. Prefill and generate windows take turns, so that drift meets both.
    """
    for round_ in range(plan.rounds):
        annotator.round = round_
        for new_tokens, repeats in ((1, plan.prefill_repeats), (plan.new_tokens, plan.generate_repeats)):
            wait_for_ticks(meters, 1)
            annotator.new_tokens = new_tokens
            with annotator.range(f"window generate({new_tokens})", "window"):
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
