"""Seeded random weights of a true architecture, built straight on the device, with planted outlier features."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from llmkern.errors import UsageError
from llmkern.workload.models import first_line, shape_of
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


@dataclass(frozen=True)
class RandomWeights:
    """What random weights depend on besides the architecture and its precision."""

    seed: int = 0
    outliers: int = 6
    double_quant: bool = False
    int8_threshold: float = OUTLIER_THRESHOLD


def random_model(
    config: PretrainedConfig,
    precision: str,
    device: torch.device,
    how: RandomWeights,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Any, OutlierPlan | None]:
    """Return a model of *config* with seeded random weights, quantized layer by layer, and its planted outliers.

    Linear layers are normal with LINEAR_GAIN / sqrt(inputs), everything else is as Transformers initializes it for this
    architecture. A parameter's values depend on the seed and its name only, so that every precision quantizes the same
    draw. *progress* is told how many parameters of how many are done. Raises UsageError for a model that bitsandbytes
    cannot quantize.
    """
    dtype = DTYPES[precision]
    model = _without_weights(config, dtype)
    if precision in ("int8", "int4"):
        layers = quantizable(model)
        if not layers:
            raise UsageError(
                f"--precision {precision}: {type(model).__name__} has no linear layer that bitsandbytes quantizes when "
                "weights are random; choose bf16, fp16 or fp32, or real weights."
            )
        for name, layer in layers:
            model.set_submodule(name, empty_quantized(layer, precision, how.int8_threshold, how.double_quant))
    names = [n for n, _ in model.named_parameters()]
    done = 0
    for owner_name, owner in list(model.named_modules()):
        own = list(owner.named_parameters(recurse=False))
        if not own:
            continue
        quantized = type(owner).__module__.startswith("bitsandbytes")
        for leaf, parameter in own:
            draw = _Draw(f"{owner_name}.{leaf}" if owner_name else leaf, how.seed, dtype, device)
            if quantized and leaf == "weight":
                assert isinstance(owner, nn.Linear)
                quantize_into(owner, draw.linear((owner.out_features, owner.in_features)), how.double_quant)
            else:
                values = draw.of(owner, leaf, tuple(parameter.shape), config)
                setattr(owner, leaf, nn.Parameter(values, requires_grad=False))
            done += 1
            progress(done, len(names))
        if not quantized and not isinstance(owner, nn.Linear | Conv1D | nn.Embedding):
            # Norms that are one plus their weight, state spaces, gates: the architecture knows what they start from.
            with torch.random.fork_rng(devices=[device] if device.type != "cpu" else []), torch.no_grad():
                torch.manual_seed(how.seed * 1_000_003 + zlib.crc32(owner_name.encode()))
                model._init_weights(owner)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    model.tie_weights()
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise UsageError(
            f"{type(model).__name__} keeps {', '.join(left[:3])} in a way that random weights cannot be put into: use "
            "--weights hub or local."
        )
    model.eval()
    return model, _plant(model, shape_of(config).hidden, how.outliers, how.seed)


def _without_weights(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Return the model with its buffers (rotary frequencies, masks) for real and its parameters on the meta device."""
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        # Configurations of others can be wrong in every way.
        raise UsageError(
            f"no model can be made of this configuration ({first_line(error)}): check config.json."
        ) from error


@dataclass(frozen=True)
class _Draw:
    """The values of the parameter *name*."""

    name: str
    seed: int
    dtype: torch.dtype
    device: torch.device

    def of(self, owner: nn.Module, leaf: str, shape: tuple[int, ...], config: PretrainedConfig) -> torch.Tensor:
        if leaf.endswith("bias"):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        if "norm" in type(owner).__name__.lower():
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        if isinstance(owner, nn.Linear) and leaf == "weight":
            return self.linear(shape)
        if isinstance(owner, Conv1D) and leaf == "weight":
            # A linear layer that keeps its weights transposed.
            return self._normal(shape, LINEAR_GAIN / math.sqrt(shape[0]))
        std = getattr(config.get_text_config(decoder=True), "initializer_range", None)
        return self._normal(shape, float(std or 0.02))

    def linear(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the weight of a linear layer of shape [outputs, inputs]."""
        return self._normal(shape, LINEAR_GAIN / math.sqrt(shape[1]))

    def _normal(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + zlib.crc32(self.name.encode()))
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        return values.normal_(0.0, std, generator=generator)


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
