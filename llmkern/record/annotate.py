"""Ranges around phases, token steps and layers: emitted as NVTX for other tools and kept for the run folder."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import nvtx

from llmkern.runfolder.vocabulary import DOMAIN


class Range(NamedTuple):
    """One closed range; times in CLOCK_REALTIME nanoseconds."""

    start_ns: int
    end_ns: int
    thread: int
    name: str
    category: str
    depth: int
    phase: str | None
    token: int | None
    round: int | None
    repeat: int | None
    new_tokens: int | None


class Annotator:
    """Collects ranges of one pass on the thread that runs the model, and mirrors them to NVTX domain ``llmkern``.

    Opening or closing a range costs about a microsecond, so layers are annotated only where that is allowed. A range
    that did not end by itself is no range: :meth:`abandon` leaves it out.
    """

    def __init__(self) -> None:
        self._domain = nvtx.get_domain(DOMAIN)
        self._attributes: dict[tuple[str, str], Any] = {}
        self._open: list[tuple[int, str, str, str | None, int | None]] = []
        # Appended to here and emptied by another thread: both ends of a deque are atomic.
        self._closed: deque[tuple[Any, ...]] = deque()
        self._thread = threading.get_native_id()
        self.last_start_ns = 0
        self.round: int | None = None
        self.repeat: int | None = None
        self.new_tokens: int | None = None

    def push(self, name: str, category: str, phase: str | None = None, token: int | None = None) -> None:
        key = (name, category)
        attributes = self._attributes.get(key)
        if attributes is None:
            attributes = self._domain.get_event_attributes(message=name, category=category)
            # Token names are many; layers and phases few. The cache is for the few.
            if category != "token":
                self._attributes[key] = attributes
        self._domain.push_range(attributes)
        self._open.append((time.time_ns(), name, category, phase, token))

    def pop(self) -> int:
        """Close the innermost range and return its end time in ns."""
        end_ns = time.time_ns()
        start_ns, name, category, phase, token = self._open.pop()
        self.last_start_ns = start_ns
        self._domain.pop_range()
        # A plain tuple: this runs twice per layer and token.
        self._closed.append(
            (
                *(start_ns, end_ns, self._thread, name, category, len(self._open)),
                *(phase, token, self.round, self.repeat, self.new_tokens),
            )
        )
        return end_ns

    def abandon(self, depth: int) -> None:
        """Close the ranges beyond *depth* for other tools and forget them: what they hold was cut off."""
        while len(self._open) > depth:
            self._open.pop()
            self._domain.pop_range()

    def emit(self, name: str, category: str, payload: Any) -> None:
        """Open a range for other tools only, with *payload*; :meth:`emit_end` closes the innermost."""
        self._domain.push_range(self._domain.get_event_attributes(message=name, category=category, payload=payload))

    def emit_end(self) -> None:
        self._domain.pop_range()

    def counter(self, name: str) -> Any:
        """Return the NVTX counter *name* of floating-point samples."""
        return self._domain.get_counter(name, float)

    @contextmanager
    def range(self, name: str, category: str, phase: str | None = None, token: int | None = None) -> Iterator[None]:
        depth = self.depth
        self.push(name, category, phase, token)
        try:
            yield
        except BaseException:
            self.abandon(depth)
            raise
        self.pop()

    @property
    def depth(self) -> int:
        return len(self._open)

    def drain(self) -> list[Range]:
        """Return and forget the ranges closed since the last call (safe from another thread)."""
        closed = []
        while self._closed:
            closed.append(Range._make(self._closed.popleft()))
        return closed


def columns(ranges: list[Range], pass_name: str) -> dict[str, Any]:
    """Return *ranges* as columns of table ``ranges``."""
    values = zip(*ranges, strict=True) if ranges else [()] * len(Range._fields)
    return {"pass": pass_name, "domain": DOMAIN, **dict(zip(Range._fields, map(list, values), strict=True))}
