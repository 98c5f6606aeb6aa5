"""Work with a known place in a generation: operators, graphs, streams and idle host time, planted behind layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from llmkern.record.annotate import Annotator
from llmkern.record.generation import decoder_layers
from llmkern.record.passes.inspection import Inspector

CATEGORY = "planted"

Work = Callable[[], object]


@dataclass(frozen=True)
class Plant:
    """Work that runs behind every *every*-th layer in *phase*; *is_gap*: it is idle time of the device, no kernel."""

    name: str
    every: int
    make: Callable[[torch.device], Work]
    phase: str = "decode"
    is_gap: bool = False


class Planted:
    """A plant in a model: how often it ran, and for how long the host was in it."""

    def __init__(self, model: torch.nn.Module, plant: Plant, work: Work, annotator: Annotator | None) -> None:
        self._layers = decoder_layers(model)[:: plant.every]
        self._plant, self._work, self._note = plant, work, annotator
        self.calls_per_step = len(self._layers)
        self.seconds = 0.0

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Run the work behind its layers for the time."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(self._after).remove)
            yield

    def _after(self, _module: object, _args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if ("decode" if hidden.shape[1] == 1 else "prefill") != self._plant.phase:
            return
        begin_s = time.perf_counter()
        if self._note is None:
            self._work()
        else:
            with self._note.range(self._plant.name, CATEGORY):
                self._work()
        self.seconds += time.perf_counter() - begin_s


def signatures_of(work: Work) -> dict[str, int]:
    """Return the signatures of the operators that *work* dispatches, and how often."""
    inspector = Inspector(torch.nn.Module(), lambda: (None, None))
    with torch.inference_mode(), inspector.watching():
        work()
    found: dict[str, int] = {}
    for call in inspector.calls:
        found[call.signature] = found.get(call.signature, 0) + 1
    return found


def _product(size: int, dtype: torch.dtype) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return lambda: a @ b

    return make


def _copy(megabytes: int) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        source = torch.randn(megabytes * 2**18, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return make


def _softmax(rows: int, columns: int) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x = torch.randn(rows, columns, device=device)
        return lambda: torch.softmax(x, -1)

    return make


def _gelu(megabytes: int) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x = torch.randn(megabytes * 2**19, device=device, dtype=torch.bfloat16)
        return lambda: torch.nn.functional.gelu(x)

    return make


def _dequantize(rows: int, columns: int) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        from bitsandbytes import functional

        weight = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        values, state = functional.quantize_4bit(weight, quant_type="nf4")
        return lambda: functional.dequantize_4bit(values, state)

    return make


def _storm(kernels: int, elements: int) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x = torch.randn(elements, device=device, dtype=torch.bfloat16)

        def work() -> None:
            for _ in range(kernels):
                x + x

        return work

    return make


def _sleep(seconds: float) -> Callable[[torch.device], Work]:
    return lambda _device: lambda: time.sleep(seconds)


def _synchronise(seconds: float) -> Callable[[torch.device], Work]:
    """A host that waits for the device and then thinks for a while."""

    def make(device: torch.device) -> Work:
        def work() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            end_s = time.perf_counter() + seconds
            while time.perf_counter() < end_s:
                pass

        return work

    return make


def _second_stream(make_work: Callable[[torch.device], Work]) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        work, side = make_work(device), torch.cuda.Stream(device)

        def aside() -> None:
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                work()

        return aside

    return make


def _in_graph(make_work: Callable[[torch.device], Work], times: int) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        work = make_work(device)
        for _ in range(3):
            work()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                work()
        return lambda: graph.replay()

    return make


GPU_PLANTS = [
    Plant("copy 256 MB", 1, _copy(256)),
    Plant("bf16 GEMM 4096", 2, _product(4096, torch.bfloat16)),
    Plant("fp32 GEMM 2048", 2, _product(2048, torch.float32)),
    Plant("NF4 dequantize 3584x18944", 1, _dequantize(3584, 18944)),
    Plant("softmax 4096x8192", 1, _softmax(4096, 8192)),
    Plant("100 tiny kernels", 1, _storm(100, 2**20)),
    Plant("host sleeps 0.5 ms", 1, _sleep(0.0005), is_gap=True),
    Plant("host synchronises, 0.3 ms", 1, _synchronise(0.0003), is_gap=True),
    Plant("copy 256 MB on a second stream", 1, _second_stream(_copy(256))),
    Plant("20 gelu of 8 MB in a CUDA graph", 1, _in_graph(_gelu(8), 20)),
    Plant("bf16 GEMM 8192 in prefill, power cap", 1, _product(8192, torch.bfloat16), "prefill"),
    Plant("bf16 GEMM 8192", 7, _product(8192, torch.bfloat16)),
    Plant("gelu 128 MB", 1, _gelu(128)),
]
CPU_PLANTS = [
    Plant("fp32 GEMM 512", 1, _product(512, torch.float32)),
    Plant("host sleeps 2 ms", 1, _sleep(0.002), is_gap=True),
    Plant("softmax 512x1024 in prefill", 1, _softmax(512, 1024), "prefill"),
]
