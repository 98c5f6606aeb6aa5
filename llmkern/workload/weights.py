"""Seeded random weights of a true architecture, built straight on the device, with planted outlier features."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmkern.workload.precision import DTYPES, empty_quantized, quantizable, quantize_into

OUTLIER_SOURCE = "Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, section 4"
# A normalized hidden state is about standard normal: times 24 it exceeds 6.0 with probability P(|z| > 0.25) = 80 %,
# near the share of sequence positions (75 %) that the paper reports for models above 6.7B parameters.
OUTLIER_GAIN = 24.0
OUTLIER_THRESHOLD = 6.0
# Keeps what a linear layer puts out at half the scale of its input, so that next to nothing passes LLM.int8()'s
# threshold but what is planted. With Transformers' usual 0.02 a 7B model's gate and up projections have a deviation of
# 1.2, and dozens of their 18,944 products exceed 6.0 at every token.
LINEAR_GAIN = 0.5
_OUTLIER_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class OutlierPlan:
    """Which hidden *dimensions* were made outlier features: the norms before attention and MLP weigh them *gain* fold.

    The inputs of q, k, v, gate and up then exceed *threshold* there in most positions; those of o and down hardly ever.
    """

    dimensions: tuple[int, ...]
    gain: float
    threshold: float
    source: str


def random_model(
    config: PretrainedConfig,
    *,
    precision: str,
    device: torch.device,
    seed: int,
    outliers: int,
    double_quant: bool,
    int8_threshold: float,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Any, OutlierPlan | None]:
    """Return a model of *config* with seeded random weights, quantized layer by layer, and its planted outliers.

    Embeddings are normal with the architecture's initializer_range, norms one, biases zero, as Transformers initializes
    them; linear layers are normal with LINEAR_GAIN / sqrt(inputs). A parameter's values depend on *seed* and its name
    only, so that every precision quantizes the same draw.
    """
    dtype = DTYPES[precision]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if precision in ("int8", "int4"):
        for name, layer in quantizable(model):
            model.set_submodule(name, empty_quantized(layer, precision, int8_threshold, double_quant))
    quantized = {n for n, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes")}
    names = [n for n, _ in model.named_parameters()]
    for done, name in enumerate(names):
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        shape = getattr(owner, leaf).shape
        if isinstance(owner, nn.Linear) and leaf == "weight":
            std = LINEAR_GAIN / math.sqrt(owner.in_features)
        else:
            std = float(getattr(config, "initializer_range", 0.02))
        if owner_name in quantized and leaf == "weight":
            drawn = _draw(name, owner, (owner.out_features, owner.in_features), std, dtype, device, seed)
            quantize_into(owner, drawn, double_quant)
            del drawn
        else:
            values = _draw(name, owner, tuple(shape), std, dtype, device, seed)
            setattr(owner, leaf, nn.Parameter(values, requires_grad=False))
        if progress is not None:
            progress("Loading", done + 1, len(names))
    _initialize_buffers(model, config, device)
    model.tie_weights()
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise RuntimeError(f"no values for {', '.join(left[:3])} of {type(model).__name__}")
    model.eval()
    return model, _plant(model, config.hidden_size, outliers, seed)


def _draw(
    name: str, owner: nn.Module, shape: tuple[int, ...], std: float, dtype: torch.dtype, device: torch.device, seed: int
) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device=device)
    if "norm" in type(owner).__name__.lower():
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)


def _initialize_buffers(model: nn.Module, config: PretrainedConfig, device: torch.device) -> None:
    """Compute the buffers (rotary frequencies) for real: a model born on the meta device has none of their values."""
    for name, module in list(model.named_modules()):
        if any(b.is_meta for b in module.buffers(recurse=False)):
            with torch.device(device):
                model.set_submodule(name, type(module)(config=config))


def _plant(model: nn.Module, hidden_size: int, outliers: int, seed: int) -> OutlierPlan | None:
    if outliers == 0:
        return None
    count = min(outliers, hidden_size)
    chosen = torch.randperm(hidden_size, generator=torch.Generator().manual_seed(seed))[:count]
    dimensions = tuple(sorted(int(d) for d in chosen))
    planted = False
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in _OUTLIER_NORMS and isinstance(getattr(module, "weight", None), nn.Parameter):
                module.weight[list(dimensions)] = OUTLIER_GAIN
                planted = True
    return OutlierPlan(dimensions, OUTLIER_GAIN, OUTLIER_THRESHOLD, OUTLIER_SOURCE) if planted else None


def outlier_shares(model: nn.Module, input_ids: torch.Tensor, threshold: float = OUTLIER_THRESHOLD) -> dict[str, float]:
    """Return for each linear layer the share of rows (tokens) of its input with a value beyond *threshold*.

    Runs one forward of *input_ids* [batch, tokens].
    """
    shares: dict[str, float] = {}
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            shares[name] = float((rows.abs() > threshold).any(dim=1).float().mean())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(watch(name)))
    try:
        with torch.inference_mode():
            model(input_ids=input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return shares
