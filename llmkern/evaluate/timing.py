"""Latency with cold weights: distinct copies take turns inside one CUDA graph, so that no call finds its weights in L2.

A graph of calls is what a decode step is; its time per call has the gaps between launches in it. What the kernels alone
take comes from CUPTI. Candidates that cannot be captured (they synchronize) are timed as they are launched.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmkern.evaluate.job import Latency, LaunchedKernel
from llmkern.record.device.interface import Device

# So many times the L2 are read before a copy's turn comes again.
TIMES_L2 = 6
MOST_COPY_BYTES = 12 * 2**30
REPLAYS = 30
_MOST_COPIES = 400
# So many calls a graph has at least: its start, some microseconds, is no part of a call.
_LEAST_CALLS = 24


def copies_for(stored_bytes: int, l2_bytes: int) -> int:
    """Return how many copies of a weight of *stored_bytes* are needed so that each comes from memory."""
    wanted = math.ceil(TIMES_L2 * l2_bytes / max(1, stored_bytes)) + 1
    return max(2, min(wanted, _MOST_COPIES, MOST_COPY_BYTES // max(1, stored_bytes)))


@dataclass(frozen=True)
class Turns:
    """A function that makes call number i, and how many distinct copies take turns."""

    call: Callable[[int], Any]
    copies: int

    @property
    def calls(self) -> int:
        """How many calls a graph makes: every copy as often as the others."""
        return self.copies * math.ceil(_LEAST_CALLS / self.copies)

    def in_turn(self) -> None:
        for index in range(self.calls):
            self.call(index % self.copies)

    def first_only(self) -> None:
        for _ in range(self.calls):
            self.call(0)


def measure(device: Device, turns: Turns, spilled_bytes: Callable[[], int | None]) -> Latency:
    """Return the latency of *turns*, cold and warm, and the kernels of a call."""
    for _ in range(3):
        turns.call(0)
    turns.in_turn()
    device.synchronize()
    cold, captured, kernels = _timed(device, turns, turns.in_turn, spilled_bytes)
    warm, _, _ = _timed(device, turns, turns.first_only, None)
    return Latency(
        cold_us=cold,
        warm_us=warm,
        kernels_us=sum(kernel.us * kernel.launches for kernel in kernels),
        captured=captured,
        copies=turns.copies,
        sm_clock_mhz=_sm_clock(device),
        kernels=tuple(kernels),
    )


def _timed(
    device: Device, turns: Turns, work: Callable[[], None], spilled_bytes: Callable[[], int | None] | None
) -> tuple[tuple[float, ...], bool, list[LaunchedKernel]]:
    graph = device.captured(work)
    run = work if graph is None else graph.replay
    run()
    device.synchronize()
    samples = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / turns.calls)
    kernels = [] if spilled_bytes is None else launched(device, run, turns.calls, spilled_bytes())
    if graph is not None:
        graph.reset()
        gc.collect()
    return tuple(sorted(samples)), graph is not None, kernels


def launched(device: Device, run: Callable[[], None], calls: int, spilled: int | None) -> list[LaunchedKernel]:
    """Return the kernels that CUPTI sees in *run*, which makes *calls* calls."""
    with device.recorder() as recorder:
        recorder.start(host_calls=False)
        device.synchronize()
        recorder.discard()
        run()
        device.synchronize()
        recorder.flush()
        recorder.stop()
        rows = recorder.drain()["kernels"]
    names = [str(name) for name in rows["name"]]
    shapes = zip(*(np.asarray(rows[f"{what}_{axis}"]) for what in ("grid", "block") for axis in "xyz"), strict=True)
    spans = np.asarray(rows["end_ns"]) - np.asarray(rows["start_ns"])
    groups: dict[tuple[Any, ...], list[float]] = {}
    about = zip(names, shapes, np.asarray(rows["registers"]), np.asarray(rows["shared_bytes"]), spans, strict=True)
    for name, shape, registers, shared, span in about:
        groups.setdefault((name, *map(int, shape), int(registers), int(shared)), []).append(float(span) / 1e3)
    return [
        LaunchedKernel(
            name=key[0],
            launches=len(times) / calls,
            us=float(np.mean(times)),
            grid=key[1:4],
            block=key[4:7],
            registers=key[7],
            shared_bytes=key[8],
            spilled_bytes=spilled,
            occupancy=occupancy(math.prod(key[4:7]), key[7], key[8]),
        )
        for key, times in groups.items()
    ]


# CUDA's allocation units on compute capability 8.0 to 10.0 (occupancy calculator): registers per warp, bytes per block.
_REGISTER_UNIT = 256
_REGISTERS = 65536
_SHARED_RESERVED = 1024
_MOST_BLOCKS = 32


def occupancy(threads: int, registers: int, shared_bytes: int) -> float | None:
    """Return the share of a multiprocessor's warps that blocks of this size can fill, None for what is no kernel.

    Registers are allocated per warp in units of 256, shared memory per block with 1 KiB for the system.
    """
    if threads <= 0 or registers <= 0 or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    most_warps = properties.max_threads_per_multi_processor // 32
    blocks = min(
        _MOST_BLOCKS,
        most_warps // warps,
        getattr(properties, "regs_per_multiprocessor", _REGISTERS) // of_warp // warps,
        properties.shared_memory_per_multiprocessor // (shared_bytes + _SHARED_RESERVED),
    )
    return blocks * warps / most_warps


def _sm_clock(device: Device) -> int | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(str(device.facts().uuid))
        return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
    except pynvml.NVMLError:
        return None
