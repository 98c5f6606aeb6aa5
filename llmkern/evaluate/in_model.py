"""A candidate in its place: every quantized layer of a model through it, decode in ms and J per token.

Decode is (generate(n) - generate(1)) / (n - 1), from a CUDA graph where the model's step can be captured, else eager.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llmkern.errors import DeviceError, UsageError
from llmkern.estimate import Estimate, from_samples
from llmkern.evaluate.candidate import Candidate
from llmkern.evaluate.energy import Scale, Span
from llmkern.evaluate.job import ModelRow
from llmkern.kernels.formats import Int4Weight, Weight
from llmkern.kernels.modules import weight_of
from llmkern.record.annotate import Annotator
from llmkern.record.device.interface import Device
from llmkern.record.generation import Generation
from llmkern.workload.engine import use_graph
from llmkern.workload.load import choose_source, load_model
from llmkern.workload.models import find_model, shape_of
from llmkern.workload.precision import quantizable
from llmkern.workload.prompts import builtin_prompts

# The precision whose model has layers of a format; int4 has none in bitsandbytes and is made of bf16.
PRECISIONS = {"int8": "int8", "nf4": "int4", "int4": "bf16"}
PROMPT_TOKENS, NEW_TOKENS, ROUNDS, WINDOW_S = 128, 33, 4, 1.5


class CandidateLinear(nn.Module):
    """A layer whose product the candidate computes."""

    def __init__(self, candidate: Candidate, weight: Weight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._candidate, self._weight, self._bias = candidate, candidate.prepare(weight), bias
        self.in_features, self.out_features = weight.k, weight.n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self._candidate.call(rows if rows.is_contiguous() else rows.contiguous(), self._weight, self._bias)
        return y.view(*x.shape[:-1], self.out_features)


def swap(model: nn.Module, format: str, group: int, candidate: Candidate) -> int:
    """Put *candidate* in the place of every quantized layer of *model*; return how many there were."""
    if format == "int4":
        layers = [(name, child, _int4(child, group)) for name, child in quantizable(model)]
    else:
        found = [(name, child, weight_of(child)) for name, child in model.named_modules()]
        layers = [(name, child, weight) for name, child, weight in found if weight is not None]
    for name, child, weight in layers:
        bias: Any = getattr(child, "bias", None)
        parent = model.get_submodule(name.rpartition(".")[0])
        own = CandidateLinear(candidate, weight, None if bias is None else bias.detach())
        setattr(parent, name.rpartition(".")[2], own)
    return len(layers)


def _int4(layer: nn.Linear, group: int) -> Weight:
    return Int4Weight.quantize(layer.weight.detach(), group, layer.weight.dtype)


@dataclass(frozen=True)
class Place:
    """Where a candidate is put: a *model* of the registry with layers of *format*, *batch* sequences at a time."""

    model: str
    format: str
    group: int
    batch: int


def decode_with(device: Device, scale: Scale | None, place: Place, name: str, candidate: Candidate | None) -> ModelRow:
    """Return decode of *place* with *candidate* in it, or as it is for None.

    Raises UsageError where the model has no layer to replace, DeviceError where it does not fit.
    """
    spec = find_model(place.model)
    precision = PRECISIONS[place.format]
    loaded = load_model(spec, choose_source(spec, "auto"), precision, device.torch_device)
    prompts = builtin_prompts(place.batch, PROMPT_TOKENS, None, shape_of(loaded.config).vocabulary, 0)
    ids, mask = (t.to(device.torch_device) for t in (prompts.input_ids, prompts.attention_mask))
    inputs = {"input_ids": ids, "attention_mask": mask}
    rel_l2 = None
    if candidate is not None:
        with torch.inference_mode():
            before = loaded.model(**inputs).logits.float()
            if not swap(loaded.model, place.format, place.group, candidate):
                raise UsageError(f"{place.model} at {precision} has no layer to replace: name a larger model.")
            after = loaded.model(**inputs).logits.float()
            rel_l2 = float((after - before).norm() / before.norm())
    generation = _generation(device, loaded.model, inputs)
    token_ms = from_samples([1e3 * seconds for seconds in _rounds(generation)])
    token_j = None if scale is None else _joules(scale, generation)
    return ModelRow(name, _three(token_ms), None if token_j is None else _three(token_j), rel_l2)


def _generation(device: Device, model: Any, inputs: dict[str, torch.Tensor]) -> Generation:
    """Return a warm generation, from a CUDA graph where that can be had."""
    forward = model.forward
    if device.torch_device.type == "cuda":
        cache = use_graph(model, PROMPT_TOKENS, NEW_TOKENS)
        try:
            return _warm(Generation(model, inputs, Annotator(), device.synchronize, cache))
        except DeviceError:
            model.forward = forward
    return _warm(Generation(model, inputs, Annotator(), device.synchronize))


def _warm(generation: Generation) -> Generation:
    for tokens in (4, 4, 1):
        generation(tokens)
    generation.annotator.drain()
    return generation


def _rounds(generation: Generation) -> Iterator[float]:
    """Yield the seconds per decoded token, round by round."""
    for _ in range(2 * ROUNDS):
        first = generation(1)
        yield (generation(NEW_TOKENS) - first) / (NEW_TOKENS - 1)
        generation.annotator.drain()


def _joules(scale: Scale, generation: Generation) -> Estimate | None:
    """Return the J per decoded token of all sequences, from windows of whole and of one-token generations."""
    spans: dict[int, list[Span]] = {1: [], NEW_TOKENS: []}
    for _ in range(ROUNDS):
        for tokens, mine in spans.items():
            scale.meter.wait_for_tick(1.0)
            span, end_s = Span(time.time_ns(), 0), time.monotonic() + WINDOW_S
            while time.monotonic() < end_s:
                generation(tokens)
                span.calls += 1
            span.end_ns = time.time_ns()
            scale.meter.wait_for_tick(1.0)
            scale.meter.wait_for_tick(1.0)
            mine.append(span)
            generation.annotator.drain()
    scale.rest()
    whole, first = (scale.joules_of(spans[tokens]) for tokens in (NEW_TOKENS, 1))
    pairs = [(a - b) / (NEW_TOKENS - 1) for a, b in zip(whole, first, strict=True) if np.isfinite(a) and np.isfinite(b)]
    return from_samples(pairs) if len(pairs) >= 3 else None


def _three(estimate: Estimate) -> tuple[float, float, float]:
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    return estimate.value, low, high
