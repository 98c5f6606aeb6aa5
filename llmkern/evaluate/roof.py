"""What this board can do at best: read and copy a gigabyte, launch nothing; measured in the same call as the
kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmkern.evaluate.energy import Scale
from llmkern.evaluate.job import Energy
from llmkern.evaluate.timing import Turns, measure
from llmkern.record.device.interface import Device

_BYTES = 2**30
_READ = r"""
extern "C" __global__ void read_all(const uint4* from, unsigned long long count, unsigned* to) {
    unsigned seen = 0;
    const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < count; i += step) {
        const uint4 v = __ldcs(from + i);
        seen ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    // Never so on random data, but the compiler cannot know.
    if (seen == 0x2545f491u) to[0] = seen;
}
extern "C" __global__ void nothing(unsigned* to) {
    if (to == nullptr) to[0] = 1;
}
"""


@dataclass(frozen=True)
class Roof:
    """Bytes per second of the data sheet, read and copied (both directions counted); µs of an empty kernel in a
    graph.
    """

    sheet_bytes_per_s: float | None
    read_bytes_per_s: float | None
    copy_bytes_per_s: float
    empty_us: float | None
    copy_energy: Energy | None
    read_energy: Energy | None = None
    copied_bytes: int = 2 * _BYTES
    read_bytes: int = _BYTES


def roof_of(device: Device, scale: Scale | None) -> Roof:
    """Measure the roof of CUDA *device*; what needs CuPy is None without it."""
    source = torch.randint(0, 2**31, (_BYTES // 4,), dtype=torch.int32, device=device.torch_device)
    target = torch.empty_like(source)
    copy = Turns(lambda _: target.copy_(source), 2)
    copy_us = _median(measure(device, copy, lambda: None).cold_us)
    kernels = _kernels(device, source)
    read_us = empty_us = read_energy = None
    if kernels is not None:
        reading, _ = kernels
        read_us, empty_us = (_median(measure(device, turns, lambda: None).cold_us) for turns in kernels)
        read_energy = _weighed(scale, reading, read_us, _BYTES)
    return Roof(
        sheet_bytes_per_s=device.facts().memory_bytes_per_s,
        read_bytes_per_s=None if read_us is None else _BYTES / (read_us / 1e6),
        copy_bytes_per_s=2 * _BYTES / (copy_us / 1e6),
        empty_us=empty_us,
        copy_energy=_weighed(scale, copy, copy_us, 2 * _BYTES),
        read_energy=read_energy,
    )


def _weighed(scale: Scale | None, turns: Turns, us: float, moved_bytes: int) -> Energy | None:
    if scale is None:
        return None
    spans = scale.weigh(turns, us)
    scale.rest()
    return scale.joules(spans, us, moved_bytes)


def _kernels(device: Device, source: torch.Tensor) -> tuple[Turns, Turns] | None:
    """Return a kernel that reads *source* and one that does nothing; None where they cannot be compiled."""
    try:
        import cupy
    except ImportError:
        return None
    module = cupy.RawModule(code=_READ)
    read, nothing = module.get_function("read_all"), module.get_function("nothing")
    to = torch.zeros(1, dtype=torch.int32, device=device.torch_device)
    blocks = 8 * (device.facts().multiprocessors or 1)

    def launch(function: object, grid: int, threads: int, arguments: tuple[object, ...]) -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            function((grid,), (threads,), arguments)  # type: ignore[operator]

    count = cupy.uint64(source.numel() // 4)
    reading = Turns(lambda _: launch(read, blocks, 512, (source.data_ptr(), count, to.data_ptr())), 4)
    empty = Turns(lambda _: launch(nothing, 132, 256, (to.data_ptr(),)), 200)
    return reading, empty


def _median(values: tuple[float, ...]) -> float:
    return values[len(values) // 2]
