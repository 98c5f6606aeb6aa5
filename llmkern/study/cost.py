"""What a run will take, roughly, before anything of it was run: for the order, the time left and a budget."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmkern.study.plan import Configuration

# Of one H100 and of a few CPU cores: bytes and FLOPs a second that a model of Transformers really gets, and what a
# launch costs the host. Rough, and corrected by the first runs that are done.
_BYTES_PER_S = {"cuda": 2.5e12, "cpu": 1.5e10}
_FLOPS = {"fp32": 4e13, "": 3e14}
_CPU_FLOPS = 1.5e11
_LAYER_S = {"int8": 4e-3, "int4": 1.2e-3, "": 0.9e-3}
_CPU_LAYER_S = 1e-3
_START_S, _LOAD_BYTES_PER_S = {"cuda": 9.0, "cpu": 4.0}, {"cuda": 4e9, "cpu": 2e8}
_WINDOW_S, _REST_S, _ROUNDS, _LONG_S, _REPEATS = 2.1, 1.0, 6, 3.0, 10
# What the passes after the windows take, in generations and beside them.
_TIMELINE = {"cuda": (7.0, 12.0), "cpu": (5.0, 2.0)}
_REPLAY_S = {"cuda": 50.0, "cpu": 25.0}


@dataclass(frozen=True)
class Size:
    """How large a run is: *weight_bytes* as quantized, *layers*, prompt tokens of a row and new tokens."""

    kind: str
    parameters: int
    weight_bytes: int
    layers: int
    prompt_tokens: int
    new_tokens: int


def seconds(one: Configuration, size: Size, record: str, repeats: int | None) -> float:
    """Return roughly how many seconds the run *one* takes."""
    on_cpu = size.kind == "cpu"
    flops = _CPU_FLOPS if on_cpu else _FLOPS.get(one.precision, _FLOPS[""])
    per_layer_s = _CPU_LAYER_S if on_cpu else _LAYER_S.get(one.precision, _LAYER_S[""])
    host_s = size.layers * (per_layer_s if one.engine == "eager" else per_layer_s / 20)
    prefill_s = max(2 * size.parameters * one.batch * size.prompt_tokens / flops, host_s)
    token_s = max(
        size.weight_bytes / _BYTES_PER_S[size.kind], host_s, 2 * size.parameters * one.batch / flops if on_cpu else 0
    )
    generate_s = prefill_s + token_s * (size.new_tokens - 1)
    times = repeats or (_REPEATS if generate_s <= _LONG_S else _ROUNDS)
    rounds = min(_ROUNDS, times)
    windows_s = sum(max(rounds * _WINDOW_S, times * each) + rounds * _REST_S for each in (prefill_s, generate_s))
    total_s = _START_S[size.kind] + size.weight_bytes / _LOAD_BYTES_PER_S[size.kind] + generate_s + windows_s
    if record != "windows":
        generations, beside_s = _TIMELINE[size.kind]
        total_s += generations * generate_s + beside_s
    if record == "replays":
        total_s += _REPLAY_S[size.kind]
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
    left, seen = list(runs), set[frozenset[tuple[str, object]]]()
    taken, spent_s = [], 0.0

    def pairs(one: Configuration) -> set[frozenset[tuple[str, object]]]:
        values = [(name, getattr(one, name)) for name in one.__dataclass_fields__]
        return {frozenset(pair) for pair in itertools.combinations(values, 2)}

    while left:
        left = [one for one in left if spent_s + guessed_s(one.name) <= budget_s]
        if not left:
            break
        best = max(left, key=lambda one: (len(pairs(one) - seen), -guessed_s(one.name)))
        left.remove(best)
        taken.append(best)
        spent_s += guessed_s(best.name)
        seen |= pairs(best)
    return taken
