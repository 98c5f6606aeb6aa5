"""Work with a known place in a generation: operators, graphs, streams and idle host time, planted behind layers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
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
class Series:
    """An operator of one main kernel and of minor ones: *make* a call with so many of these, their names by *minor*.

    As many as *recorded* are in the run. A minor kernel takes the slope over *counts*, none of them 0: the first one
    finds its operand evicted by the main kernel and leaves lines that this has to write back, and costs more than its
    successors. The main kernel takes what the operator does as it was recorded, less its minor ones.
    """

    make: Callable[[torch.device, int], Work]
    minor: str
    recorded: int = 8
    counts: tuple[int, ...] = (4, 8, 16)


@dataclass(frozen=True)
class Plant:
    """Work that runs behind every *every*-th layer in *phase*; *is_gap*: it is idle time of the device, no kernel.

    Where no operator launches its kernels, *kernel* finds them by their names.
    """

    name: str
    every: int
    make: Callable[[torch.device], Work]
    phase: str = "decode"
    is_gap: bool = False
    kernel: str = ""
    series: Series | None = None


@contextmanager
def growing(planted: Iterable[Planted]) -> Iterator[None]:
    """Let all of *planted* grow for the time."""
    with ExitStack() as stack:
        for one in planted:
            stack.enter_context(one.growing())
        yield


class Planted:
    """A plant in a model: how often it ran, and for how long the host was in it.

    *turn* (i, n): of the layers that it may stand behind only each n-th, from the i-th. It runs *again* at each.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plant: Plant,
        work: Work,
        annotator: Annotator | None,
        *,
        turn: tuple[int, int] = (0, 1),
        again: int = 1,
    ) -> None:
        self._model, self._turn = model, turn
        self._layers = decoder_layers(model)[:: plant.every][turn[0] :: turn[1]]
        self.plant, self._work, self._note, self._again = plant, work, annotator, again
        self.calls_per_step = len(self._layers) * again
        self.seconds = 0.0

    def quiet(self) -> Planted:
        """Return the same without ranges of its own."""
        return Planted(self._model, self.plant, self._work, None, turn=self._turn, again=self._again)

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Run the work behind its layers for the time."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(self._after).remove)
            yield

    def _after(self, _module: object, _args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if ("decode" if hidden.shape[1] == 1 else "prefill") != self.plant.phase:
            return
        if self.plant.is_gap and hidden.is_cuda:
            # Until the device has nothing to do the host's time is no gap.
            torch.cuda.synchronize(hidden.device)
        begin_s = time.perf_counter()
        for _ in range(self._again):
            if self._note is None:
                self._work()
            else:
                with self._note.range(self.plant.name, CATEGORY):
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


def _spin(seconds: float) -> Callable[[torch.device], Work]:
    """A host that thinks for a while."""

    def make(_device: torch.device) -> Work:
        def work() -> None:
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


def _products(device: torch.device, count: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Return what gives a row and one of *count* weights of 18944 x 3584, each in its turn, so that none is in L2."""
    row = torch.randn(1, 3584, device=device, dtype=torch.bfloat16)
    weights = [torch.randn(18944, 3584, device=device, dtype=torch.bfloat16) for _ in range(count)]
    turn = itertools.cycle(weights)
    return lambda: (row, next(turn))


def _gemv(device: torch.device) -> Work:
    operands = _products(device, 4)

    def work() -> object:
        row, weight = operands()
        return row @ weight.t()

    return work


@torch.library.custom_op("llmkern_bench::product_and_casts", mutates_args=())
def _product_and_casts(row: torch.Tensor, weight: torch.Tensor, other: torch.Tensor, casts: int) -> torch.Tensor:
    result = row @ weight.t()
    for _ in range(casts):
        other.to(torch.float16)
    return result


def _product_with_casts(device: torch.device, casts: int) -> Work:
    """A product of one row and so many casts of 512 x 3584, all launched by one operator."""
    operands, other = _products(device, 4), torch.randn(512, 3584, device=device, dtype=torch.bfloat16)
    return lambda: _product_and_casts(*operands(), other, casts)


def _sizes(count: int) -> Callable[[torch.device], Work]:
    """Products of as many sizes as *count*, so many that they are not all replayed."""

    def make(device: torch.device) -> Work:
        every = [torch.randn((4 + i) * 2**18, device=device) for i in range(count)]

        def work() -> None:
            for x in every:
                x * x

        return work

    return make


def _then_sleeps(make_work: Callable[[torch.device], Work], seconds: float) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        work = make_work(device)

        def both() -> None:
            work()
            torch.cuda.synchronize(device)
            time.sleep(seconds)

        return both

    return make


def _int8_product(device: torch.device) -> Work:
    from bitsandbytes import functional

    rows = torch.randint(-127, 127, (16, 3584), device=device, dtype=torch.int8)
    weights = [torch.randint(-127, 127, (18944, 3584), device=device, dtype=torch.int8) for _ in range(6)]
    turn = itertools.cycle(weights)
    return lambda: functional.int8_linear_matmul(rows, next(turn))


def _int8_quantization(device: torch.device) -> Work:
    """What LLM.int8() does before its products: the search for outliers, with its question to the device."""
    from bitsandbytes import functional

    rows = torch.randn(512, 5120, device=device, dtype=torch.float16)
    rows[:, :6] *= 20
    return lambda: functional.int8_vectorwise_quant(rows, threshold=6.0)


def _int8_dequantization(device: torch.device) -> Work:
    from bitsandbytes import functional

    # Of no shape of the model's: there the product has just left it in L2, here it has not.
    product = torch.randint(-(2**20), 2**20, (512, 16384), device=device, dtype=torch.int32)
    per_row, per_column = (torch.rand(count, device=device) for count in product.shape)
    return lambda: functional.int8_mm_dequant(product, per_row, per_column)


GPU_PLANTS = [
    Plant("copy 256 MB", 1, _copy(256)),
    Plant("bf16 GEMM 4096", 1, _product(4096, torch.bfloat16)),
    Plant("fp32 GEMM 2048", 1, _product(2048, torch.float32)),
    Plant("NF4 dequantize 3584x18944", 1, _dequantize(3584, 18944)),
    Plant("softmax 4096x8192", 1, _softmax(4096, 8192)),
    Plant("100 kernels of 2 us", 1, _storm(100, 2**20)),
    Plant("gelu 128 MB", 1, _gelu(128)),
    Plant("copy 256 MB on a second stream", 1, _second_stream(_copy(192))),
    Plant("20 gelu of 8 MB in a CUDA graph", 1, _in_graph(_gelu(8), 20), kernel="[Gg]elu"),
    Plant("host sleeps 0.5 ms", 1, _sleep(0.0005), is_gap=True),
    Plant("host spins for 0.5 ms", 1, _spin(0.0005), is_gap=True),
    Plant("16 sizes of a product", 1, _sizes(16)),
    Plant(
        "product of one row and 8 casts",
        1,
        lambda device: _product_with_casts(device, 8),
        series=Series(_product_with_casts, "float16_copy|direct_copy|unrolled_elementwise|vectorized_elementwise"),
    ),
    Plant("bf16 GEMM 8192 in prefill, power cap", 1, _product(8192, torch.bfloat16), "prefill"),
    Plant("fp32 GEMM 4096 in prefill, then idle", 1, _then_sleeps(_product(4096, torch.float32), 0.001), "prefill"),
]
# For a loop that is idle most of the time: planted at int8.
IDLE_PLANTS = [
    Plant("product of one row", 1, _gemv),
    Plant("int8 product of 16 rows", 1, _int8_product),
    Plant("int8 quantization of 512 rows, outliers sought", 1, _int8_quantization),
    Plant("int8 dequantization of 512 x 16384", 1, _int8_dequantization),
    Plant("softmax 4096x8192", 1, _softmax(4096, 8192)),
    Plant("host sleeps 0.5 ms", 1, _sleep(0.0005), is_gap=True),
]
CPU_PLANTS = [
    Plant("fp32 GEMM 512", 1, _product(512, torch.float32)),
    Plant("host sleeps 2 ms", 1, _sleep(0.002), is_gap=True),
    Plant("softmax 512x1024 in prefill", 1, _softmax(512, 1024), "prefill"),
]
