"""What a candidate is held against: our kernels, cuBLAS bf16, bitsandbytes, PyTorch's tinygemm and GemLite."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from llmkern.errors import UsageError
from llmkern.evaluate.candidate import Candidate
from llmkern.kernels.build import spilled_bytes
from llmkern.kernels.formats import Weight
from llmkern.kernels.linear import linear
from llmkern.kernels.registry import Choice


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def available(format: str) -> list[str]:
    """Return the specs of the peers for *format* that this machine can run, ours first."""
    specs = ["llmkern:cuda", "llmkern:cuda-packed"]
    specs += ["llmkern:triton"] if _installed("triton") else []
    specs.append("peer:cublas")
    if format in ("int8", "nf4") and _installed("bitsandbytes"):
        specs.append("peer:bitsandbytes")
    if format == "int4":
        specs.append("peer:tinygemm")
    if format in ("int8", "int4") and _installed("gemlite"):
        specs.append("peer:gemlite")
    return specs


def peer(spec: str) -> Candidate:
    """Return the peer called *spec*. Raises UsageError for a name that is none."""
    if spec not in _MADE:
        raise UsageError(f"there is no peer {spec!r}: it is one of {', '.join(_MADE)}.")
    return _MADE[spec][1]()


def name_of(spec: str) -> str:
    """Return what the reports call the peer *spec*."""
    return _MADE[spec][0]


def _ours() -> Candidate:
    def call(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(weight, x, bias, pdl=x.device.type == "cuda")

    return Candidate(call, spilled_bytes=spilled_bytes)


def _packed() -> Candidate:
    def prepare(weight: Weight) -> Weight:
        return weight.to_packed() if weight.can_pack() else weight

    return Candidate(_ours().call, prepare, spilled_bytes=spilled_bytes)


def _triton() -> Candidate:
    def call(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(weight, x, bias, choice=Choice("triton"))

    return Candidate(call)


def _cublas() -> Candidate:
    """The dequantized matrix in bf16 through torch.nn.functional.linear."""

    def prepare(weight: Any) -> torch.Tensor:
        values: torch.Tensor = weight.dequantized().to(torch.bfloat16)
        return values

    return Candidate(torch.nn.functional.linear, prepare, bytes_per_weight=2, dtypes=("bf16",))


def _bitsandbytes() -> Candidate:
    import bitsandbytes as bnb

    def prepare(weight: Any) -> Any:
        if weight.format == "int8":
            state = bnb.MatmulLtState()
            state.CB, state.SCB, state.has_fp16_weights, state.threshold = weight.codes, weight.scales, False, 6.0
            return state
        inner = bnb.functional.QuantState(
            absmax=weight.block_scales(),
            shape=torch.Size((weight.n, weight.k)),
            code=weight.code,
            blocksize=weight.blocksize,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        return weight.codes.view(-1, 1), inner

    def call(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(weight, tuple):
            codes, state = weight
            state.dtype = x.dtype
            y: torch.Tensor = bnb.matmul_4bit(x, codes.t(), quant_state=state, bias=bias)
        else:
            y = bnb.matmul(x, weight.CB, bias=bias, state=weight)
        return y.to(x.dtype)

    return Candidate(call, prepare, ("int8", "nf4"))


def _tinygemm() -> Candidate:
    """PyTorch's int4 kernel over the same codes: its zero point is 8, as ours is."""

    def prepare(weight: Any) -> Any:
        low, high = weight.codes & 15, weight.codes >> 4
        # It wants the even weight in the high nibble.
        packed = torch.ops.aten._convert_weight_to_int4pack((low << 4 | high).contiguous(), 8)
        scales = weight.scales.to(torch.bfloat16).t().contiguous()
        return packed, torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous(), weight.group

    def call(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        packed, scales, group = weight
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)
        return y if bias is None else y + bias

    return Candidate(call, prepare, ("int4",), dtypes=("bf16",))


def _gemlite() -> Candidate:
    from gemlite.helper import A16W8_INT8, A16Wn

    def prepare(weight: Any) -> Any:
        where: dict[str, Any] = {"device": weight.codes.device, "dtype": torch.bfloat16}
        if weight.format == "int8":
            return A16W8_INT8(**where).from_weights(weight.codes, scales=(weight.scales / 127).view(-1, 1))
        codes = torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).view(weight.n, weight.k)
        scales = weight.scales.view(-1, 1)
        return A16Wn(**where).from_weights(codes, scales, torch.full_like(scales, 8), 4, weight.group)

    def call(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = weight(x)
        return y if bias is None else y + bias

    return Candidate(call, prepare, ("int8", "int4"), dtypes=("bf16",))


_MADE: dict[str, tuple[str, Callable[[], Candidate]]] = {
    "llmkern:cuda": ("llmkern", _ours),
    "llmkern:cuda-packed": ("llmkern packed", _packed),
    "llmkern:triton": ("llmkern Triton", _triton),
    "peer:cublas": ("cuBLAS bf16", _cublas),
    "peer:bitsandbytes": ("bitsandbytes", _bitsandbytes),
    "peer:tinygemm": ("tinygemm", _tinygemm),
    "peer:gemlite": ("GemLite", _gemlite),
}
