"""Quantized weight matrices as they are stored, what they cost in bytes, and their values in fp32.

W is [N, K]: N output rows of K weights. The reference of every kernel is ``dequantized()``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch

from llmkern.kernels import pack

# The 16 values of NF4: quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NESTED_BLOCK = 256


@dataclass(frozen=True)
class Weight:
    """What all formats have: *n* rows of *k* weights, *packed* into tiles (pack.py) or not."""

    n: int
    k: int
    packed: bool

    @property
    def format(self) -> str:
        """The format's name: int8, nf4, int4 or bf16 (the activations' own type)."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Return this weight with *move* applied to each stored tensor (to another device, say, or a copy)."""
        changed: dict[str, Any] = {name: move(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes alone: what "share of the bandwidth by weight bytes" counts."""
        return self.n * self.k if self.format == "int8" else -(-self.n * self.k // 2)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales: what a kernel has to read."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def dequantized(self) -> torch.Tensor:
        """Return the weights as fp32 [N, K]."""
        raise NotImplementedError

    def in_rows(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors that have a row for each of W's, not packed; ValueError where scales cross rows."""
        raise NotImplementedError

    def with_rows(self, rows: dict[str, torch.Tensor]) -> Self:
        """Return this weight with *rows*, of any number, in the place of those of in_rows()."""
        raise NotImplementedError

    def to_packed(self) -> Self:
        """Return this weight in tiles. Raises ValueError where it does not divide into them."""
        raise NotImplementedError

    def struct(self) -> ctypes.Structure:
        """Return the device pointers as the CUDA kernels take them."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return what a build must know of the weights."""
        return {"packed": self.packed}

    def can_pack(self) -> bool:
        """Whether this weight divides into tiles, each half of a chunk with one scale."""
        whole = pack.can_pack(self.format, self.n, self.k)
        return whole and not self.packed and self.group_size % 64 == 0 and self.k % max(1, self.group_size) == 0

    @property
    def group_size(self) -> int:
        """Weights that share a scale along K; 0 where a whole row does."""
        return 0

    def _check_pack(self) -> None:
        if not self.can_pack():
            groups = f" in groups of {self.group_size}" if self.group_size else ""
            already = " is packed already" if self.packed else ""
            raise ValueError(
                f"{self.format} [{self.n}, {self.k}]{groups}{already} cannot be packed: N must divide by 16, K by "
                f"{64 if self.format == 'int8' else 128} and by the group, which is 64 or more; use it as it is."
            )


def stacked(weights: Sequence[Weight], order: torch.Tensor | None = None) -> Weight:
    """Return *weights* [Nᵢ, K] of one format as one of all rows, in *order* if given; ValueError if they differ."""
    first = weights[0]
    if any(w.format != first.format or w.k != first.k or w.packed or w.group_size != first.group_size for w in weights):
        raise ValueError("only unpacked weights of one format, K and group can be stacked.")
    parts = [weight.in_rows() for weight in weights]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if order is not None:
        rows = {name: tensor[order] for name, tensor in rows.items()}
    return first.with_rows(rows)


def pairs_order(n: int, device: torch.device) -> torch.Tensor:
    """Return the order of 2 * *n* rows, gates before what they open, in which eight of each stand side by side."""
    index = torch.arange(n, device=device).view(-1, 8)
    return torch.cat([index, index + n], 1).view(-1)


class _Int8(ctypes.Structure):
    _fields_ = (("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p))


class _Nf4(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("codes", "code", "absmax", "bytes", "table", "offset"))


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Int8Weight(Weight):
    """LLM.int8 rows: W = codes * scales / 127; codes int8 [N, K] (bitsandbytes' CB), scales fp32 [N] (its SCB)."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def format(self) -> str:
        return "int8"

    @classmethod
    def of(cls, codes: torch.Tensor, scales: torch.Tensor) -> Int8Weight:
        return cls(codes.shape[0], codes.shape[1], False, codes, scales)

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> Int8Weight:
        """Return *weight* [N, K] rounded to int8 by the largest magnitude of each row."""
        weight = weight.float()
        scales = weight.abs().amax(dim=1)
        codes = torch.round(weight * (127 / scales.clamp(min=1e-30))[:, None]).to(torch.int8)
        return cls.of(codes, scales)

    def dequantized(self) -> torch.Tensor:
        return unpacked(self).codes.float() * (self.scales.float() / 127)[:, None]

    def in_rows(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    def with_rows(self, rows: dict[str, torch.Tensor]) -> Int8Weight:
        return Int8Weight.of(rows["codes"], rows["scales"])

    def can_pack(self) -> bool:
        """Whether this weight divides into tiles and has no -128, which has no magnitude of seven bits.

        bitsandbytes makes none. Waits for the device.
        """
        return super().can_pack() and int(self.codes.min()) > -128

    def to_packed(self) -> Int8Weight:
        if super().can_pack() and not self.can_pack():
            raise ValueError("int8 codes of -128 have no magnitude of seven bits and cannot be packed: use them as is.")
        self._check_pack()
        return replace(self, codes=pack.packed_int8(self.codes), packed=True)

    def struct(self) -> ctypes.Structure:
        return _Int8(_pointer(self.codes), _pointer(self.scales))


@dataclass(frozen=True)
class Int4Weight(Weight):
    """int4 in groups along K: W = (code - 8) * scale; codes uint8 [N, K / 2], even k in the low nibble.

    scales [N, K / group] in the type of the activations; group is 64 or 128 (any power of two from 64).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group: int

    @property
    def group_size(self) -> int:
        return self.group

    @property
    def format(self) -> str:
        return "int4"

    @classmethod
    def of(cls, codes: torch.Tensor, scales: torch.Tensor, group: int) -> Int4Weight:
        return cls(codes.shape[0], 2 * codes.shape[1], False, codes, scales, group)

    @classmethod
    def quantize(cls, weight: torch.Tensor, group: int, dtype: torch.dtype = torch.bfloat16) -> Int4Weight:
        """Return *weight* [N, K] rounded to int4 by the largest magnitude of each group. Raises ValueError if K %
        group.
        """
        n, k = weight.shape
        if k % group:
            raise ValueError(f"K = {k} does not divide into groups of {group}: choose a group that divides K.")
        grouped = weight.float().view(n, k // group, group)
        scales = (grouped.abs().amax(dim=2) / 7).to(dtype)
        codes = torch.round(grouped / scales.float().clamp(min=1e-30)[..., None]).clamp(-8, 7).to(torch.int32) + 8
        codes = codes.view(n, k // 2, 2)
        return cls.of((codes[..., 0] | codes[..., 1] << 4).to(torch.uint8), scales, group)

    def dequantized(self) -> torch.Tensor:
        plain = unpacked(self)
        codes = torch.stack((plain.codes & 15, plain.codes >> 4), dim=-1).view(self.n, self.k).float() - 8
        return (codes.view(self.n, -1, self.group) * plain.scales.float()[..., None]).view(self.n, self.k)

    def in_rows(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    def with_rows(self, rows: dict[str, torch.Tensor]) -> Int4Weight:
        return Int4Weight.of(rows["codes"], rows["scales"], self.group)

    def to_packed(self) -> Int4Weight:
        self._check_pack()
        codes = pack.packed_codes(self.codes, self.n, self.k, interleave=True)
        return replace(self, codes=codes, scales=pack.packed_scales(self.scales, self.n, self.k), packed=True)

    def struct(self) -> ctypes.Structure:
        return _Int8(_pointer(self.codes), _pointer(self.scales))

    def facts(self) -> dict[str, Any]:
        return {"packed": self.packed, "shift": int(math.log2(self.group))}


@dataclass(frozen=True)
class Nf4Weight(Weight):
    """NF4 as bitsandbytes stores it: W = code[nibble] * absmax[block], the matrix flat in blocks of *blocksize*.

    codes uint8 [N * K / 2], even k in the high nibble; code fp32 [16]; absmax fp32 [N * K / blocksize], packed in 16
    bits where these say the same (each is the largest of weights that had 16 bits before they were quantized). With
    double quantization *nested_bytes* uint8 is one per block and absmax = nested_table[byte] * absmax[block / 256] +
    nested_offset, where absmax has one value for 256 blocks.
    """

    codes: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    blocksize: int
    nested_bytes: torch.Tensor | None = None
    nested_table: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    @property
    def group_size(self) -> int:
        return self.blocksize

    @property
    def format(self) -> str:
        return "nf4"

    @classmethod
    def quantize(cls, weight: torch.Tensor, blocksize: int = 64, nested: bool = False) -> Nf4Weight:
        """Return *weight* [N, K] rounded to NF4; *nested* stores the block scales in 8 bits (a linear table)."""
        n, k = weight.shape
        if n * k % blocksize:
            raise ValueError(f"{n} x {k} weights do not divide into blocks of {blocksize}: choose another block size.")
        blocks = weight.float().view(-1, blocksize)
        absmax = blocks.abs().amax(dim=1)
        code = torch.tensor(NF4_VALUES, device=weight.device)
        nearest = torch.bucketize(blocks / absmax.clamp(min=1e-30)[:, None], (code[1:] + code[:-1]) / 2)
        nibbles = nearest.to(torch.uint8).view(-1, 2)
        codes = nibbles[:, 0] << 4 | nibbles[:, 1]
        if not nested:
            return cls(n, k, False, codes, code, absmax, blocksize)
        offset = absmax.mean()
        padded = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        outer = padded.abs().amax(dim=1)
        table = torch.linspace(-1, 1, 256, device=weight.device)
        levels = torch.round((padded / outer.clamp(min=1e-30)[:, None] + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return cls(n, k, False, codes, code, outer, blocksize, levels.view(-1)[: absmax.numel()], table, offset)

    @property
    def nested(self) -> bool:
        return self.nested_bytes is not None

    def block_scales(self) -> torch.Tensor:
        """Return the scale of each block as fp32 [N * K / blocksize]."""
        if self.nested_bytes is None or self.nested_table is None or self.nested_offset is None:
            return self.absmax.float()
        outer = self.absmax.repeat_interleave(NESTED_BLOCK)[: self.nested_bytes.numel()]
        return self.nested_table[self.nested_bytes.long()] * outer + self.nested_offset

    def dequantized(self) -> torch.Tensor:
        plain = unpacked(self)
        codes = plain.codes.view(-1)
        values = self.code[torch.stack((codes >> 4, codes & 15), dim=-1).view(-1).long()]
        return (values.view(-1, self.blocksize) * plain.block_scales()[:, None]).view(self.n, self.k)

    def in_rows(self) -> dict[str, torch.Tensor]:
        if self.k % self.blocksize:
            raise ValueError(
                f"NF4 blocks of {self.blocksize} cross rows of {self.k} weights: rows cannot be told apart."
            )
        return {"codes": self.codes.view(self.n, -1), "absmax": self.block_scales().view(self.n, -1)}

    def with_rows(self, rows: dict[str, torch.Tensor]) -> Nf4Weight:
        codes, absmax = rows["codes"], rows["absmax"]
        return Nf4Weight(len(codes), self.k, False, codes.view(-1), self.code, absmax.view(-1), self.blocksize)

    def to_packed(self) -> Nf4Weight:
        self._check_pack()
        codes = pack.packed_codes(self.codes.view(-1), self.n, self.k, interleave=False)
        scales = pack.packed_scales(pack.shortest(self.block_scales()), self.n, self.k)
        nothing: dict[str, Any] = dict.fromkeys(("nested_bytes", "nested_table", "nested_offset"))
        return replace(self, codes=codes, absmax=scales, packed=True, **nothing)

    def struct(self) -> ctypes.Structure:
        tensors = (self.codes, self.code, self.absmax, self.nested_bytes, self.nested_table, self.nested_offset)
        return _Nf4(*map(_pointer, tensors))

    def facts(self) -> dict[str, Any]:
        scales = pack.SCALES.index(self.absmax.dtype) if self.packed else 0
        shift = int(math.log2(self.blocksize))
        return {"packed": self.packed, "shift": shift, "nested": self.nested, "scales": scales}


@dataclass(frozen=True)
class Bf16Weight(Weight):
    """What is not quantized: rows [N, K] in the type of the activations."""

    rows: torch.Tensor

    @property
    def format(self) -> str:
        return "bf16"

    @property
    def code_bytes(self) -> int:
        return self.n * self.k * self.rows.element_size()

    @classmethod
    def of(cls, rows: torch.Tensor) -> Bf16Weight:
        return cls(rows.shape[0], rows.shape[1], False, rows)

    def dequantized(self) -> torch.Tensor:
        return self.rows.float()

    def in_rows(self) -> dict[str, torch.Tensor]:
        return {"rows": self.rows}

    def with_rows(self, rows: dict[str, torch.Tensor]) -> Bf16Weight:
        return Bf16Weight.of(rows["rows"])

    def can_pack(self) -> bool:
        return False

    def struct(self) -> ctypes.Structure:
        return _Int8(_pointer(self.rows), 0)


def unpacked(weight: Any) -> Any:
    """Return *weight* in rows again. Lossless, but for NF4's double quantization: those scales stay fp32."""
    if not weight.packed:
        return weight
    n, k = weight.n, weight.k
    if weight.format == "int8":
        return replace(weight, codes=pack.unpacked_int8(weight.codes, n, k), packed=False)
    codes = pack.unpacked_codes(weight.codes, n, k, interleaved=weight.format == "int4")
    group = weight.group if weight.format == "int4" else weight.blocksize
    if weight.format == "int4":
        scales = pack.unpacked_scales(weight.scales, n, k, group)
        return replace(weight, codes=codes, scales=scales, packed=False)
    scales = pack.unpacked_scales(weight.absmax, n, k, group)
    return replace(weight, codes=codes.reshape(-1), absmax=scales.reshape(-1).float(), packed=False)


def quantize(format: str, weight: torch.Tensor, group: int = 64, dtype: torch.dtype = torch.bfloat16) -> Weight:
    """Return *weight* [N, K] in *format* (int8, nf4 or int4); *group* is of int4 and NF4, *dtype* of int4's scales."""
    if format == "int8":
        return Int8Weight.quantize(weight)
    if format == "nf4":
        return Nf4Weight.quantize(weight, group)
    return Int4Weight.quantize(weight, group, dtype)
