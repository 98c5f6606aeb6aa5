"""Precisions: which a device can run, how many bytes they need, and the quantized layers of bitsandbytes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmkern.errors import DeviceError, OutOfMemoryError, UsageError
from llmkern.workload.models import first_line, shape_of

# The dtype of everything that is not a quantized weight. bitsandbytes casts to fp16 inside LLM.int8() by itself.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}
NF4_BLOCK = 64
# CUDA context, cuBLAS workspaces and the allocator's rounding, as seen on an H100 with PyTorch 2.11.
CONTEXT_BYTES = 2**30


def have_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def check_precision(precision: str, capability: tuple[int, int] | None, bitsandbytes_installed: bool) -> None:
    """Refuse a *precision* that the device cannot run; *capability* is (major, minor) of a CUDA device, None of others.

    Raises DeviceError.
    """
    if precision in ("int8", "int4") and not bitsandbytes_installed:
        raise DeviceError(
            f"--precision {precision} needs bitsandbytes, which is not installed: 'pip install bitsandbytes', "
            "or choose bf16, fp16 or fp32."
        )
    if capability is None:
        return
    least = {"bf16": (8, 0), "int8": (7, 5), "int4": (7, 0)}.get(precision, (0, 0))
    if capability < least:
        raise DeviceError(
            f"--precision {precision} needs compute capability {least[0]}.{least[1]}, this GPU has "
            f"{capability[0]}.{capability[1]}: choose {'fp16 or fp32' if precision == 'bf16' else 'fp16'}."
        )


def weight_bytes(linear_weights: int, other_parameters: int, precision: str, double_quant: bool) -> int:
    """Return the bytes of a model's parameters.

    *linear_weights* counts the weights of the layers that int8 and int4 quantize (all linear layers but the output
    layer), *other_parameters* the rest. int8 adds an fp32 scale per row (left out here: under 0.1 %); NF4 adds an
    fp32 absmax per 64 weights, or with double quantization 1 byte and 1/256 fp32.
    """
    other = other_parameters * DTYPES[precision].itemsize
    if precision == "int8":
        return other + linear_weights
    if precision == "int4":
        absmax = 1 + 4 / 256 if double_quant else 4
        return other + int(linear_weights * (0.5 + absmax / NF4_BLOCK))
    return other + linear_weights * DTYPES[precision].itemsize


@dataclass(frozen=True)
class Workload:
    """What is asked of a model: *batch* sequences of *prompt_tokens* computed and *new_tokens* generated tokens."""

    precision: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    double_quant: bool = False


def required_bytes(config: Any, workload: Workload) -> int:
    """Return the bytes that a run needs: weights + KV cache + the largest activations + a CUDA context.

    KV cache = 2 x layers x KV heads x head size x batch x tokens; the activations of a prefill are taken as the MLP's
    two inner tensors and the hidden state, in the model's dtype. Raises UsageError for a model that cannot be built.
    """
    linear, other = count_parameters(config)
    shape = shape_of(config)
    dtype_bytes = DTYPES[workload.precision].itemsize
    tokens = workload.prompt_tokens + workload.new_tokens
    cache = 2 * shape.layers * shape.kv_heads * shape.head_size * workload.batch * tokens * dtype_bytes
    activations = workload.batch * workload.prompt_tokens * (2 * shape.inner + 4 * shape.hidden) * dtype_bytes
    return weight_bytes(linear, other, workload.precision, workload.double_quant) + cache + activations + CONTEXT_BYTES


# By configuration: a study asks for every run of a model.
_counted: dict[str, tuple[int, int]] = {}


def count_parameters(config: Any) -> tuple[int, int]:
    """Return how many parameters sit in layers that get quantized, and how many elsewhere (tied ones once).

    Raises UsageError for a configuration that no model can be made of.
    """
    from transformers import AutoModelForCausalLM

    key = config.to_json_string()
    if key in _counted:
        return _counted[key]
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise UsageError(
            f"no model can be made of this configuration ({first_line(error)}): check config.json."
        ) from error
    linear = sum(module.weight.numel() for _, module in quantizable(model))
    _counted[key] = linear, sum(p.numel() for p in model.parameters()) - linear
    return _counted[key]


def quantizable(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers that bitsandbytes quantizes: all but the output layer, as Transformers does."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and m is not output]


def check_memory(required: int, free: int, total: int, device: str) -> None:
    """Refuse a run that cannot fit; all in bytes. Raises OutOfMemoryError."""
    if required > free:
        raise OutOfMemoryError(
            f"this run needs about {required / 2**30:.1f} GiB, {device} has {free / 2**30:.1f} GiB free of "
            f"{total / 2**30:.1f} GiB: choose a smaller model, --precision int8 or int4, or a smaller --batch."
        )


def empty_quantized(layer: nn.Linear, precision: str, int8_threshold: float, double_quant: bool) -> nn.Linear:
    """Return bitsandbytes' layer of the shape of *layer*, on the meta device, without weights."""
    import bitsandbytes as bnb

    shape = {"bias": layer.bias is not None, "device": "meta"}
    if precision == "int8":
        return bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_fp16_weights=False, threshold=int8_threshold, **shape
        )
    return bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        compute_dtype=DTYPES[precision],
        compress_statistics=double_quant,
        quant_type="nf4",
        **shape,
    )


def quantize_into(layer: nn.Module, weight: torch.Tensor, double_quant: bool) -> None:
    """Quantize *weight* on its own device into the bitsandbytes *layer*, as loading a checkpoint would."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
        return
    assert isinstance(layer, bnb.nn.Linear4bit)
    values, state = bnb.functional.quantize_4bit(
        weight, blocksize=NF4_BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        values,
        requires_grad=False,
        quant_state=state,
        blocksize=NF4_BLOCK,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state  # type: ignore[assignment]
