"""Ctrl+C that cannot be lost: one that comes in a callback out of C, where Python only prints it, is raised again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_came = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Remember for the time that the user pressed Ctrl+C (in the main thread; elsewhere Python allows no handler)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(_number: int, _frame: Any) -> None:
        _came.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _came.clear()


def check() -> None:
    """Raise KeyboardInterrupt if the user pressed Ctrl+C and whatever ran then has swallowed it."""
    if _came.is_set():
        raise KeyboardInterrupt
