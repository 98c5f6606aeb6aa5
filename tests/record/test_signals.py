"""A signal is raised at once, once more where a callback swallowed it, and never in the middle of a swap."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

import click
import pytest

from llmkern.commands import run
from llmkern.errors import UsageError
from llmkern.record import signals


def send(number: signal.Signals) -> None:
    """Send a signal to this process and let Python run its handler."""
    os.kill(os.getpid(), number)
    signal.sigtimedwait([], 0.2)


@pytest.mark.parametrize("number", signals.ENDING)
def test_every_ending_signal_is_raised_with_the_code_of_a_shell(number: signal.Signals) -> None:
    """L8: SIGTERM and SIGHUP end a run as Ctrl+C does."""
    with signals.handled(), pytest.raises(signals.Ended) as caught:
        send(number)
    assert caught.value.exit_code == 128 + number
    signals.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_swallowed_signal_is_raised_at_the_next_check() -> None:
    signals.check()
    with signals.handled():
        with contextlib.suppress(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signals.check()
    signals.check()


def test_one_that_a_finalizer_swallows_leaves_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    """Once in some hundred runs one came in a callback of Python's own imports, and a user read 'Exception ignored'."""

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGHUP)

    class Broken:
        def __del__(self) -> None:
            raise ValueError("another fault")

    hook = sys.unraisablehook
    other: list[object] = []
    sys.unraisablehook = lambda told: other.append(told.exc_value)
    try:
        with signals.handled():
            one = Finalized()
            del one
            assert signals.came() == signal.SIGHUP
            # What is no signal is told as ever.
            two = Broken()
            del two
            with pytest.raises(signals.Ended):
                signals.check()
        assert [str(error) for error in other] == ["another fault"]
    finally:
        sys.unraisablehook = hook
    assert "Traceback" not in capfd.readouterr().err


def test_what_must_happen_whole_happens_whole_and_the_signal_comes_after_it() -> None:
    """L3: Ctrl+C while a finished run is put in its place."""
    done = []

    def swap() -> None:
        with signals.deferred():
            send(signal.SIGINT)
            done.append("swapped")
        done.append("never")

    with signals.handled(), pytest.raises(signals.Ended):
        swap()
    assert done == ["swapped"]


def test_a_second_signal_does_not_disturb_what_the_first_is_obeyed_with() -> None:
    with signals.handled():
        try:
            send(signal.SIGTERM)
        except signals.Ended:
            send(signal.SIGINT)
            assert signals.came() is signal.SIGTERM
        else:
            pytest.fail("nothing was raised")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            send(signal.SIGHUP)
            signals.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_changed() -> None:
    seen = []

    def work() -> None:
        with signals.handled():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_an_error_that_became_of_a_signal_is_the_signal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in its import, a C extension failed to initialize, and the configuration was blamed for it."""
    monkeypatch.setattr(sys, "argv", ["llmkern"])

    @click.command()
    def command() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            send(signal.SIGTERM)
        raise UsageError("no model can be made of this configuration (initialization failed): check config.json.")

    with pytest.raises(SystemExit) as ended:
        run(command, "llmkern")
    assert ended.value.code == 128 + signal.SIGTERM
    told = capsys.readouterr().err
    assert "ended by SIGTERM" in told
    assert "config.json" not in told
