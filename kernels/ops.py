"""torch.library operators of the kernels: ``torch.ops.llmkern.int8_linear``, ``.nf4_linear`` and ``.int4_linear``.

They have fake implementations, so torch.compile traces through them, and synchronize nothing, so CUDA graphs
capture them.
"""

from __future__ import annotations

import torch

from llmkern.kernels.formats import Int4Weight, Int8Weight, Nf4Weight
from llmkern.kernels.linear import linear

_library = torch.library.Library("llmkern", "DEF")
_library.define(
    "int8_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias=None, *, bool packed=False, bool pdl=False) -> "
    "Tensor"
)
_library.define(
    "int4_linear(Tensor x, Tensor codes, Tensor scales, int out_features, int group, Tensor? bias=None, *, "
    "bool packed=False, bool pdl=False) -> Tensor"
)
_library.define(
    "nf4_linear(Tensor x, Tensor codes, Tensor code, Tensor absmax, int out_features, int blocksize, Tensor? "
    "bias=None, *, "
    "Tensor? nested_bytes=None, Tensor? nested_table=None, Tensor? nested_offset=None, bool packed=False, "
    "bool pdl=False) -> Tensor"
)


def _int8(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    packed: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    return linear(Int8Weight(scales.shape[0], x.shape[-1], packed, codes, scales), x, bias, pdl=pdl)


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
) -> torch.Tensor:
    return linear(Int4Weight(out_features, x.shape[-1], packed, codes, scales, group), x, bias, pdl=pdl)


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
) -> torch.Tensor:
    nested = (nested_bytes, nested_table, nested_offset)
    weight = Nf4Weight(out_features, x.shape[-1], packed, codes, code, absmax, blocksize, *nested)
    return linear(weight, x, bias, pdl=pdl)


for _name, _function in (("int8_linear", _int8), ("int4_linear", _int4), ("nf4_linear", _nf4)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("llmkern::int8_linear", lib=_library)
def _int8_fake(x, codes, scales, bias=None, *, packed=False, pdl=False):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


@torch.library.register_fake("llmkern::int4_linear", lib=_library)
def _int4_fake(x, codes, scales, out_features, group, bias=None, **_options):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("llmkern::nf4_linear", lib=_library)
def _nf4_fake(x, codes, code, absmax, out_features, blocksize, bias=None, **_options):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))
