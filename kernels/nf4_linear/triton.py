"""nf4_linear in Triton: the codebook is gathered; where blocks divide the rows, scales are applied to sums."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmkern.kernels.formats import Nf4Weight


@triton.jit
def _scale(absmax, nested_bytes, nested_table, nested_offset, block, mask, NESTED: tl.constexpr):
    if NESTED:
        byte = tl.load(nested_bytes + block, mask=mask, other=0).to(tl.int32)
        outer = tl.load(absmax + block // 256, mask=mask, other=0.0)
        return tl.load(nested_table + byte) * outer + tl.load(nested_offset)
    return tl.load(absmax + block, mask=mask, other=0.0)


@triton.jit
def _nf4_linear(
    x, codes, code, absmax, nested_bytes, nested_table, nested_offset, bias, y, M, N, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    pairs = tl.arange(0, HALF)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, 2 * HALF):
        ks = start + 2 * pairs
        # Flat as bitsandbytes stores it; an odd K puts a row's first code into the middle of a byte.
        flat = rows[None, :].to(tl.int64) * K + ks[:, None]
        there = (rows < N)[None, :] & (ks < K)[:, None]
        second = there & (ks + 1 < K)[:, None]
        p = x + tokens[:, None].to(tl.int64) * K + ks[None, :]
        even = tl.load(p, mask=(tokens < M)[:, None] & (ks < K)[None, :], other=0.0, eviction_policy="evict_last")
        odd = tl.load(
            p + 1, mask=(tokens < M)[:, None] & (ks + 1 < K)[None, :], other=0.0, eviction_policy="evict_last"
        )
        if ALIGNED:
            w = tl.load(codes + flat // 2, mask=there, other=0, eviction_policy="evict_first").to(tl.int32)
            part = tl.dot(even, tl.load(code + (w >> 4)).to(even.dtype))
            part += tl.dot(odd, tl.load(code + (w & 15)).to(even.dtype))
            block = (rows.to(tl.int64) * K + start) // BLOCK
            scale = _scale(absmax, nested_bytes, nested_table, nested_offset, block, rows < N, NESTED)
            acc += part * scale[None, :]
        else:
            w0 = tl.load(codes + flat // 2, mask=there, other=0).to(tl.int32)
            w1 = tl.load(codes + (flat + 1) // 2, mask=second, other=0).to(tl.int32)
            n0 = tl.where(flat % 2 == 0, w0 >> 4, w0 & 15)
            n1 = tl.where(flat % 2 == 1, w1 >> 4, w1 & 15)
            s0 = _scale(absmax, nested_bytes, nested_table, nested_offset, flat // BLOCK, there, NESTED)
            s1 = _scale(absmax, nested_bytes, nested_table, nested_offset, (flat + 1) // BLOCK, second, NESTED)
            acc += tl.dot(even, (tl.load(code + n0) * s0).to(even.dtype))
            acc += tl.dot(odd, (tl.load(code + n1) * s1).to(even.dtype))
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    stored = (tokens < M)[:, None] & (rows < N)[None, :]
    tl.store(y + tokens[:, None].to(tl.int64) * N + rows[None, :], acc.to(y.dtype.element_ty), mask=stored)


def run(weight: Nf4Weight, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, **options: Any) -> None:
    """Fill y [M, N] from x [M, K] (bf16 or fp16) and *weight* in rows; *options* go to the launch (BN, num_warps)."""
    m, k = x.shape
    block = {"BM": 16 if m <= 16 else 32 if m <= 32 else 64, "BN": 32, "num_warps": 4, **options}
    grid = (triton.cdiv(weight.n, block["BN"]), triton.cdiv(m, block["BM"]))
    bias_or_x = x if bias is None else bias
    nested = (weight.nested_bytes, weight.nested_table, weight.nested_offset)
    _nf4_linear[grid](
        *(x, weight.codes, weight.code, weight.absmax),
        *(weight.absmax if tensor is None else tensor for tensor in nested),
        *(bias_or_x, y, m, weight.n, k),
        HAS_BIAS=bias is not None,
        NESTED=weight.nested,
        BLOCK=weight.blocksize,
        ALIGNED=k % weight.blocksize == 0 and weight.blocksize >= 64,
        HALF=32,
        **block,
    )
