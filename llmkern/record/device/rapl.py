"""Package energy of the host CPU from the kernel's powercap interface (Intel and AMD RAPL)."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmkern.runfolder.facts import MeterFacts
from llmkern.runfolder.vocabulary import RAPL_COUNTER

if TYPE_CHECKING:
    # It needs PyTorch, and llmkern doctor looks for RAPL without.
    from llmkern.record.device.interface import Columns

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Zone:
    """One package zone: its counter runs in µJ and wraps at *range_uj*."""

    package: int
    counter: Path
    range_uj: int


def package_zones(root: Path = POWERCAP) -> tuple[list[Zone], str | None]:
    """Return the readable package zones, and a sentence that says why there are none."""
    zones: list[Zone] = []
    denied: list[Path] = []
    seen: set[tuple[str, str]] = set()
    for folder in sorted(root.glob("*-rapl:*")):
        # A name with two colons is a part (core, dram) of a package and already counted in it.
        if folder.name.count(":") != 1:
            continue
        try:
            label = (folder / "name").read_text().strip()
            if not label.startswith("package"):
                continue
            name = label.partition("-die-")[0] if "-die-" in label else folder.name
            counted = name, (folder / "energy_uj").read_text().strip()
            # Dies of one package may show the same counter; two of their own do not stand at the same microjoule.
            if counted in seen:
                continue
            seen.add(counted)
            wrap = int((folder / "max_energy_range_uj").read_text())
            zones.append(Zone(len(zones), folder / "energy_uj", wrap))
        except PermissionError:
            denied.append(folder / "energy_uj")
        except (OSError, ValueError):
            continue
    if denied:
        # The energy of some packages would pass for that of all.
        files = " ".join(map(str, denied))
        return [], (
            f"{len(zones)} of {len(zones) + len(denied)} CPU packages are readable, {files} by root only: "
            f"'sudo chmod a+r {files}' until the next boot."
        )
    if zones:
        return zones, None
    return [], f"no RAPL package zone under {root} (usual in virtual machines and on non-x86 CPUs)."


class RaplMeter:
    """Reads the package counters every *period_s* seconds on a thread of its own."""

    name = RAPL_COUNTER

    def __init__(self, zones: list[Zone], period_s: float = 0.1) -> None:
        self._zones = zones
        self._period_s = period_s
        self._rows: list[tuple[int, int, int]] = []
        self._wraps = dict.fromkeys(zones, 0)
        self._last: dict[Zone, int] = {}
        self._latest_ns = 0
        self._busy_s = 0.0
        self._tick = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._loop, name="llmkern-rapl", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _loop(self) -> None:
        while not self._stop.is_set():
            self.read()
            self._stop.wait(self._period_s)

    def read(self) -> None:
        """Read every counter once, allowing for its wrap."""
        begin_s = time.perf_counter()
        with self._tick:
            for zone in self._zones:
                try:
                    value_uj = int(zone.counter.read_text())
                except (OSError, ValueError):
                    continue
                if value_uj < self._last.get(zone, 0):
                    self._wraps[zone] += zone.range_uj
                self._last[zone] = value_uj
                self._latest_ns = time.time_ns()
                self._rows.append((self._latest_ns, zone.package, (value_uj + self._wraps[zone]) // 1000))
            self._tick.notify_all()
        self._busy_s += time.perf_counter() - begin_s

    def wait_for_tick(self, timeout_s: float) -> int | None:
        with self._tick:
            return self._latest_ns if self._tick.wait(timeout_s) else None

    def busy_s(self) -> float:
        return self._busy_s

    def pace(self, every_s: float) -> None:
        """Do nothing: a read of the file costs microseconds."""

    def watch_closely(self, closely: bool) -> None:
        """Do nothing: there is one counter, and it is read all the time."""

    def drain(self) -> dict[str, Columns]:
        with self._tick:
            rows, self._rows = self._rows, []
        return {
            "energy": {
                "timestamp_ns": [r[0] for r in rows],
                "device": [r[1] for r in rows],
                "energy_mj": [r[2] for r in rows],
                "sensor": self.name,
                "uncertainty_ns": [0] * len(rows),
            }
        }

    def facts(self) -> MeterFacts:
        return MeterFacts(source="Linux powercap (RAPL)", packages=len(self._zones), period_s=self._period_s)
