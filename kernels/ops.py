"""torch.library operators of the kernels: ``torch.ops.llmkern.int8_linear``, ``.nf4_linear`` and ``.int4_linear``.

They have fake implementations, so torch.compile traces through them, and synchronize nothing, so CUDA graphs
capture them.
"""

from __future__ import annotations

from typing import Any

import torch

from llmkern.kernels.decode_layer import cuda, reference
from llmkern.kernels.formats import Bf16Weight, Int4Weight, Int8Weight, Nf4Weight
from llmkern.kernels.linear import linear
from llmkern.kernels.registry import have_cuda_kernels

_library = torch.library.Library("llmkern", "DEF")
_library.define(
    "int8_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias=None, *, bool packed=False, bool pdl=False, "
    "Tensor? residual=None, bool pairs=False) -> Tensor"
)
_library.define(
    "int4_linear(Tensor x, Tensor codes, Tensor scales, int out_features, int group, Tensor? bias=None, *, "
    "bool packed=False, bool pdl=False, Tensor? residual=None, bool pairs=False) -> Tensor"
)
_library.define(
    "nf4_linear(Tensor x, Tensor codes, Tensor code, Tensor absmax, int out_features, int blocksize, Tensor? "
    "bias=None, *, "
    "Tensor? nested_bytes=None, Tensor? nested_table=None, Tensor? nested_offset=None, bool packed=False, "
    "bool pdl=False, Tensor? residual=None, bool pairs=False) -> Tensor"
)
_library.define(
    "bf16_linear(Tensor x, Tensor rows, Tensor? bias=None, *, bool pdl=False, Tensor? residual=None, bool pairs=False) "
    "-> Tensor"
)
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define(
    "decode_attention(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor start, Tensor turn, "
    "float scaling) -> Tensor"
)
_library.define(
    "next_token(Tensor logits, Tensor(a!) hidden, Tensor(b!) position, Tensor(c!) tokens, Tensor(d!) best, "
    "Tensor embedding) -> ()"
)
_library.define(
    "next_token_of_shortlist(Tensor x, Tensor rough, Tensor scales, Tensor rows, Tensor(a!) hidden, "
    "Tensor(b!) position, Tensor(c!) tokens, Tensor(d!) best, Tensor(e!) low, Tensor(f!) sums, Tensor embedding) -> ()"
)


def _int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    packed: bool = False,
    pdl: bool = False,
    residual: torch.Tensor | None = None,
    pairs: bool = False,
) -> torch.Tensor:
    return linear(
        Int8Weight(scales.shape[0], x.shape[-1], packed, codes, scales),
        x,
        bias,
        pdl=pdl,
        residual=residual,
        pairs=pairs,
    )


def _int4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    out_features: int,
    group: int,
    bias: torch.Tensor | None = None,
    *,
    packed: bool = False,
    pdl: bool = False,
    residual: torch.Tensor | None = None,
    pairs: bool = False,
) -> torch.Tensor:
    return linear(
        Int4Weight(out_features, x.shape[-1], packed, codes, scales, group),
        x,
        bias,
        pdl=pdl,
        residual=residual,
        pairs=pairs,
    )


def _nf4(
    x: torch.Tensor,
    codes: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    out_features: int,
    blocksize: int,
    bias: torch.Tensor | None = None,
    *,
    nested_bytes: torch.Tensor | None = None,
    nested_table: torch.Tensor | None = None,
    nested_offset: torch.Tensor | None = None,
    packed: bool = False,
    pdl: bool = False,
    residual: torch.Tensor | None = None,
    pairs: bool = False,
) -> torch.Tensor:
    nested = (nested_bytes, nested_table, nested_offset)
    weight = Nf4Weight(out_features, x.shape[-1], packed, codes, code, absmax, blocksize, *nested)
    return linear(weight, x, bias, pdl=pdl, residual=residual, pairs=pairs)


def _bf16(
    x: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    residual: torch.Tensor | None = None,
    pairs: bool = False,
) -> torch.Tensor:
    return linear(Bf16Weight.of(rows), x, bias, pdl=pdl, residual=residual, pairs=pairs)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.device.type == "cuda" and have_cuda_kernels()


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if _on_gpu(x) and x.shape[1] % 8 == 0 and x.is_contiguous():
        return cuda.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def _decode_attention(qkv: torch.Tensor, *context: Any) -> torch.Tensor:
    return (cuda if _on_gpu(qkv) else reference).attention(qkv, *context)


def _next_token(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    position: torch.Tensor,
    tokens: torch.Tensor,
    best: torch.Tensor,
    embedding: torch.Tensor,
) -> None:
    if _on_gpu(logits):
        cuda.next_token(logits, hidden, position, tokens, best, embedding)
    else:
        reference.next_token(logits, hidden, position, tokens, embedding)


def _next_token_of_shortlist(x: torch.Tensor, *rest: torch.Tensor) -> None:
    if _on_gpu(x):
        cuda.next_token_of_shortlist(x, *rest)
    else:
        # All but best, low and sums: what kernels tell one another.
        given = (*rest[:6], rest[-1])
        reference.next_token_of_shortlist(x, *given)


for _name, _function in (
    ("int8_linear", _int8),
    ("int4_linear", _int4),
    ("nf4_linear", _nf4),
    ("bf16_linear", _bf16),
    ("rms_norm", _rms_norm),
    ("decode_attention", _decode_attention),
    ("next_token", _next_token),
    ("next_token_of_shortlist", _next_token_of_shortlist),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("llmkern::int8_linear", lib=_library)
def _int8_fake(x, codes, scales, bias=None, *, pairs=False, **_options):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], scales.shape[0] // (1 + pairs)))


@torch.library.register_fake("llmkern::int4_linear", lib=_library)
def _int4_fake(x, codes, scales, out_features, group, bias=None, **options):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features // (1 + options.get("pairs", False))))


@torch.library.register_fake("llmkern::nf4_linear", lib=_library)
def _nf4_fake(x, codes, code, absmax, out_features, blocksize, bias=None, **options):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features // (1 + options.get("pairs", False))))


@torch.library.register_fake("llmkern::bf16_linear", lib=_library)
def _bf16_fake(x, rows, bias=None, *, pairs=False, **_options):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], rows.shape[0] // (1 + pairs)))


@torch.library.register_fake("llmkern::rms_norm", lib=_library)
def _rms_norm_fake(x, weight, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.register_fake("llmkern::decode_attention", lib=_library)
def _attention_fake(qkv, keys, values, position, start, turn, scaling):  # type: ignore[no-untyped-def]
    heads, size = keys.shape[1], keys.shape[3]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * heads * size))


@torch.library.register_fake("llmkern::next_token", lib=_library)
def _next_token_fake(logits, hidden, position, tokens, best, embedding):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("llmkern::next_token_of_shortlist", lib=_library)
def _next_token_of_shortlist_fake(*_arguments):  # type: ignore[no-untyped-def]
    return None
