"""int8_linear in Triton: rows as bitsandbytes stores them, scaled once at the end."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llmkern.kernels.formats import Int8Weight


@triton.jit
def _int8_linear(
    x, codes, scales, bias, y, M, N, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        ks = start + tl.arange(0, BK)
        there = ks < K
        w = tl.load(
            codes + rows[None, :].to(tl.int64) * K + ks[:, None],
            mask=(rows < N)[None, :] & there[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        a = tl.load(
            x + tokens[:, None].to(tl.int64) * K + ks[None, :],
            mask=(tokens < M)[:, None] & there[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        acc += tl.dot(a, w.to(a.dtype))
    acc *= tl.load(scales + rows, mask=rows < N, other=0.0)[None, :] / 127.0
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    inside = (tokens < M)[:, None] & (rows < N)[None, :]
    tl.store(y + tokens[:, None].to(tl.int64) * N + rows[None, :], acc.to(y.dtype.element_ty), mask=inside)


def run(weight: Int8Weight, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, **options: Any) -> None:
    """Fill y [M, N] from x [M, K] (bf16 or fp16) and *weight* in rows; *options* go to the launch (BN, BK,
    num_warps).
    """
    m, k = x.shape
    block = {"BM": 16 if m <= 16 else 32 if m <= 32 else 64, "BN": 32, "BK": 128, "num_warps": 4, **options}
    grid = (triton.cdiv(weight.n, block["BN"]), triton.cdiv(m, block["BM"]))
    has_bias = bias is not None
    _int8_linear[grid](
        x, weight.codes, weight.scales, bias if has_bias else x, y, m, weight.n, k, HAS_BIAS=has_bias, **block
    )
