"""When requests arrive, as pure functions of a pattern, a number and a seed."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

from llmkern.errors import UsageError

MOST_REQUESTS = 10**6
MOST_SECONDS = 10**6
_FORMS = "burst, burst:8@2 (8 every 2 s), fixed:0.3, uniform:0.1-0.5, poisson:5 (a second), sequential, trace:FILE"


@dataclass(frozen=True)
class Arrival:
    """A request: when it is to be sent, in s after the first moment, and how long its prompt and answer are."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Schedule:
    """Arrivals in their order. A *closed* loop sends each when the one before is answered; its times are all zero."""

    pattern: str
    arrivals: tuple[Arrival, ...]
    closed: bool = False

    @property
    def last_s(self) -> float:
        return self.arrivals[-1].at_s if self.arrivals else 0.0


def schedule(pattern: str, lengths: list[tuple[int, int]], seed: int) -> Schedule:
    """Return the arrivals of *pattern* for requests of *lengths* (prompt, answer); a trace file has its own.

    ``burst``: all at once; ``burst:K@S``: K every S seconds; ``fixed:S``: one every S seconds; ``uniform:A-B``: between
    A and B seconds after the one before; ``poisson:R``: R a second on average; ``sequential``: each when the one before
    is answered. Raises UsageError for anything else.
    """
    kind, _, rest = pattern.partition(":")
    if kind == "trace":
        return read_trace(Path(rest))
    count = len(lengths)
    if not 1 <= count <= MOST_REQUESTS:
        raise UsageError(f"{count} requests: give from 1 to {MOST_REQUESTS:,}.")
    closed = pattern == "sequential"
    times = [0.0] * count if closed else _times(kind, rest, pattern, count, seed)
    if times[-1] > MOST_SECONDS:
        raise UsageError(
            f"arrivals {pattern}: the last of {count} requests would come after {times[-1]:,.0f} s, at most "
            f"{MOST_SECONDS:,} are possible: take fewer, or a shorter interval."
        )
    pairs = zip(times, lengths, strict=True)
    return Schedule(pattern, tuple(Arrival(at_s, prompt, answer) for at_s, (prompt, answer) in pairs), closed)


def _times(kind: str, rest: str, pattern: str, count: int, seed: int) -> list[float]:
    if kind == "burst" and not rest:
        return [0.0] * count
    if kind == "burst" and (found := re.fullmatch(r"(\d{1,7})@([\d.]+)", rest)):
        size, every_s = int(found[1]), _positive(found[2], pattern)
        if size:
            return [every_s * (number // size) for number in range(count)]
    if kind == "fixed":
        every_s = _positive(rest, pattern)
        return [every_s * number for number in range(count)]
    generator = random.Random(seed)
    if kind == "uniform" and (found := re.fullmatch(r"([\d.]+)-([\d.]+)", rest)):
        low, high = (_number(part, pattern) for part in found.groups())
        if low > high or high <= 0:
            raise UsageError(f"arrivals {pattern}: {low:g} to {high:g} s is no interval: give the smaller one first.")
        gaps = [generator.uniform(low, high) for _ in range(count)]
        return _summed(gaps)
    if kind == "poisson":
        rate = _positive(rest, pattern)
        return _summed([generator.expovariate(rate) for _ in range(count)])
    raise UsageError(f"arrivals {pattern!r} are unknown: give one of {_FORMS}.")


def _summed(gaps: list[float]) -> list[float]:
    """Return the moments of requests of which each comes *gaps* after the one before, the first at once."""
    return list(itertools.accumulate(gaps[:-1], initial=0.0))


def _number(text: str, pattern: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"arrivals {pattern}: {text!r} is no number of 0 or more: give one of {_FORMS}.")
    return value


def _positive(text: str, pattern: str) -> float:
    value = _number(text, pattern)
    if value == 0:
        raise UsageError(
            f"arrivals {pattern}: 0 is no rate or interval to send by: give more, or burst for all at once."
        )
    return value


def read_trace(path: Path) -> Schedule:
    """Return the arrivals of a file of JSON lines: ``{"time": s, "prompt_tokens": n, "output_tokens": n}``.

    They are put in the order of their times, which begin with the first. Raises UsageError with the line of what is
    none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"trace file {path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"trace file {path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    found = [_arrival(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UsageError(f"trace file {path} has no requests: write one JSON object per line.")
    if len(found) > MOST_REQUESTS:
        raise UsageError(f"trace file {path} has {len(found):,} requests, at most {MOST_REQUESTS:,} are possible.")
    found.sort(key=lambda arrival: arrival.at_s)
    first_s = found[0].at_s
    if found[-1].at_s - first_s > MOST_SECONDS:
        raise UsageError(f"trace file {path} lasts {found[-1].at_s - first_s:,.0f} s, at most {MOST_SECONDS:,}.")
    moved = (Arrival(one.at_s - first_s, one.prompt_tokens, one.output_tokens) for one in found)
    return Schedule(f"trace:{path.name}", tuple(moved))


def _arrival(path: Path, number: int, line: str) -> Arrival:
    expected = 'expected {"time": 1.5, "prompt_tokens": 700, "output_tokens": 90}'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}, line {number} is not JSON: {expected}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}, line {number} is no object: {expected}.")
    at_s = value.get("time")
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not math.isfinite(at_s) or abs(at_s) > 1e12:
        raise UsageError(f'{path}, line {number}: "time" is {at_s!r}, no number of seconds: {expected}.')
    counts: list[int] = []
    for name in ("prompt_tokens", "output_tokens"):
        count = value.get(name)
        if type(count) is not int or not 1 <= count <= 2**24:
            raise UsageError(f'{path}, line {number}: "{name}" is {count!r}, no whole number from 1 on: {expected}.')
        counts.append(count)
    return Arrival(float(at_s), *counts)
