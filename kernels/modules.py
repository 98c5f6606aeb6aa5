"""Linear layers over the fused kernels, and the way from a bitsandbytes model to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmkern.kernels import ops as _ops  # noqa: F401  registers torch.ops.llmkern
from llmkern.kernels.formats import Bf16Weight, Int4Weight, Int8Weight, Nf4Weight, Weight


class FusedLinear(nn.Module):
    """y = x · Wᵀ + bias (+ residual) by one fused kernel; *weight* is any Weight, *pairs* as in linear().

    Its weights are constant, so that the kernel may read them before its predecessor has ended (programmatic dependent
    launch); do not write into them on the device just before a call.
    """

    def __init__(self, weight: Weight, bias: torch.Tensor | None, pairs: bool = False) -> None:
        super().__init__()
        self.pairs = pairs
        self.weight_format = weight
        self.in_features, self.out_features = weight.k, weight.n
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        weight: Any = self.weight_format
        options = {"pdl": x.device.type == "cuda", "residual": residual, "pairs": self.pairs}
        if isinstance(weight, Bf16Weight):
            return torch.ops.llmkern.bf16_linear(x, self.rows, self.bias, **options)
        options["packed"] = weight.packed
        if isinstance(weight, Int8Weight):
            return torch.ops.llmkern.int8_linear(x, self.codes, self.scales, self.bias, **options)
        if isinstance(weight, Int4Weight):
            return torch.ops.llmkern.int4_linear(
                x, self.codes, self.scales, weight.n, weight.group, self.bias, **options
            )
        nested = {}
        if weight.nested:
            nested = {name: getattr(self, name) for name in ("nested_bytes", "nested_table", "nested_offset")}
        return torch.ops.llmkern.nf4_linear(
            x, self.codes, self.code, self.absmax, weight.n, weight.blocksize, self.bias, **nested, **options
        )

    def extra_repr(self) -> str:
        weight = self.weight_format
        return f"{weight.format}, {weight.k} -> {weight.n}{', packed' if weight.packed else ''}"


def weight_of(module: nn.Module) -> Weight | None:
    """Return the stored weight of a bitsandbytes layer as a Weight without copying it, None for any other module.

    Raises ValueError for a layer that is not quantized yet (it has not been on a GPU, say).
    """
    kind = type(module).__name__
    weight: Any = getattr(module, "weight", None)
    if kind == "Linear8bitLt":
        # After the first call the pair lives in the layer's state.
        state: Any = getattr(module, "state", None)
        codes = weight.CB if getattr(weight, "CB", None) is not None else getattr(state, "CB", None)
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else getattr(state, "SCB", None)
        if scales is None:
            raise ValueError("this Linear8bitLt is not quantized: move it to a GPU first.")
        codes = weight.data if codes is None else codes
        return Int8Weight.of(codes.contiguous(), scales.float().contiguous())
    if kind == "Linear4bit":
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError("this Linear4bit is not quantized: move it to a GPU first.")
        n, k = state.shape
        nested: tuple[Any, ...] = (None, None, None)
        absmax = state.absmax
        if state.nested:
            nested = (state.absmax, state.state2.code.float(), state.offset.float())
            absmax = state.state2.absmax
        return Nf4Weight(
            n, k, False, weight.data.view(-1), state.code.float(), absmax.float(), state.blocksize, *nested
        )
    return None


def apply(model: nn.Module, packed: bool = True) -> int:
    """Replace the bitsandbytes layers of *model* by FusedLinear over the same weights, in place; return how many.

    *packed* repacks the weights that divide into tiles (as many bytes; NF4's double-quantized scales become fp32).
    LLM.int8's outlier path has no place here: weights stay int8, activations stay as they are. Raises ValueError for
    layers that are not quantized yet.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = weight_of(child)
            if weight is None:
                continue
            bias = getattr(child, "bias", None)
            if packed and weight.can_pack():
                weight = weight.to_packed()
            setattr(parent, name, FusedLinear(weight, None if bias is None else bias.detach()))
            replaced += 1
    return replaced
