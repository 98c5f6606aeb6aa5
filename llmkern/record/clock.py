"""Watches the wall clock, by which everything is recorded, against the clock that nobody sets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from llmkern.errors import RecordingError
from llmkern.runfolder.facts import ClockFacts
from llmkern.runfolder.vocabulary import DRIFT, STEP_NS


class ClockWatch:
    """Compares CLOCK_REALTIME with CLOCK_MONOTONIC at every look; a change of over STEP_NS ends the recording."""

    def __init__(
        self, wall_ns: Callable[[], int] = time.time_ns, steady_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._wall_ns, self._steady_ns = wall_ns, steady_ns
        self._lock = threading.Lock()
        self._looks: list[tuple[int, int]] = []
        wall, steady = self._pair()
        self._first_ns = self._last_ns = wall - steady
        self._last_look_ns = steady
        self._largest_ns = 0
        self._count = 1
        self._problem: str | None = None

    def _pair(self) -> tuple[int, int]:
        """Return both clocks as of one moment: the closest of three readings, for a thread may be held up."""
        best: tuple[int, int, int] | None = None
        for _ in range(3):
            before = self._steady_ns()
            wall = self._wall_ns()
            after = self._steady_ns()
            if best is None or after - before < best[0]:
                best = (after - before, wall, (before + after) // 2)
        assert best is not None
        return best[1], best[2]

    def look(self) -> None:
        """Raise RecordingError when the wall clock was set since the last look."""
        with self._lock:
            wall, steady = self._pair()
            change = wall - steady - self._last_ns
            if self._problem is None and abs(change) > STEP_NS + DRIFT * (steady - self._last_look_ns):
                way = "forward" if change > 0 else "back"
                self._problem = (
                    f"the system clock was set {way} by {abs(change) / 1e9:,.3f} s during the recording (time "
                    "synchronisation or suspend): what comes after cannot be joined with what was recorded before; run "
                    "again with a clock that is left alone."
                )
            if self._problem is not None:
                raise RecordingError(self._problem)
            self._last_ns, self._last_look_ns = wall - steady, steady
            self._largest_ns = max(self._largest_ns, abs(change))
            self._count += 1
            self._looks.append((wall, steady))

    def drain(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the looks since the last call as rows of table ``clocks``."""
        with self._lock:
            looks, self._looks = self._looks, []
        return {"clocks": {"timestamp_ns": [w for w, _ in looks], "monotonic_ns": [s for _, s in looks]}}

    def facts(self) -> ClockFacts:
        return ClockFacts(
            first_ns=self._first_ns, last_ns=self._last_ns, largest_change_ns=self._largest_ns, looks=self._count
        )
