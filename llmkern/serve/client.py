"""Sends requests at their intended times (an open loop), or each when the one before is answered (a closed one)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmkern.serve.arrivals import Schedule
from llmkern.serve.server import Answers

# Sleep wakes up late by a fraction of this; the rest is waited for awake.
_SPIN_S = 0.0015
# How often a signal or a full disk is looked for while nothing is to be sent.
_LOOK_S = 0.2


@dataclass
class Sent:
    """When each request was to be sent and was, in ns of the wall clock; numbers are those of the schedule."""

    intended_ns: dict[int, int] = field(default_factory=dict)
    sent_ns: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """*in_flight* requests at most (None: no limit), and how many s an answer may take."""

    in_flight: int | None = None
    patience_s: float = 600.0


def send_all(
    schedule: Schedule,
    prompts: list[Any],
    server: Answers,
    limits: Limits,
    look: Callable[[], None],
    sent: Sent,
    first: int = 0,
) -> None:
    """Send every request of *schedule* and wait for the answers; *look* raises what should end it.

    The server is told numbers from *first* on.

    Requests that are not answered in time are left to be counted. *sent* is filled as it goes on, so that it holds
    what happened whatever ends it.
    """
    begin_ns = time.time_ns()
    last_s = time.monotonic()
    for number, arrival in enumerate(schedule.arrivals):
        if schedule.closed:
            wait_for(server, number, limits.patience_s, look)
            sent.intended_ns[number] = time.time_ns()
        else:
            sent.intended_ns[number] = begin_ns + round(arrival.at_s * 1e9)
            _sleep_until(sent.intended_ns[number], look)
            if limits.in_flight is not None:
                wait_for(server, number - limits.in_flight + 1, limits.patience_s, look)
        sent.sent_ns[number] = time.time_ns()
        server.send(first + number, prompts[number], arrival.output_tokens)
        if time.monotonic() - last_s > _LOOK_S:
            last_s = time.monotonic()
            look()
    wait_for(server, len(schedule.arrivals), limits.patience_s, look)


def _sleep_until(moment_ns: int, look: Callable[[], None]) -> None:
    while (left_s := (moment_ns - time.time_ns()) / 1e9) > _SPIN_S:
        if left_s > _LOOK_S:
            look()
        time.sleep(min(left_s - _SPIN_S, _LOOK_S))
    while time.time_ns() < moment_ns:
        pass


def wait_for(server: Answers, count: int, patience_s: float, look: Callable[[], None]) -> None:
    """Wait until *count* requests were answered, or none was for *patience_s*, or the server has ended."""
    answered, since_s = server.answered, time.monotonic()
    while not server.wait(count, _LOOK_S):
        look()
        if server.answered > answered:
            answered, since_s = server.answered, time.monotonic()
        if time.monotonic() - since_s > patience_s or not server.alive:
            return
