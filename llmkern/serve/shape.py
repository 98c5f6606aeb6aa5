"""Which bursts cost least at a given rate while people do not wait too long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmkern.errors import UsageError
from llmkern.estimate import Estimate
from llmkern.serve.statement import Arrivals, ratio


@dataclass(frozen=True)
class Shape:
    """Bursts of *size* requests at the rate that was asked for, and what became of them.

    *holds*: the 99th percentile of the time to the first token is within the limit; *on_frontier*: nothing else that
    was tried takes fewer joules and lets nobody wait longer.
    """

    size: int
    result: Arrivals
    holds: bool
    on_frontier: bool = False

    @property
    def joules(self) -> Estimate:
        assert self.result.request_j is not None
        return self.result.request_j

    @property
    def wait_s(self) -> float:
        return self.result.ttft_s[-1] if self.result.ttft_s else float("inf")


def pattern_of(size: int, rate: float) -> str:
    """Return the pattern of bursts of *size* at *rate* requests a second on average."""
    return f"fixed:{1 / rate:g}" if size == 1 else f"burst:{size}@{size / rate:g}"


def find_shape(measure: Callable[[str], Arrivals], rate: float, limit_s: float, most: int) -> list[Shape]:
    """Return the shapes that were tried, smallest bursts first; *measure* serves a pattern.

    Bursts double until the 99th percentile of the wait is beyond *limit_s* or a burst holds *most* requests; then the
    size between the last that held and the first that did not is tried. Raises UsageError where there is no energy.
    """
    tried: dict[int, Shape] = {}

    def holds(size: int) -> bool:
        result = measure(pattern_of(size, rate))
        if result.request_j is None:
            raise UsageError(
                "no energy counter could be read, so no shape costs less than another: search on a GPU, or give --gpu "
                "with --url."
            )
        enough = bool(result.ttft_s) and result.ttft_s[-1] <= limit_s
        tried[size] = Shape(size, result, enough)
        return enough

    size = 1
    while size <= max(1, most) and holds(size):
        size *= 2
    if size in tried and size > 2:
        between = round(size / 2**0.5)
        if between not in tried:
            holds(between)
    shapes = [tried[size] for size in sorted(tried)]
    return [Shape(one.size, one.result, one.holds, not any(_beats(other, one) for other in shapes)) for one in shapes]


def _beats(one: Shape, other: Shape) -> bool:
    """Return whether *one* is at least as good in both, and better in one."""
    cheaper, sooner = one.joules.value - other.joules.value, one.wait_s - other.wait_s
    return cheaper <= 0 and sooner <= 0 and (cheaper < 0 or sooner < 0)


def best(shapes: list[Shape]) -> Shape | None:
    """Return the shape that takes least of those that hold the limit, None where none does."""
    held = [one for one in shapes if one.holds]
    return min(held, key=lambda one: one.joules.value) if held else None


def told(
    shapes: list[Shape], rate: float, limit_s: float, of: Callable[[Arrivals, Arrivals], Estimate | None] = ratio
) -> str:
    """Return in a sentence which shape is best, and whether noise could have chosen it; *of* says who takes more."""
    found = best(shapes)
    if found is None:
        soonest = min(shapes, key=lambda one: one.wait_s)
        return (
            f"At {rate:g} requests a second no shape lets 99 % have their first token within {limit_s:g} s; the "
            f"soonest, {soonest.result.pattern}, takes {soonest.wait_s:.3g} s."
        )
    plain = next((one for one in shapes if one.size == 1), found)
    words = f"At {rate:g} requests a second {found.result.pattern} takes least within {limit_s:g} s"
    if found is plain:
        return f"{words}: requests one by one, for larger bursts take more or come too late."
    share = of(found.result, plain.result)
    saved = None if share is None else share.map(lambda value: 1 - value)
    if saved is None or not saved.is_known:
        return f"{words}, but that cannot be told from requests one by one."
    return (
        f"{words}: {saved.value:.1%} [{saved.low:.1%}, {saved.high:.1%}] less a request than one by one, with a first "
        f"token after {found.wait_s:.3g} s at the 99th percentile ({plain.wait_s:.3g} s one by one)."
    )
