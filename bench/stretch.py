"""What recording does to the times of kernels: CUPTI's durations against clocks inside the kernels, bare and recorded.

    python -m bench.stretch

A kernel reads the device's clock when its first block begins and ends, so its own time and the time from one start to
the next are known without a recorder. That a recorded duration is longer than from start to start in a bare graph would
be a stretch of the kernel; that the starts come later is one of the gaps between them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch

from bench.result import case, metric, write
from llmkern.record.device.cupti import CuptiRecorder

SOURCE = r"""
extern "C" __global__ void spin(long long cycles, unsigned long long* seen, unsigned int* next) {
  unsigned long long begin, end;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  const long long first = clock64();
  while (clock64() - first < cycles) {}
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(end));
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    const unsigned int slot = atomicAdd(next, 1u);
    seen[2 * slot] = begin;
    seen[2 * slot + 1] = end;
  }
}"""
KERNELS = 1000
# In such steps the clock inside counts; a recorded duration may begin in one and end in another.
RESOLUTION_S = 64e-9
BLOCKS, CYCLES = (1, 132, 528), (0, 1000, 3000, 9000, 36000, 90000)


class Clocked:
    """*KERNELS* kernels of *cycles* in *blocks* in one graph, and what their clocks saw of a replay."""

    def __init__(self, blocks: int, cycles: int) -> None:
        self._kernel = cupy.RawKernel(SOURCE, "spin")
        self._seen, self._next = cupy.zeros(4 * KERNELS, cupy.uint64), cupy.zeros(1, cupy.uint32)
        self.blocks, self._cycles = blocks, cycles
        self._launch(2)
        torch.cuda.synchronize()
        self._graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(self._graph, stream=side), cupy.cuda.Stream.from_external(side):
            self._launch(KERNELS)
        for _ in range(2):
            self.replayed()

    def _launch(self, count: int) -> None:
        for _ in range(count):
            self._kernel((self.blocks,), (128,), (np.int64(self._cycles), self._seen, self._next))

    def replayed(self) -> np.ndarray:
        """Return begin and end in ns of each kernel of one replay, in their order."""
        self._next.fill(0)
        torch.cuda.synchronize()
        self._graph.replay()
        torch.cuda.synchronize()
        seen = self._seen.get()[: 2 * KERNELS].reshape(-1, 2).astype(np.int64)
        ordered: np.ndarray = seen[np.argsort(seen[:, 0])]
        return ordered


def recorded(clocked: Clocked) -> tuple[np.ndarray, np.ndarray]:
    """Return what replayed does under a recorder, and start and end in ns of the same kernels as CUPTI saw them."""
    with CuptiRecorder() as recorder:
        recorder.start(host_calls=False)
        clocked.replayed()
        recorder.discard()
        seen = clocked.replayed()
        recorder.stop()
        rows = recorder.drain()["kernels"]
    start, end = (np.asarray(rows[column]) for column in ("start_ns", "end_ns"))
    own = (np.asarray(rows["grid_x"]) == clocked.blocks) & (np.asarray(rows["block_x"]) == 128)
    spans = np.stack([start[own], end[own]], axis=1)
    return seen, spans[np.argsort(spans[:, 0])][-KERNELS:]


def judged(blocks: int, cycles: int) -> dict[str, Any]:
    """Return the case of one kernel, printed as well."""
    clocked = Clocked(blocks, cycles)
    bare = clocked.replayed()
    seen, spans = recorded(clocked)
    found = {
        "inside_s": _median_s(np.diff(bare)[:, 0]),
        "inside_recorded_s": _median_s(np.diff(seen)[:, 0]),
        "step_s": _median_s(np.diff(bare[:, 0])),
        "step_recorded_s": _median_s(np.diff(spans[:, 0])),
        "recorded_duration_s": _median_s(np.diff(spans)[:, 0]),
    }
    found["beyond_bare_step_s"] = found["recorded_duration_s"] - found["step_s"]
    us = {name: f"{value * 1e6:6.2f}" for name, value in found.items()}
    print(
        f"{blocks:4d} blocks, {us['inside_s']} us inside: start to start {us['step_s']} us bare, "
        f"{us['step_recorded_s']} recorded; recorded duration {us['recorded_duration_s']} us",
        flush=True,
    )
    metrics = {name: metric(value, "s") for name, value in found.items()}
    passed = found["beyond_bare_step_s"] <= RESOLUTION_S
    return case(f"{blocks} blocks, {cycles} cycles", {"blocks": blocks, "cycles": cycles}, metrics, passed)


def _median_s(ns: np.ndarray) -> float:
    return float(np.median(ns)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    cases = []
    for blocks in BLOCKS:
        for cycles in CYCLES:
            cases.append(judged(blocks, cycles))
            write("stretch", cases, arguments.results)


if __name__ == "__main__":
    main()
