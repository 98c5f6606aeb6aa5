"""The CPU as a device: PyTorch's operators stand in the place of kernels, RAPL in the place of NVML."""

from __future__ import annotations

import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern.errors import DeviceError, UsageError
from llmkern.record.device.interface import Columns, EnergyMeter, KernelRecorder, matmul_for
from llmkern.record.device.rapl import RaplMeter, package_zones
from llmkern.record.operators import computes, copied, may_copy
from llmkern.runfolder.facts import DeviceFacts, RecorderFacts
from llmkern.runfolder.vocabulary import TIME


class CpuDevice:
    """This machine's CPU."""

    # An operator is its own host call.
    traced_passes: tuple[str, ...] = (TIME,)
    has_sensors_to_test = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def facts(self) -> DeviceFacts:
        return DeviceFacts(
            kind="cpu",
            name=cpu_name(),
            index=0,
            threads=torch.get_num_threads(),
            memory_bytes=psutil.virtual_memory().total,
        )

    def synchronize(self) -> None:
        """Do nothing: operators of the CPU have finished when they return."""

    def free_bytes(self) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def capability(self) -> tuple[int, int] | None:
        return None

    def check_graphs(self) -> None:
        raise UsageError("--engine graph captures a CUDA graph and needs a GPU: use --engine eager on the CPU.")

    def captured(self, work: Callable[[], None]) -> Any:
        return None

    def nodes(self, graph: Any) -> list[Any] | None:
        return None

    def alone(self, nodes: list[Any]) -> Any:
        raise DeviceError("The CPU has no graphs.")

    def board_power(self) -> Callable[[], float | None] | None:
        return None

    def work(self, seconds: float) -> None:
        matmul_for(self.torch_device, 256, torch.float32, seconds, self.synchronize)

    def meters(self) -> list[EnergyMeter]:
        zones, _ = package_zones()
        return [RaplMeter(zones)] if zones else []

    def recorder(self) -> KernelRecorder:
        return OperatorRecorder()

    def check_unprofiled(self) -> None:
        """Do nothing: operators can be recorded beside any profiler."""


def cpu_name() -> str:
    """Return the processor's name as the operating system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class _Watch(TorchDispatchMode):
    """Appends every operator that computes something to *records*: its start, end and name. Views launch nothing."""

    def __init__(self, records: deque[tuple[int, int, str]]) -> None:
        super().__init__()
        self._names: dict[Any, str | None] = {}
        self._may_copy: set[Any] = set()
        self._records = records

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start_ns = time.time_ns()
        result = func(*args, **(kwargs or {}))
        end_ns = time.time_ns()
        name = self._names.get(func, "")
        if name == "":
            name = self._names[func] = str(func) if computes(func) or may_copy(func) else None
            if may_copy(func):
                self._may_copy.add(func)
        if name is not None and (
            func not in self._may_copy or copied([a for a in args if isinstance(a, torch.Tensor)], result)
        ):
            self._records.append((start_ns, end_ns, name))
        return result


class OperatorRecorder:
    """Records every operator that computes something, below autograd, with its start and end on one clock.

    It works on the thread that started it.
    """

    of_one_thread = True

    def __init__(self) -> None:
        # Appended to by one thread and emptied by another: both ends of a deque are atomic.
        self._records: deque[tuple[int, int, str]] = deque()
        self._watch = _Watch(self._records)
        self._thread = 0
        self._count = 0
        self._running = False

    def __enter__(self) -> OperatorRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, host_calls: bool = True) -> None:
        # An operator is its own host call.
        self._thread = threading.get_native_id()
        self._watch.__enter__()
        self._running = True

    def stop(self) -> None:
        if self._running:
            self._running = False
            self._watch.__exit__(None, None, None)

    def flush(self) -> None:
        """Do nothing: a record is there as soon as its operator has returned."""

    def discard(self) -> None:
        self._records.clear()

    def drain(self) -> dict[str, Columns]:
        records = []
        while self._records:
            records.append(self._records.popleft())
        first = self._count
        self._count += len(records)
        zeros = [0] * len(records)
        return {
            "kernels": {
                "start_ns": [r[0] for r in records],
                "end_ns": [r[1] for r in records],
                "name": [r[2] for r in records],
                "correlation_id": list(range(first + 1, self._count + 1)),
                "device": zeros,
                "context": zeros,
                "stream": [self._thread] * len(records),
                "graph_id": zeros,
                "graph_node_id": zeros,
                "kind": "kernel",
                **{f"{part}_{axis}": zeros for part in ("grid", "block") for axis in "xyz"},
                "registers": zeros,
                "shared_bytes": zeros,
                "copied_bytes": zeros,
            }
        }

    def facts(self) -> RecorderFacts:
        return RecorderFacts(source="PyTorch operators on the CPU", kernels=self._count)
