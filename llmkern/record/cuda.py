"""An NVIDIA GPU as a device: kernels through CUPTI, power and energy through NVML."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llmkern.errors import DeviceError
from llmkern.record.device import Columns, EnergyMeter, KernelRecorder, matmul_for
from llmkern.record.rapl import RaplMeter, package_zones

# Set by the tools that launch a program under their own CUPTI; the name in the message saves the user a search.
_NSYS_SESSION = "NSYS_PROFILING_SESSION_ID"
# How often the self-test reads the power fields: several times in each of their refresh periods.
CLOSE_S = 0.01
_INJECTORS = {_NSYS_SESSION: "Nsight Systems", "CUDA_INJECTION64_PATH": "an injected tool"}


class CudaDevice:
    """One CUDA GPU of this process.

    Raises DeviceError when the extension is not built, NVML cannot be used or the GPU is in MIG mode.
    """

    kind = "cuda"

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)
        self._properties = torch.cuda.get_device_properties(index)
        # The context has to be alive from here on: the idle floor is measured with it.
        torch.cuda.set_device(index)
        torch.zeros(1, device=self.torch_device)
        self._nvml = NvmlMeter(index, f"GPU-{self._properties.uuid}")

    def facts(self) -> dict[str, Any]:
        info = self._nvml.info
        return {
            "kind": self.kind,
            "index": self.index,
            "name": self._properties.name,
            "compute_capability": f"{self._properties.major}.{self._properties.minor}",
            "multiprocessors": self._properties.multi_processor_count,
            "memory_bytes": self._properties.total_memory,
            "l2_bytes": self._properties.L2_cache_size,
            "memory_bytes_per_s": _memory_bytes_per_s(self._properties),
            **{
                key: info.get(key)
                for key in (
                    "uuid",
                    "driver_version",
                    "power_limit_mw",
                    "power_limit_max_mw",
                    "sm_clock_max_mhz",
                    "persistence_mode",
                )
            },
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def free_bytes(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.index)

    def capability(self) -> tuple[int, int] | None:
        return self._properties.major, self._properties.minor

    def work(self, seconds: float) -> None:
        matmul_for(self.torch_device, 4096, torch.bfloat16, seconds, self.synchronize)

    def meters(self) -> list[EnergyMeter]:
        zones, _ = package_zones()
        return [self._nvml, *([RaplMeter(zones)] if zones else [])]

    def recorder(self) -> KernelRecorder:
        return CuptiRecorder()

    def check_unprofiled(self) -> None:
        # Asking CUPTI itself would attach it, and pass weigh would pay for that.
        if os.environ.get(_NSYS_SESSION):
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


def native() -> Any:
    """Return the compiled extension; raises DeviceError when it was not built."""
    try:
        import llmkern._recorder as _recorder
    except ImportError as error:
        raise DeviceError(
            f"the recorder extension llmkern._recorder is not built ({error}): run 'pip install -e .' in the checkout."
        ) from error
    return _recorder


class NvmlMeter:
    """NVML sensors of the GPU with CUDA index *device* and UUID *uuid*."""

    name = "nvml_total"

    def __init__(self, device: int, uuid: str, library: str | None = None) -> None:
        recorder = native()
        self._device = device
        self._names: list[str] = list(recorder.SENSOR_NAMES)
        try:
            self._sampler = recorder.NvmlSampler(device_uuid=uuid, library=library)
            self.info: dict[str, Any] = self._sampler.info()
            self.support: dict[str, str | None] = self._sampler.support()
        except recorder.RecorderError as error:
            raise DeviceError(f"{error}") from error
        check_nvml(self.info, self.support)

    def start(self) -> None:
        self._sampler.start()

    def stop(self) -> None:
        self._sampler.stop()

    def wait_for_tick(self, timeout_s: float) -> int | None:
        tick = self._sampler.wait_for_tick(timeout_s)
        return None if tick is None else tick[0]

    def pace(self, every_s: float) -> None:
        self._sampler.set_tick_interval_s(every_s)

    def watch_closely(self, closely: bool) -> None:
        self._sampler.set_field_interval_s(CLOSE_S if closely else 0.0)

    def drain(self) -> dict[str, Columns]:
        rows = self._sampler.drain()
        power, energy = dict(rows["power"]), dict(rows["energy"])
        count = len(power["timestamp_ns"])
        power["sensor"] = labels(power["sensor"], self._names)
        power["device"] = np.full(count, self._device, np.int32)
        for column in ("power_mw", "sm_clock_mhz", "temperature_c", "throttle"):
            power[column] = pa.array(power[column], mask=power[column] < 0)
        energy["sensor"] = self.name
        energy["device"] = np.full(len(energy["timestamp_ns"]), self._device, np.int32)
        return {"power": power, "energy": energy}

    def busy_s(self) -> float:
        return float(self._sampler.busy_s)

    def call_costs_us(self) -> dict[str, float]:
        """Return what one call of each source costs in µs."""
        costs: dict[str, float] = self._sampler.call_costs_us()
        return costs

    def facts(self) -> dict[str, Any]:
        return {
            "source": "NVML",
            "tick_period_ms": self._sampler.tick_period_ms,
            "unsupported": {k: v for k, v in self.support.items() if v is not None},
            "last_error": self._sampler.last_error,
        }


def check_nvml(info: dict[str, Any], support: dict[str, str | None]) -> None:
    """Refuse a GPU whose energy counter would not mean this process; raises DeviceError."""
    if info.get("mig_enabled"):
        raise DeviceError(
            f"GPU {info.get('index')} ({info.get('name')}) is in MIG mode: NVML then reports the energy of the whole "
            "board, not of one slice, so joules would belong to others too; choose a GPU without MIG, "
            "or ask its administrator to turn MIG off."
        )
    problem = support.get("energy_counter")
    if problem is not None:
        step = (
            "ask the administrator for access to NVML energy (in a container, start it with "
            "'--gpus all' and the utility capability)"
            if "PERMISSION" in problem.upper()
            else "a Volta or newer GPU with a driver of 2018 or later has it"
        )
        raise DeviceError(f"NVML refuses the energy counter of GPU {info.get('index')} ({problem}): {step}.")


class CuptiRecorder:
    """Kernel, copy and launch records of this process through CUPTI.

    *library* is the file to take instead of searching.
    """

    def __init__(self, library: str = "") -> None:
        module = native()
        self._errors = module.RecorderError
        self._kinds: list[str] = list(module.KIND_NAMES)
        self._running = False
        try:
            self._recorder = module.ActivityRecorder(cupti_candidates(), library)
        except self._errors as error:
            raise DeviceError(str(error)) from error

    def start(self, *, host_calls: bool = True) -> None:
        try:
            self._recorder.start(host_calls=host_calls)
        except self._errors as error:
            owner = next((who for key, who in _INJECTORS.items() if os.environ.get(key)), None)
            hint = f" ({owner} started this process)" if owner else ""
            raise DeviceError(f"{error}{hint}") from error
        self._running = True

    def stop(self) -> None:
        """Stop recording; what CUPTI still held can be drained afterwards."""
        if self._running:
            self._running = False
            self._recorder.stop()

    def flush(self) -> None:
        if self._running:
            self._recorder.flush()

    def discard(self) -> None:
        self._recorder.flush(forced=True)
        self._recorder.settle()
        self._recorder.drain()

    def inject(self, records: bytes) -> None:
        """Pass raw activity records through the same path as CUPTI's own (load generators, tests)."""
        self._recorder.inject(records)

    def backlog(self) -> int:
        """Return about how many kernels wait to be decoded or drained."""
        return int(self._recorder.backlog())

    def settle(self) -> None:
        """Wait until everything handed over is decoded."""
        self._recorder.settle()

    def drain(self) -> dict[str, Columns]:
        rows = self._recorder.drain()
        names = self._recorder.names()
        kernels, launches, overheads = (dict(rows[key]) for key in ("kernels", "launches", "overheads"))
        kernels["name"] = labels(kernels["name"], names)
        kernels["kind"] = labels(kernels["kind"], self._kinds)
        launches["api"] = labels(launches["api"], names)
        overheads["kind"] = labels(overheads["kind"], names)
        return {"kernels": kernels, "launches": launches, "overheads": overheads}

    def facts(self) -> dict[str, Any]:
        return {
            "source": "CUPTI activity records",
            "library_version": self._recorder.version,
            "clock_offset_ns": self._recorder.clock_offset_ns(),
            **self._recorder.statistics(),
        }


def labels(ids: Any, names: list[str]) -> pa.DictionaryArray:
    """Return *ids* into *names* as a dictionary column."""
    return pa.DictionaryArray.from_arrays(pa.array(np.asarray(ids, np.int32)), pa.array(names, pa.string()))


def cupti_candidates() -> list[str]:
    """Return the libcupti files of the CUDA wheels on sys.path, those of this PyTorch's CUDA version first."""
    major = (torch.version.cuda or "13").partition(".")[0]
    found = [str(f) for root in sys.path if root for f in Path(root).glob("nvidia/*/lib/libcupti.so.*[0-9]")]
    toolkit = [str(f) for f in Path("/usr/local").glob("cuda*/extras/CUPTI/lib64/libcupti.so.*[0-9]")]
    return sorted(found + toolkit, key=lambda f: (f".so.{major}" not in f and f"cu{major}" not in f, f))
