"""An NVIDIA GPU as a device: kernels through CUPTI, power and energy through NVML."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import pynvml
import torch

from llmkern.errors import DeviceError
from llmkern.record.device.cupti import NSYS_SESSION, CuptiRecorder
from llmkern.record.device.graph_nodes import KernelGraph, nodes_of
from llmkern.record.device.interface import EnergyMeter, KernelRecorder, matmul_for
from llmkern.record.device.nvml import NvmlMeter
from llmkern.record.device.rapl import RaplMeter, package_zones
from llmkern.runfolder.facts import DeviceFacts
from llmkern.runfolder.vocabulary import TRACED


class CudaDevice:
    """One CUDA GPU of this process.

    Raises DeviceError when the extension is not built, NVML cannot be used or the GPU is in MIG mode.
    """

    traced_passes: tuple[str, ...] = TRACED
    has_sensors_to_test = True

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)
        self._properties = torch.cuda.get_device_properties(index)
        # The context has to be alive from here on: the idle floor is measured with it.
        torch.cuda.set_device(index)
        torch.zeros(1, device=self.torch_device)
        self._nvml = NvmlMeter(index, f"GPU-{self._properties.uuid}")

    def facts(self) -> DeviceFacts:
        info = self._nvml.info
        told = (
            "uuid",
            "driver_version",
            "power_limit_mw",
            "power_limit_max_mw",
            "sm_clock_max_mhz",
            "persistence_mode",
        )
        return DeviceFacts(
            kind="cuda",
            index=self.index,
            name=self._properties.name,
            compute_capability=f"{self._properties.major}.{self._properties.minor}",
            multiprocessors=self._properties.multi_processor_count,
            memory_bytes=self._properties.total_memory,
            l2_bytes=self._properties.L2_cache_size,
            memory_bytes_per_s=_memory_bytes_per_s(self._properties),
            **{key: info.get(key) for key in told},
        )

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.index)

    def capability(self) -> tuple[int, int] | None:
        return self._properties.major, self._properties.minor

    def check_graphs(self) -> None:
        """Do nothing: launches can be captured."""

    def captured(self, work: Callable[[], None]) -> Any:
        try:
            # Kept, so that its nodes can be looked at.
            graph = torch.cuda.CUDAGraph(keep_graph=True)
        except TypeError:
            graph = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings(), torch.cuda.graph(graph):
                # Work that launches nothing is no mistake here.
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")
                work()
        except RuntimeError:
            # It synchronizes, or allocates in a way that capture forbids.
            torch.cuda.synchronize()
            return None
        return graph

    def nodes(self, graph: Any) -> list[Any] | None:
        return nodes_of(graph)

    def alone(self, nodes: list[Any]) -> Any:
        return KernelGraph(nodes)

    def board_power(self) -> Callable[[], float | None] | None:
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(str(self._nvml.info.get("uuid")))
        except pynvml.NVMLError:
            return None

        def watts() -> float | None:
            try:
                return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1e3
            except pynvml.NVMLError:
                return None

        return watts

    def work(self, seconds: float) -> None:
        matmul_for(self.torch_device, 4096, torch.bfloat16, seconds, self.synchronize)

    def meters(self) -> list[EnergyMeter]:
        zones, _ = package_zones()
        return [self._nvml, *([RaplMeter(zones)] if zones else [])]

    def recorder(self) -> KernelRecorder:
        return CuptiRecorder()

    def check_unprofiled(self) -> None:
        # Asking CUPTI itself would attach it, and pass weigh would pay for that.
        if os.environ.get(NSYS_SESSION):
            raise DeviceError(
                "Nsight Systems started this process: it is another profiler, CUPTI serves one at a time, and its cost "
                "would be in every joule; run the command without nsys, or with --annotate-only for nsys to record the "
                "kernels."
            )


def _memory_bytes_per_s(properties: Any) -> float | None:
    """Return the bandwidth that memory clock and bus width allow, None where PyTorch does not know them."""
    clock_khz, bus_bits = (getattr(properties, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    # Both edges of the clock carry data.
    return 2 * clock_khz * 1e3 * bus_bits / 8 if clock_khz and bus_bits else None
