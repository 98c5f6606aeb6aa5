"""int4_linear in plain PyTorch: fp32 on the dequantized weights, the value that every other version is held against."""

from __future__ import annotations

import torch

from llmkern.kernels.formats import Int4Weight


def reference(weight: Int4Weight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [M, K] · Wᵀ + bias as fp32 [M, N]."""
    return torch.nn.functional.linear(x.float(), weight.dequantized(), None if bias is None else bias.float())
