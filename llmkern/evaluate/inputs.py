"""Weights and activations that a candidate is tried on: fresh, seeded, and of the kinds that break kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llmkern.evaluate.job import Case
from llmkern.kernels.formats import Weight, quantize


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call; *name* says what is special about them."""

    name: str
    weight: Weight
    x: torch.Tensor
    bias: torch.Tensor | None


def random_weight(case: Case, group: int, dtype: torch.dtype, random: torch.Generator, scale: float = 1.0) -> Weight:
    """Return an [n, k] matrix of *case*'s format, quantized from normal values of *scale* / sqrt(k)."""
    values = torch.randn(case.n, case.k, generator=random, device=random.device) * (scale / case.k**0.5)
    return quantize(case.format, values, group, dtype)


def activations(case: Case, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    return torch.randn(case.m, case.k, generator=random, device=random.device).to(dtype)


def tail_of(case: Case, group: int) -> Case:
    """Return a small case whose N and K are multiples of nothing that the format does not ask for."""
    # int8 rows may have any length; int4 is made of groups; NF4's blocks run on from row to row.
    k = 1003 if case.format == "int8" else 5 * group if case.format == "int4" else 33 * 2
    n = 197 if case.format != "nf4" else 192
    return Case(case.format, n, k, case.m, "odd tail")


def variants(case: Case, group: int, dtype: torch.dtype, seed: int, device: torch.device) -> Iterator[Inputs]:
    """Yield what correctness is tried on: plain, with outlier channels, of extreme scale, with odd tails."""
    random = torch.Generator(device=device).manual_seed(seed)
    weight = random_weight(case, group, dtype, random)
    x = activations(case, dtype, random)
    bias = torch.randn(case.n, generator=random, device=device).to(dtype)
    yield Inputs("random", weight, x, bias)
    # As transformers have them: a few channels a hundred times the others (Dettmers et al. 2022, arXiv 2208.07339).
    channels = torch.randperm(case.k, generator=random, device=device)[: max(1, case.k // 500)]
    outliers = activations(case, dtype, random)
    outliers[:, channels] *= 100
    yield Inputs("outliers", weight, outliers, None)
    # Sums stay below fp16's 65504.
    for name, weights_by, x_by in (("large weights", 1e3, 1.0), ("small weights", 1e-3, 1.0), ("small x", 1.0, 1e-3)):
        scaled = random_weight(case, group, dtype, random, weights_by)
        yield Inputs(name, scaled, activations(case, dtype, random) * x_by, None)
    tail = tail_of(case, group)
    tail_bias = torch.randn(tail.n, generator=random, device=device).to(dtype)
    tail_weight = random_weight(tail, group, dtype, random)
    yield Inputs("odd tail", tail_weight, activations(tail, dtype, random), tail_bias)
