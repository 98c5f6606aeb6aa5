"""Signals that end a run: each ends it the same way, none is lost, and none falls into the middle of a swap."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_came: list[signal.Signals] = []
_deferred = 0


class Ended(KeyboardInterrupt):
    """One of the ENDING signals; *signal* says which, *exit_code* is the shell's for it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number

    @property
    def exit_code(self) -> int:
        return 128 + int(self.signal)


@contextmanager
def handled() -> Iterator[None]:
    """Raise Ended in the main thread for each ENDING signal that is not ignored already (nohup), for the time."""
    if threading.current_thread() is not threading.main_thread():
        # Python allows no handler elsewhere.
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    hook = sys.unraisablehook

    def unraisable(told: Any) -> None:
        # It came in a callback out of C or a finalizer, an import's among them: it is noted, and check() raises it.
        if not isinstance(told.exc_value, Ended):
            hook(told)

    sys.unraisablehook = unraisable
    for number, old in before.items():
        if old is not signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        sys.unraisablehook = hook
        forget()


def _handle(number: int, _frame: Any) -> None:
    first = not _came
    _came.append(signal.Signals(number))
    # A second one while the first is being obeyed would leave half of what that has to do undone.
    if first and not _deferred:
        raise Ended(_came[0])


def ignored() -> None:
    """Let the process end as it has decided to: what comes while the interpreter shuts down changes nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)


def came() -> signal.Signals | None:
    """Return the signal that came first, None without any."""
    return _came[0] if _came else None


def check() -> None:
    """Raise Ended if a signal came and was swallowed: in a callback out of C, Python prints the exception only."""
    if _came:
        raise Ended(_came[0])


def forget() -> None:
    """Take what came as dealt with."""
    _came.clear()


@contextmanager
def deferred() -> Iterator[None]:
    """Keep a signal that comes for the time until the end of it: what is inside happens whole."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    check()
