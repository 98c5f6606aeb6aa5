"""What a run will take, roughly, before anything of it was run: for the order, the time left and a budget."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmkern.study.plan import Configuration


@dataclass(frozen=True)
class Rates:
    """What a model of Transformers really gets: rough, and corrected by the first runs that are done.

    FLOPs a second and seconds of the host for a layer are by precision, "" for any other; a traced run takes
    *generations* more and ``traced_s``, one with replays ``replayed_s`` beside that.
    """

    bytes_per_s: float
    flops: dict[str, float]
    layer_s: dict[str, float]
    start_s: float
    load_bytes_per_s: float
    window_s: float
    generations: float
    traced_s: float
    replayed_s: float


_RATES = {
    # One H100, and the host of a virtual machine.
    "cuda": Rates(
        2.5e12, {"fp32": 4e13, "": 3e14}, {"int8": 4e-3, "int4": 1.2e-3, "": 0.9e-3}, 5.0, 4e9, 2.1, 7.0, 12.0, 50.0
    ),
    # A few cores, whose energy can seldom be read.
    "cpu": Rates(1.5e10, {"": 1.5e11}, {"int8": 2e-3, "": 5e-4}, 3.0, 2e8, 0.5, 5.0, 3.0, 25.0),
}
_REST_S, _ROUNDS, _LONG_S, _REPEATS = 1.0, 6, 3.0, 10


@dataclass(frozen=True)
class Size:
    """How large a run is: *weight_bytes* as quantized, *layers*, prompt tokens of a row and of its set, new tokens."""

    kind: str
    parameters: int
    weight_bytes: int
    layers: int
    prompt_tokens: int
    new_tokens: int
    set_tokens: int = 0


def seconds(one: Configuration, size: Size, record: str, repeats: int | None) -> float:
    """Return roughly how many seconds the run *one* takes."""
    rates = _RATES[size.kind]
    flops, layer_s = (each.get(one.precision, each[""]) for each in (rates.flops, rates.layer_s))
    host_s = size.layers * (layer_s if one.engine == "eager" else layer_s / 20)
    work = 2 * size.parameters * one.batch
    prefill_s = max(work * size.prompt_tokens / flops, host_s)
    token_s = max(size.weight_bytes / rates.bytes_per_s, work / flops, host_s)
    generate_s = prefill_s + token_s * (size.new_tokens - 1)
    times = repeats or (_REPEATS if generate_s <= _LONG_S else _ROUNDS)
    rounds = min(_ROUNDS, times)
    windows_s = sum(max(rounds * rates.window_s, times * each) + rounds * _REST_S for each in (prefill_s, generate_s))
    if size.set_tokens:
        # Each batch of the set is met once before it is weighed.
        set_s = 2 * size.parameters * size.set_tokens / flops
        windows_s += rounds * (max(rates.window_s, set_s) + _REST_S) + set_s
    total_s = rates.start_s + size.weight_bytes / rates.load_bytes_per_s + generate_s + windows_s
    if record != "windows":
        total_s += rates.generations * generate_s + rates.traced_s
    if record == "replays":
        total_s += rates.replayed_s
    return total_s


@dataclass(frozen=True)
class Costs:
    """The guess for every run by name, and what it was off by for those that are done."""

    guessed_s: dict[str, float]
    took_s: dict[str, float]

    @property
    def factor(self) -> float:
        """Return what runs took of their guess so far: the median."""
        ratios = [took / self.guessed_s[name] for name, took in self.took_s.items() if self.guessed_s.get(name)]
        return statistics.median(ratios) if ratios else 1.0

    def of(self, names: Sequence[str]) -> float:
        """Return the seconds that runs *names* will take."""
        return self.factor * sum(self.guessed_s[name] for name in names)


def most_informative(
    runs: Sequence[Configuration], guessed_s: Callable[[str], float], budget_s: float
) -> list[Configuration]:
    """Return the runs that fit into *budget_s*, those first that show the most pairs of values not yet seen together.

    Of as many new pairs the cheaper run is taken; one that no longer fits gives way to a cheaper one.
    """
    values = {one: [(name, getattr(one, name)) for name in one.__dataclass_fields__ if name != "draw"] for one in runs}
    pairs = {one: {frozenset(pair) for pair in itertools.combinations(found, 2)} for one, found in values.items()}
    # What a run would show new only falls as others are taken: what it was before is enough to know who comes next.
    waiting = [(-len(pairs[one]), guessed_s(one.name), number) for number, one in enumerate(runs)]
    heapq.heapify(waiting)
    taken: list[Configuration] = []
    seen: set[frozenset[tuple[str, object]]] = set()
    spent_s = 0.0
    while waiting:
        known, each_s, number = heapq.heappop(waiting)
        one = runs[number]
        if spent_s + each_s > budget_s:
            continue
        new = len(pairs[one] - seen)
        if new < -known:
            heapq.heappush(waiting, (-new, each_s, number))
            continue
        taken.append(one)
        spent_s += each_s
        seen |= pairs[one]
    return taken
