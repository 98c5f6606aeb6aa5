"""The small interface behind which the device sits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch

from llmkern.runfolder.facts import DeviceFacts, MeterFacts, RecorderFacts

Columns = Mapping[str, Any]


class EnergyMeter(Protocol):
    """A source of energy-counter ticks and power readings with a thread of its own."""

    name: str

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def drain(self) -> dict[str, Columns]:
        """Return new rows of tables ``power`` and ``energy``."""
        ...

    def wait_for_tick(self, timeout_s: float) -> int | None:
        """Block until the next counter tick and return its time in ns, None after *timeout_s*."""
        ...

    def pace(self, every_s: float) -> None:
        """Read about one tick in *every_s* seconds from now on; 0 reads every tick."""
        ...

    def watch_closely(self, closely: bool) -> None:
        """Read power as often as its sensors refresh, or again as a run needs it."""
        ...

    def busy_s(self) -> float:
        """Return the seconds that its thread has spent reading until now."""
        ...

    def facts(self) -> MeterFacts:
        """Return what run.json says of the sensors: what works, refresh period, errors."""
        ...


class KernelRecorder(Protocol):
    """Records what the device runs: kernels, copies, and the host calls that issued them.

    It may be started and stopped more than once; at the end of a ``with`` it is closed and holds nothing any more.
    """

    # Whether it sees nothing but what the thread that started it does.
    of_one_thread: bool

    def __enter__(self) -> KernelRecorder: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def start(self, *, host_calls: bool = True) -> None:
        """Begin; without *host_calls* a launch costs the host about half as much."""
        ...

    def stop(self) -> None: ...

    def flush(self) -> None: ...

    def discard(self) -> None:
        """Forget everything until now; the device has to be idle."""
        ...

    def drain(self) -> dict[str, Columns]:
        """Return new rows of tables ``kernels``, ``launches`` and ``overheads``, without column ``pass``."""
        ...

    def facts(self) -> RecorderFacts:
        """Return what run.json says of the recorder: library, version, record and drop counts."""
        ...


class Device(Protocol):
    """What the passes need of a device."""

    torch_device: torch.device
    # The passes with a timeline that tell something of this device, in their order.
    traced_passes: tuple[str, ...]
    # Whether its power sensors may follow a load late or not at all, and have to be tried.
    has_sensors_to_test: bool

    def facts(self) -> DeviceFacts: ...

    def synchronize(self) -> None: ...

    def free_bytes(self) -> tuple[int, int]:
        """Return free and total memory in bytes."""
        ...

    def capability(self) -> tuple[int, int] | None:
        """Return the CUDA compute capability, None for a device that has none."""
        ...

    def check_graphs(self) -> None:
        """Raise UsageError where launches cannot be captured in a graph."""
        ...

    def captured(self, work: Callable[[], None]) -> Any:
        """Return a graph of what *work* launches, with replay() and reset(); None where it cannot be captured."""
        ...

    def nodes(self, graph: Any) -> list[Any] | None:
        """Return what *graph* (see captured) launches in order, with grid and block, None where that is not known."""
        ...

    def alone(self, nodes: list[Any]) -> Any:
        """Return a graph of nothing but the kernels *nodes*, with replay() and reset(); raises DeviceError."""
        ...

    def board_power(self) -> Callable[[], float | None] | None:
        """Return a function that reads the board's power in W (None: it cannot any more), None without a sensor."""
        ...

    def work(self, seconds: float) -> None:
        """Keep the device as busy as it gets for about *seconds*, and return when it is done."""
        ...

    def meters(self) -> list[EnergyMeter]: ...

    def recorder(self) -> KernelRecorder:
        """Return a recorder; use it in a ``with``."""
        ...

    def check_unprofiled(self) -> None:
        """Raise DeviceError when another profiler is known to watch this process."""
        ...


def matmul_for(
    device: torch.device, size: int, dtype: torch.dtype, seconds: float, synchronize: Callable[[], None]
) -> None:
    """Multiply matrices for about *seconds*, never more than a few products ahead of the device."""
    # Random: constant operands switch few bits and draw much less.
    a = torch.randn(size, size, device=device, dtype=dtype)
    synchronize()
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        for _ in range(8):
            a @ a
        synchronize()
