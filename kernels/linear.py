"""y = x · Wᵀ + bias over quantized weights, by whichever version the registry chooses or the caller names."""

from __future__ import annotations

import importlib

import torch

from llmkern.kernels import registry
from llmkern.kernels.formats import Bf16Weight, Int4Weight, Weight

DTYPES = (torch.bfloat16, torch.float16)


def linear(
    weight: Weight,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    choice: registry.Choice | None = None,
    pdl: bool = False,
    residual: torch.Tensor | None = None,
    pairs: bool = False,
) -> torch.Tensor:
    """Return x [..., K] · Wᵀ + bias [N] as [..., N] in x's dtype (bf16 or fp16; on the CPU also fp32).

    *residual* [..., N] is added to it. With *pairs* (see formats.pairs_order) the result is silu(gates) * what they
    open, [..., N / 2]. Nothing waits for the device. *pdl* lets the kernel read weights while its predecessor still
    runs: only for weights that no kernel just before has written. Raises ValueError for shapes, dtypes or devices that
    do not fit.
    """
    check(weight, x, bias)
    _check_epilogue(weight, x, residual, pairs)
    rows = x.reshape(-1, weight.k)
    if not rows.is_contiguous() or rows.data_ptr() % 16:
        # A slice of another tensor may begin anywhere; loads are 16 bytes wide.
        rows = rows.clone(memory_format=torch.contiguous_format)
    choice = choice or registry.choose(weight, rows.shape[0], x.device)
    width = weight.n // 2 if pairs else weight.n
    y = torch.empty((rows.shape[0], width), dtype=x.dtype, device=x.device)
    added = None if residual is None else residual.reshape(-1, weight.n)
    if rows.shape[0] == 0:
        pass
    elif choice.backend == "cuda":
        from llmkern.kernels.launch import launch

        launch(choice.build(weight, x.dtype, pdl, pairs, added is not None), weight.struct(), rows, bias, y, added)
    elif choice.backend == "triton":
        whole = torch.empty((rows.shape[0], weight.n), dtype=x.dtype, device=x.device)
        importlib.import_module(f"llmkern.kernels.{weight.format}_linear.triton").run(weight, rows, bias, whole)
        y = finished(whole, added, pairs)
    else:
        values = weight.rows if isinstance(weight, Bf16Weight) else weight.dequantized()
        y = finished(torch.nn.functional.linear(rows, values.to(x.dtype), bias), added, pairs)
    return y.view(*x.shape[:-1], width)


def finished(product: torch.Tensor, residual: torch.Tensor | None, pairs: bool) -> torch.Tensor:
    """Return *product* [M, N] with *residual* added or its *pairs* of eight rows each multiplied."""
    if pairs:
        gates, opened = product.view(len(product), -1, 2, 8).unbind(2)
        return (torch.nn.functional.silu(gates) * opened).reshape(len(product), -1)
    return product if residual is None else product + residual


def _check_epilogue(weight: Weight, x: torch.Tensor, residual: torch.Tensor | None, pairs: bool) -> None:
    shape = (*x.shape[:-1], weight.n)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}, but must be {shape} {x.dtype} "
            f"on {x.device}."
        )
    if residual is not None and (pairs or not residual.is_contiguous()):
        raise ValueError("a residual must be contiguous, and goes with no pairs.")
    if pairs and (weight.n % 16 or weight.k % (16 if weight.format == "int8" else 64)):
        raise ValueError(f"pairs need N = {weight.n} to divide by 16 and K = {weight.k} by 64.")


def check(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Refuse arguments of linear() that do not fit together. Raises ValueError."""
    name = f"{weight.format}_linear"
    if x.dim() == 0 or x.shape[-1] != weight.k:
        raise ValueError(
            f"{name}: x is {tuple(x.shape)}, but the weights have K = {weight.k}: its last size must be that."
        )
    if x.dtype not in DTYPES and x.device.type == "cuda":
        raise ValueError(f"{name}: x is {x.dtype}, but the kernels take bfloat16 and float16: convert it.")
    if bias is not None and (bias.shape != (weight.n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"{name}: bias is {tuple(bias.shape)} {bias.dtype} on {bias.device}, "
            f"but must be ({weight.n},) {x.dtype} on {x.device}."
        )
    if weight.group_size & (weight.group_size - 1):
        raise ValueError(f"{name}: groups of {weight.group_size} weights share a scale: it must be a power of two.")
    if isinstance(weight, Int4Weight) and weight.scales.dtype != x.dtype:
        raise ValueError(f"{name}: scales are {weight.scales.dtype}, x is {x.dtype}: convert one of them.")
    for which, tensor in weight.tensors().items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: {which} is on {tensor.device}, x on {x.device}: move one of them.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {which} is not contiguous: give {which}.contiguous().")
