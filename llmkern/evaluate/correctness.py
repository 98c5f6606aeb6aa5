"""Is what a candidate returns the product? Held against fp32 on the dequantized weights, in poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmkern.evaluate.candidate import Candidate
from llmkern.evaluate.inputs import Inputs
from llmkern.evaluate.job import Check


class CandidateError(Exception):
    """What a candidate did is not what was asked of it; the message is a sentence."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN for the time, so that an output nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


def reference(inputs: Inputs) -> torch.Tensor:
    """Return x · Wᵀ + bias in fp32, without TF32, on the weights as they are stored."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        bias = None if inputs.bias is None else inputs.bias.float()
        return torch.nn.functional.linear(inputs.x.float(), inputs.weight.dequantized(), bias)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def check(candidate: Candidate, inputs: Inputs, prepared: Any = None) -> Check:
    """Return how the candidate's output compares with the reference; *prepared* is its weight where it is made already.

    Raises CandidateError for an output of another shape or type.
    """
    expected = reference(inputs)
    # By itself: a candidate that overwrites its input is found out by the next comparison.
    x = inputs.x.clone()
    prepared = candidate.prepare(inputs.weight) if prepared is None else prepared
    with poisoned():
        y = candidate.call(x, prepared, inputs.bias)
        if y is not None and isinstance(y, torch.Tensor) and y.device.type == "cuda":
            torch.cuda.synchronize()
    _check_form(y, expected, inputs)
    if not torch.equal(x, inputs.x):
        raise CandidateError(f"it changed its input x ({inputs.name}): a linear layer must leave it as it is")
    return compare(inputs.name, y, expected)


def _check_form(y: Any, expected: torch.Tensor, inputs: Inputs) -> None:
    if not isinstance(y, torch.Tensor):
        raise CandidateError(
            f"it returned {type(y).__name__} instead of a tensor [{expected.shape[0]}, {expected.shape[1]}]"
        )
    if y.shape != expected.shape:
        raise CandidateError(
            f"it returned a tensor of shape {list(y.shape)} where {list(expected.shape)} is asked for ({inputs.name})"
        )
    if y.dtype != inputs.x.dtype:
        raise CandidateError(
            f"it returned {y.dtype} where {inputs.x.dtype}, the type of x, is asked for ({inputs.name})"
        )


def compare(name: str, y: torch.Tensor, expected: torch.Tensor) -> Check:
    """Return the comparison of *y* with the fp32 value *expected*."""
    got = y.float()
    # What poisoned() left is NaN; a candidate that computes NaN looks the same, and is as wrong.
    unwritten = int(torch.isnan(got).sum())
    not_finite = int(torch.isinf(got).sum())
    if unwritten or not_finite:
        return Check(name, None, None, not_finite, unwritten, got.numel())
    difference = (got - expected).abs()
    scale = float(expected.norm())
    rel_l2 = float(difference.norm()) / scale if scale > 0 else float(difference.norm())
    rms = scale / max(1, expected.numel()) ** 0.5
    matched = float((difference <= 0.01 * expected.abs() + 0.02 * rms).float().mean())
    return Check(name, rel_l2, matched, 0, 0, got.numel())
