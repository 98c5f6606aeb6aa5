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
    copied_bytes: int = 2 * _BYTES


def roof_of(device: Device, scale: Scale | None) -> Roof:
    """Measure the roof of CUDA *device*; what needs CuPy is None without it."""
    source = torch.randint(0, 2**31, (_BYTES // 4,), dtype=torch.int32, device=device.torch_device)
    target = torch.empty_like(source)
    copy = Turns(lambda _: target.copy_(source), 2)
    copy_us = _median(measure(device, copy, lambda: None).cold_us)
    read_s, empty_us = _kernels(device, source)
    energy = None
    if scale is not None:
        spans = scale.weigh(copy, copy_us)
        scale.rest()
        energy = scale.joules(spans, copy_us, 2 * _BYTES)
    return Roof(
        sheet_bytes_per_s=device.facts().memory_bytes_per_s,
        read_bytes_per_s=None if read_s is None else _BYTES / read_s,
        copy_bytes_per_s=2 * _BYTES / (copy_us / 1e6),
        empty_us=empty_us,
        copy_energy=energy,
    )


def _kernels(device: Device, source: torch.Tensor) -> tuple[float | None, float | None]:
    """Return the seconds that reading *source* takes, and the µs of a kernel that does nothing."""
    try:
        import cupy
    except ImportError:
        return None, None
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
    read_us = _median(measure(device, reading, lambda: None).cold_us)
    return read_us / 1e6, _median(measure(device, empty, lambda: None).cold_us)


def _median(values: tuple[float, ...]) -> float:
    return values[len(values) // 2]
