"""Optional repacking: a warp's loads of 16 rows and one chunk side by side, so that a kilobyte is read in one piece.

The bytes stay as many. Rows are cut into tiles of 16, and K into chunks of 64 (int8) or 128 (four bits); lane 4 g +
t of a warp finds its 16 bytes of row g, then those of row g + 8.
"""

from __future__ import annotations

import torch


def can_pack(format: str, n: int, k: int) -> bool:
    """Whether an [n, k] matrix of *format* divides into tiles."""
    return n % 16 == 0 and k % (64 if format == "int8" else 128) == 0


def packed_int8(codes: torch.Tensor) -> torch.Tensor:
    """Return int8 codes [N, K] as tiles [N / 16, K / 64, 2 halves, 8 rows, 4 lanes, 16]."""
    n, k = codes.shape
    return codes.view(n // 16, 2, 8, k // 64, 4, 16).permute(0, 3, 1, 2, 4, 5).contiguous()


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
    return tiles.view(n // 16, k // 64, 2, 8, 4, 16).permute(0, 2, 3, 1, 4, 5).reshape(n, k)


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
