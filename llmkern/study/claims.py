"""What the study behind this project claims, held against the runs at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llmkern.estimate import Estimate
from llmkern.runfolder.vocabulary import DECODE, PREFILL
from llmkern.study.collect import GENERATE, Pooled
from llmkern.text import with_interval

SEEN, PARTLY, NOT_SEEN, UNKNOWN = "seen", "seen in part", "not seen", "not measured"
# The intervals hold what is claimed and what is not.
UNCLEAR = "cannot be told"
# Two figures are "about the same" within this factor, a curve is flat within that one.
_ALIKE, _FLAT = 1.25, 1.10
# By so much an interval may reach beyond what is claimed.
_SLACK = 1.2
_LEAST_DRAW = 0.01


@dataclass(frozen=True)
class Claim:
    """One claim of the study, what became of it here, and the numbers that say so."""

    said: str
    verdict: str
    numbers: tuple[str, ...] = ()


def claims(configurations: list[Pooled]) -> list[Claim]:
    """Return every claim with its verdict."""
    plain = [one for one in configurations if one.axes["engine"] == "eager"]
    return [
        _prefill_falls(plain),
        _flat_over_floats(plain),
        _int8_costs_more(plain),
        _int4_costs_the_same(plain),
        _padding_costs(plain),
        _u_shape(plain),
        _plateau(plain),
        _falls_with_batch(plain),
    ]


def ratios(configurations: list[Pooled], phase: str, measure: str, over: str, under: str) -> dict[str, Estimate]:
    """Return *measure* at precision *over* by that at *under* for every model (and batch, prompts) that has both."""
    found = {}
    for one in configurations:
        if one.axes["precision"] != over:
            continue
        wanted = {**one.axes, "precision": under}
        other = next((o for o in configurations if o.axes == wanted), None)
        above = one.per(phase, measure)
        below = other.per(phase, measure) if other is not None else None
        if above is not None and below is not None:
            found[called(one)] = above.with_(below.of_another_run(), np.divide)
    return found


def called(one: Pooled) -> str:
    """Return what tells a configuration from others but for its precision."""
    axes = one.axes
    batch = f", batch {axes['batch']}" if axes["batch"] > 1 else ""
    length = axes["prompts"] or (f"{axes['prompt_tokens']} tokens" if axes["prompt_tokens"] else "")
    return f"{axes['model']}{batch}{f', {length}' if length else ''}"


def _judged(said: str, found: dict[str, Estimate], low: float, high: float) -> Claim:
    """Return the claim that *found* lie in [*low*, *high*]: by their mean, and whether each does as far as it is known.

    A claim of models in general is one of their mean, which is known better than any of them.
    """
    if not found:
        return Claim(said, UNKNOWN)
    numbers = [f"{name}: {_times(estimate)}" for name, estimate in found.items()]
    mean = together(found)
    if len(found) > 1:
        numbers.append(f"all {len(found)} together (geometric mean): {_times(mean)}")
    held = [_lies_in(estimate, low, high) for estimate in found.values()]
    return Claim(said, _verdict(held, _lies_in(mean, low, high)), tuple(numbers))


def together(found: dict[str, Estimate]) -> Estimate:
    """Return the geometric mean of ratios; those of one model share a run and its error, others share none."""

    def log(draws: np.ndarray) -> np.ndarray:
        # Of few noisy windows a draw may be nothing or less.
        return np.log(np.maximum(draws, _LEAST_DRAW))

    groups = list(dict.fromkeys(_model_of(name) for name in found))
    logs = [estimate.of_another_run(groups.index(_model_of(name)) + 1).map(log) for name, estimate in found.items()]
    total = logs[0]
    for each in logs[1:]:
        total = total + each
    return total.scaled(1 / len(logs)).map(np.exp)


def _model_of(name: str) -> str:
    # "bf16 / fp32, qwen-7b, 512 tokens", or without the precisions.
    first, _, rest = name.partition(", ")
    return rest if " / " in first else name


def _verdict(held: list[bool | None], mean: bool | None) -> str:
    """Return the verdict over cases that hold, do not, or cannot be told (None), and over the *mean* of them."""
    some, others = any(each is True for each in held), any(each is False for each in held)
    if some and others:
        return PARTLY
    if mean is None:
        return UNCLEAR
    if mean:
        return PARTLY if others else SEEN
    return PARTLY if some else NOT_SEEN


def _lies_in(estimate: Estimate, low: float, high: float) -> bool | None:
    """Return whether *estimate* lies in [*low*, *high*]; None where its interval is in there and far outside."""
    first, last = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
    if first > high or last < low:
        return False
    inside = first >= low / _SLACK and last <= high * _SLACK
    return True if inside else None


def _times(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"× {estimate.value:.2f}"
    return f"× {estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _prefill_falls(configurations: list[Pooled]) -> Claim:
    said = "Prefill takes up to 4 times less energy in 16 bits than in fp32."
    measure = "energy_per_effective_input_token"
    found = {}
    for under in ("bf16", "fp16"):
        for name, ratio in ratios(configurations, PREFILL, measure, "fp32", under).items():
            found[f"fp32 / {under}, {name}"] = ratio
    if not found:
        return Claim(said, UNKNOWN)
    most = max(found.values(), key=lambda ratio: ratio.value)
    falls = [_above(ratio, 1.0) for ratio in found.values()]
    told = all(ratio.low is not None for ratio in found.values())
    if not told or (not any(falls) and not all(_below(ratio, _ALIKE) for ratio in found.values())):
        verdict = UNCLEAR
    elif all(falls) and _lies_in(most, 4.0, 1e9) is not False:
        verdict = SEEN
    else:
        verdict = PARTLY if any(falls) else NOT_SEEN
    return Claim(said, verdict, tuple(f"{name}: {_times(ratio)}" for name, ratio in found.items()))


def _above(estimate: Estimate, value: float) -> bool:
    """Return whether all of an interval lies above *value*; without an interval nothing is said to."""
    return estimate.low is not None and estimate.low > value


def _below(estimate: Estimate, value: float) -> bool:
    return estimate.high is not None and estimate.high < value


def _flat_over_floats(configurations: list[Pooled]) -> Claim:
    said = "Decode takes about the same energy in fp32, bf16 and fp16."
    found = {}
    for over in ("bf16", "fp16"):
        for name, ratio in ratios(configurations, DECODE, "energy_per_output_token", over, "fp32").items():
            found[f"{over} / fp32, {name}"] = ratio
    return _judged(said, found, 1 / _ALIKE, _ALIKE)


def _int8_costs_more(configurations: list[Pooled]) -> Claim:
    said = "int8 (LLM.int8()) takes 2 to 3 times the energy of fp32 in decode."
    found = ratios(configurations, DECODE, "energy_per_output_token", "int8", "fp32")
    claim = _judged(said, found, 2.0, 3.0)
    if claim.verdict in (NOT_SEEN, UNCLEAR) and _above(together(found), 1.0):
        # It does cost more, by another factor.
        return replace(claim, verdict=PARTLY)
    return claim


def _int4_costs_the_same(configurations: list[Pooled]) -> Claim:
    said = "int4 (NF4) takes about the energy of fp32 in decode."
    found = ratios(configurations, DECODE, "energy_per_output_token", "int4", "fp32")
    return _judged(said, found, 1 / _ALIKE, _ALIKE)


def by_batch(configurations: list[Pooled], phase: str, measure: str) -> dict[str, dict[int, Estimate]]:
    """Return *measure* of *phase* by batch size, for every curve of three sizes or more."""
    found: dict[str, dict[int, Estimate]] = {}
    for one in sorted(configurations, key=lambda one: int(one.axes["batch"])):
        estimate = one.per(phase, measure)
        if estimate is not None:
            axes = one.axes
            name = f"{axes['model']} {axes['precision']}"
            if axes["engine"] != "eager":
                name += f" {axes['engine']}"
            if axes["prompts"]:
                name += f", {axes['prompts']}"
            if axes["prompt_tokens"]:
                name += f", {axes['prompt_tokens']} tokens"
            found.setdefault(name, {})[int(axes["batch"])] = estimate
    return {name: curve for name, curve in found.items() if len(curve) > 2}


def optimum(curve: dict[int, Estimate]) -> Estimate:
    """Return the batch size that takes least, with the interval of the sizes that are least in 95 % of the draws."""
    sizes = np.array(list(curve), float)
    best = float(min(curve, key=lambda size: curve[size].value))
    drawn = [each.of_another_run(number).draws for number, each in enumerate(curve.values(), start=1)]
    if any(draws is None for draws in drawn):
        return Estimate(best)
    return Estimate.of(best, sizes[np.argmin(np.array(drawn), axis=0)])


def _padding_costs(configurations: list[Pooled]) -> Claim:
    said = "Padding makes an effective input token dearer than a computed one, the more the larger a random batch is."
    effective = by_batch(configurations, PREFILL, "energy_per_effective_input_token")
    computed = by_batch(configurations, PREFILL, "energy_per_computed_input_token")
    # The joules are the same: what is between the two is a count, and has no doubt of its own.
    shares = {
        name: {size: curve[size].value / computed[name][size].value for size in curve}
        for name, curve in effective.items()
        if "sorted" not in name
    }
    shares = {name: curve for name, curve in shares.items() if max(curve.values()) > 1.0}
    if not shares:
        return Claim(said, UNKNOWN)
    grown = [max(curve, key=lambda size: curve[size]) > min(curve) for curve in shares.values()]
    numbers = tuple(
        f"{name}: " + ", ".join(f"batch {size} × {share:.2f}" for size, share in curve.items())
        for name, curve in shares.items()
    )
    return Claim(said, SEEN if all(grown) else PARTLY if any(grown) else NOT_SEEN, numbers)


def _u_shape(configurations: list[Pooled]) -> Claim:
    said = "Energy per effective input token is U-shaped over the batch size, with an optimum in between."
    curves = by_batch(configurations, PREFILL, "energy_per_effective_input_token")
    curves = {name: curve for name, curve in curves.items() if "sorted" not in name}
    if not curves:
        return Claim(said, UNKNOWN)
    shaped, numbers = [], []
    for name, curve in curves.items():
        best = optimum(curve)
        least, sizes = curve[int(best.value)], list(curve)
        ends = [curve[size].with_(least.of_another_run(), np.divide) for size in (sizes[0], sizes[-1])]
        shaped.append(int(best.value) not in (sizes[0], sizes[-1]) and all(_above(end, 1.0) for end in ends))
        where = f" [{best.low:.0f}, {best.high:.0f}]" if best.low is not None and best.high is not None else ""
        numbers.append(
            f"{name}: least at batch {best.value:.0f}{where}, {with_interval(least, 'J')}; batch {sizes[0]} "
            f"{_times(ends[0])}, batch {sizes[-1]} {_times(ends[1])} of it"
        )
    return Claim(said, SEEN if all(shaped) else PARTLY if any(shaped) else NOT_SEEN, tuple(numbers))


def _plateau(configurations: list[Pooled]) -> Claim:
    said = "Energy per computed input token reaches a plateau as the batch grows."
    found = {}
    for name, curve in by_batch(configurations, PREFILL, "energy_per_computed_input_token").items():
        *_, before, last = list(curve)
        found[f"{name}: batch {last} / batch {before}"] = curve[last].with_(curve[before].of_another_run(), np.divide)
    return _judged(said, found, 1 / _FLAT, _FLAT)


def _falls_with_batch(configurations: list[Pooled]) -> Claim:
    said = "Energy per output token falls near-logarithmically with the batch size."
    curves = by_batch(configurations, GENERATE, "energy_per_computed_output_token")
    if not curves:
        return Claim(said, UNKNOWN)
    seen, numbers = [], []
    for name, curve in curves.items():
        sizes, joules = np.log2(np.array(list(curve), float)), np.array([each.value for each in curve.values()])
        slope, rest = np.polyfit(sizes, joules, 1)
        spread = float(np.sum((joules - joules.mean()) ** 2))
        fits = 1 - float(np.sum((joules - slope * sizes - rest) ** 2)) / spread if spread else 0.0
        power = float(np.polyfit(sizes, np.log2(joules), 1)[0])
        first, last = next(iter(curve)), list(curve)[-1]
        whole = curve[last].with_(curve[first].of_another_run(), np.divide)
        seen.append((_below(whole, 1.0), fits >= 0.9))
        numbers.append(
            f"{name}: batch {last} / batch {first} {_times(whole)}; a line over log2(batch) explains {fits:.0%} of it; "
            f"as a power of the batch size it falls with exponent {power:.2f}"
        )
    falls, along = (all(each[i] for each in seen) for i in (0, 1))
    return Claim(
        said, SEEN if falls and along else PARTLY if any(each[0] for each in seen) else NOT_SEEN, tuple(numbers)
    )
