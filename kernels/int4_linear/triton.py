"""int4_linear in Triton: a program step is one group, so that its scale is applied to sums and not to weights."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmkern.kernels.formats import Int4Weight


@triton.jit
def _int4_linear(
    x, codes, scales, bias, y, M, N, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = GROUP // 2
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    pairs = tl.arange(0, HALF)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for group in range(0, K // GROUP):
        w = tl.load(
            codes + rows[None, :].to(tl.int64) * (K // 2) + group * HALF + pairs[:, None],
            mask=(rows < N)[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        p = x + tokens[:, None].to(tl.int64) * K + group * GROUP + 2 * pairs[None, :]
        inside = (tokens < M)[:, None]
        even = tl.load(p, mask=inside, other=0.0, eviction_policy="evict_last")
        odd = tl.load(p + 1, mask=inside, other=0.0, eviction_policy="evict_last")
        low = ((w & 15).to(tl.int32) - 8).to(even.dtype)
        high = ((w >> 4).to(tl.int32) - 8).to(even.dtype)
        part = tl.dot(even, low)
        part += tl.dot(odd, high)
        scale = tl.load(scales + rows.to(tl.int64) * (K // GROUP) + group, mask=rows < N, other=0.0)
        acc += part * scale.to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    stored = (tokens < M)[:, None] & (rows < N)[None, :]
    tl.store(y + tokens[:, None].to(tl.int64) * N + rows[None, :], acc.to(y.dtype.element_ty), mask=stored)


def run(weight: Int4Weight, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, **options: Any) -> None:
    """Fill y [M, N] from x [M, K] (bf16 or fp16) and *weight* in rows; *options* go to the launch (BN, num_warps)."""
    m, k = x.shape
    block = {"BM": 16 if m <= 16 else 32 if m <= 32 else 64, "BN": 32, "num_warps": 4, **options}
    grid = (triton.cdiv(weight.n, block["BN"]), triton.cdiv(m, block["BM"]))
    has_bias = bias is not None
    _int4_linear[grid](
        *(x, weight.codes, weight.scales, bias if has_bias else x, y, m, weight.n, k),
        HAS_BIAS=has_bias,
        GROUP=weight.group,
        **block,
    )
