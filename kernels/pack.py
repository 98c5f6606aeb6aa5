"""Optional repacking: a warp's loads of 16 rows and one chunk side by side, so that a kilobyte is read in one piece.

The codes take as many bytes as before. Rows are cut into tiles of 16, and K into chunks of 64 (int8) or 128 (four
bits); lane 4 g + t of a warp finds its 16 bytes of row g, then those of row g + 8.
"""

from __future__ import annotations

import torch

# Whose magnitude and whose sign the bytes of a word of four int8 codes hold.
_MAGNITUDES, _SIGNS = (0, 3, 1, 2), (2, 0, 3, 1)
_SIGN = -128


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


def _crossed(
    magnitudes: torch.Tensor, signs: torch.Tensor, of_magnitudes: tuple[int, ...], of_signs: tuple[int, ...]
) -> torch.Tensor:
    """Return words of four bytes whose magnitudes and signs are taken in the orders given."""
    words = magnitudes.view(-1, 4)[:, of_magnitudes] | signs.view(-1, 4)[:, of_signs]
    return words.view(magnitudes.shape)


def can_pack(format: str, n: int, k: int) -> bool:
    """Whether an [n, k] matrix of *format* divides into tiles."""
    return n % 16 == 0 and k % (64 if format == "int8" else 128) == 0


def packed_int8(codes: torch.Tensor) -> torch.Tensor:
    """Return int8 codes [N, K], none of them -128, as tiles [N / 16, K / 64, 2 halves, 8 rows, 4 lanes, 16].

    The four codes of a word are signs s and magnitudes m (7 bits), placed so that (word & 0x807f807f) has code 0 in its
    lower and 1 in its upper half, sign first, and the word turned by a byte 2 and 3: s2 m0, s0 m3, s3 m1, s1 m2.
    """
    n, k = codes.shape
    tiles = codes.view(n // 16, 2, 8, k // 64, 4, 16).permute(0, 3, 1, 2, 4, 5).contiguous()
    return _crossed(tiles.abs(), tiles & _SIGN, _MAGNITUDES, _SIGNS)


def packed_codes(codes: torch.Tensor, n: int, k: int, interleave: bool) -> torch.Tensor:
    """Return 4-bit codes (uint8, two to a byte, rows of k) as tiles [N / 16, K / 128, 2 halves, 8 rows, 4 lanes, 16].

    A lane's first eight bytes are 16 codes of the chunk's first 64, its last eight of the others. *interleave* (int4)
    orders the nibbles of a word so that codes 2 i and 2 i + 1 lie 16 bits apart.
    """
    tiles = codes.view(n // 16, 2, 8, k // 128, 2, 4, 8).permute(0, 3, 1, 2, 5, 4, 6).contiguous()
    if not interleave:
        return tiles
    bytes_of_word = tiles.view(-1, 4)
    even, odd = bytes_of_word & 15, bytes_of_word >> 4
    mixed = torch.cat(
        [even[:, 0::2] | even[:, 1::2] << 4, odd[:, 0::2] | odd[:, 1::2] << 4],
        dim=1,
    )
    return mixed.view(tiles.shape)


def packed_scales(scales: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return scales [N, K / group] as [N / 16, K / 128, 8 rows, 2 halves, 2 groups of 64]."""
    scales = scales.view(n, -1)
    by_64 = scales.repeat_interleave(k // 64 // scales.shape[1], dim=1)
    return by_64.view(n // 16, 2, 8, k // 128, 2).permute(0, 3, 2, 1, 4).contiguous()


def unpacked_int8(tiles: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Return what packed_int8 made its tiles of, [N, K]."""
    plain = _crossed(tiles & 127, tiles & _SIGN, _inverse(_MAGNITUDES), _inverse(_SIGNS))
    # A magnitude beside its own sign: -m where that is set. (0 has none.)
    signed = torch.where(plain < 0, -(plain & 127), plain)
    return signed.view(n // 16, k // 64, 2, 8, 4, 16).permute(0, 2, 3, 1, 4, 5).reshape(n, k)


def unpacked_codes(tiles: torch.Tensor, n: int, k: int, interleaved: bool) -> torch.Tensor:
    """Return what packed_codes made its tiles of, [N, K / 2]."""
    if interleaved:
        mixed = tiles.view(-1, 4)
        low, high = mixed[:, :2], mixed[:, 2:]
        even = torch.stack((low & 15, low >> 4), dim=2).view(-1, 4)
        odd = torch.stack((high & 15, high >> 4), dim=2).view(-1, 4)
        tiles = even | odd << 4
    return tiles.view(n // 16, k // 128, 2, 8, 4, 2, 8).permute(0, 2, 3, 1, 5, 4, 6).reshape(n, k // 2)


def unpacked_scales(packed: torch.Tensor, n: int, k: int, group: int) -> torch.Tensor:
    """Return what packed_scales was given, [N, K / group]."""
    by_64 = packed.view(n // 16, k // 128, 8, 2, 2).permute(0, 3, 2, 1, 4).reshape(n, k // 64)
    return by_64[:, :: group // 64].contiguous()


# What the scales of packed NF4 are stored in, by their number in a build.
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def shortest(scales: torch.Tensor) -> torch.Tensor:
    """Return fp32 *scales* in 16 bits where these say the same, else as they are. Waits for the device."""
    for dtype in SCALES[1:]:
        short = scales.to(dtype)
        if torch.equal(short.float(), scales):
            return short
    return scales
