"""Moves what was recorded into the run folder at least once a second, beside the thread that runs the model."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmkern.record import signals
from llmkern.record.clock import ClockWatch
from llmkern.runfolder import RunWriter

_SWITCH_INTERVAL_S = 0.0005
PERIOD_S = 0.9

Source = Callable[[], Mapping[str, Mapping[str, Any]]]


class Pump:
    """Drains *sources* every *period_s* seconds into *writer*; a failure is kept and raised by :meth:`check`.

    What was drained in a period in which *clock* was set is thrown away: its times mean nothing.
    """

    def __init__(
        self, writer: RunWriter, sources: Sequence[Source], clock: ClockWatch | None = None, period_s: float = PERIOD_S
    ) -> None:
        self._writer = writer
        self._sources = sources
        self._clock = clock or ClockWatch()
        self._period_s = period_s
        self._stop = threading.Event()
        self._error: BaseException | None = None
        # CPU time in which this thread may have held Python's interpreter, so that the launching thread had to wait.
        self.held_s = 0.0
        self._thread = threading.Thread(target=self._loop, name="llmkern-pump", daemon=True)

    def __enter__(self) -> Pump:
        # The thread that launches kernels must not wait Python's usual 5 ms for this one to hand the interpreter back.
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        sys.setswitchinterval(self._switch_interval_s)
        if kind is None:
            self._pump()
            self.check()
        elif self._error is None:
            # The body failed: what was recorded until then is still worth having.
            self._pump()

    def check(self) -> None:
        """Raise what stopped the pump (a full disk, a clock that was set), or a signal, if anything did."""
        signals.check()
        if self._error is not None:
            raise self._error

    def _loop(self) -> None:
        while self._error is None and not self._stop.wait(self._period_s):
            self._pump()

    def _pump(self) -> None:
        if self._error is not None:
            return
        begin_s = time.thread_time() - self._writer.released_s
        try:
            drained = [part for source in self._sources for part in source().items()]
            self._clock.look()
            for table, columns in (*drained, *self._clock.drain().items()):
                self._writer.append(table, columns)
        except BaseException as error:
            self._error = error
        self.held_s += time.thread_time() - self._writer.released_s - begin_s
