"""Weights as they are stored: what they mean, that tiles lose nothing, and that bitsandbytes means the same."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from llmkern.kernels import formats, pack
from llmkern.kernels.formats import Int4Weight, Int8Weight, Nf4Weight, Weight, quantize

N, K = 48, 256


def matrix(n: int = N, k: int = K) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)) / k**0.5


def every(w: torch.Tensor) -> list[Weight]:
    nf4 = [Nf4Weight.quantize(w, 64), Nf4Weight.quantize(w, 64, nested=True), Nf4Weight.quantize(w, 128)]
    return [Int8Weight.quantize(w), Int4Weight.quantize(w, 64), Int4Weight.quantize(w, 128), *nf4]


@pytest.mark.parametrize("index", range(6))
def test_quantized_values_are_near_the_matrix_and_tiles_hold_the_same(index: int) -> None:
    w = matrix()
    weight = every(w)[index]
    off = float((weight.dequantized() - w).norm() / w.norm())
    assert off < {"int8": 0.01, "int4": 0.13, "nf4": 0.11}[weight.format]
    packed = weight.to_packed()  # type: ignore[attr-defined]
    assert torch.equal(packed.dequantized(), weight.dequantized())
    assert packed.code_bytes == weight.code_bytes == (N * K if weight.format == "int8" else N * K // 2)


def test_lanes_of_a_tile_find_their_bytes_side_by_side() -> None:
    """Lane 4 g + t: 16 bytes of row g, and 512 bytes on those of row g + 8."""
    codes = torch.arange(32 * 128, dtype=torch.int32).remainder(255).sub(127).to(torch.int8).view(32, 128)
    tiles = pack.packed_int8(codes).view(2, 2, 2, 32, 16)
    assert torch.equal(of_words(tiles[1, 1, 0, 4 * 3 + 2]), codes[16 + 3, 64 + 32 : 64 + 48].int())
    assert torch.equal(of_words(tiles[1, 1, 1, 4 * 3 + 2]), codes[16 + 8 + 3, 64 + 32 : 64 + 48].int())
    assert torch.equal(pack.unpacked_int8(tiles, 32, 128), codes)


def of_words(codes: torch.Tensor) -> torch.Tensor:
    """Return the weights of packed int8 *codes* as the kernel reads them: two of a word, then two of it turned."""
    found = []
    for word in codes.view(torch.uint8).view(-1, 4).tolist():
        value = int.from_bytes(word, "little")
        for turned in (value, (value << 8 | value >> 24) & 0xFFFFFFFF):
            found += [(turned >> at & 127) * (-1 if turned >> at & 0x8000 else 1) for at in (0, 16)]
    return torch.tensor(found, dtype=torch.int32)


def test_a_code_of_minus_128_keeps_its_matrix_in_rows() -> None:
    weight = Int8Weight.quantize(matrix())
    weight.codes[3, 5] = -128
    assert not weight.can_pack()
    with pytest.raises(ValueError, match="codes of -128 have no magnitude of seven bits"):
        weight.to_packed()


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 0)])
def test_scales_of_packed_nf4_take_16_bits_where_nothing_is_lost(dtype: torch.dtype, kept: int) -> None:
    weight = Nf4Weight.quantize(matrix().to(dtype), 64)
    packed = weight.to_packed()
    assert packed.facts()["scales"] == kept
    assert packed.absmax.dtype == (torch.float32, torch.bfloat16, torch.float16)[kept]
    assert torch.equal(packed.dequantized(), weight.dequantized())
    assert formats.unpacked(packed).absmax.dtype == torch.float32


def test_interleaved_nibbles_lie_sixteen_bits_apart() -> None:
    codes = torch.randint(0, 256, (16, 64), dtype=torch.uint8)
    word = pack.packed_codes(codes, 16, 128, interleave=True).view(-1, 4)[0].to(torch.int64)
    value = int(word[0] | word[1] << 8 | word[2] << 16 | word[3] << 24)
    plain = [int(v) for byte in codes[0, :4] for v in (byte & 15, byte >> 4)]
    assert [value >> 4 * i & 15 for i in (0, 4, 1, 5, 2, 6, 3, 7)] == plain


def test_what_does_not_divide_into_tiles_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"int8 \[33, 256\] cannot be packed: N must divide by 16, K by 64"):
        Int8Weight.quantize(matrix(33)).to_packed()
    with pytest.raises(ValueError, match=r"nf4 \[48, 256\] in groups of 32 cannot be packed"):
        Nf4Weight.quantize(matrix(), 32).to_packed()
    with pytest.raises(ValueError, match="K = 100 does not divide into groups of 64"):
        Int4Weight.quantize(matrix(8, 100), 64)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_of_bitsandbytes_means_what_it_means_there(nested: bool) -> None:
    w = matrix()
    codes, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
    expected = bnb.functional.dequantize_4bit(codes, state).float()
    inner = (state.absmax, state.state2.code.float(), state.offset.float()) if nested else (None, None, None)
    absmax = state.state2.absmax if nested else state.absmax
    weight = Nf4Weight(N, K, False, codes.view(-1), state.code.float(), absmax.float(), 64, *inner)
    assert float((weight.dequantized() - expected).norm() / expected.norm()) < 1e-6
    # Our own rounding finds the same nibbles.
    if not nested:
        assert float((Nf4Weight.quantize(w).codes != codes.view(-1)).float().mean()) < 1e-3


def test_quantize_knows_the_formats_by_name() -> None:
    for format in ("int8", "nf4", "int4"):
        assert quantize(format, matrix(), 128).format == format
