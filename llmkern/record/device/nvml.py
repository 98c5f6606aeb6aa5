"""Power and energy of an NVIDIA board through NVML."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from llmkern.errors import DeviceError
from llmkern.record.device.interface import Columns
from llmkern.record.device.native import labels, native
from llmkern.runfolder.facts import MeterFacts
from llmkern.runfolder.vocabulary import NVML_COUNTER

# How often the self-test reads the power fields: several times in each of their refresh periods.
CLOSE_S = 0.01


class NvmlMeter:
    """NVML sensors of the GPU with CUDA index *device* and UUID *uuid*."""

    name = NVML_COUNTER

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

    def facts(self) -> MeterFacts:
        return MeterFacts(
            source="NVML",
            tick_period_ms=self._sampler.tick_period_ms,
            unsupported={k: v for k, v in self.support.items() if v is not None},
            last_error=self._sampler.last_error,
        )


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
