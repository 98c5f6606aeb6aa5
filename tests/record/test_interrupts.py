"""Ctrl+C is raised at once, and once more where a callback swallowed it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from llmkern.record import interrupts


def test_a_swallowed_interrupt_is_raised_at_the_next_check() -> None:
    interrupts.check()
    with interrupts.remembered():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    interrupts.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_nothing_is_changed() -> None:
    seen = []

    def work() -> None:
        with interrupts.remembered():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
