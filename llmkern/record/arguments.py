"""Copies of an operator's arguments that a kernel cannot tell from the arguments themselves.

Where two arguments are one tensor (or views of one storage) a kernel moves its bytes once; strides and alignment choose
the kernel. So copies share, overlap, stride and align as what they were made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# A view may lie in something far larger (one layer's part of a cache): then it is copied by itself.
_MOST_SPARSE = 8
# Allocators align to this, and no kernel asks for more.
_ALIGNED = 512


def copies_of(leaves: Sequence[Any], is_kept: Callable[[torch.Tensor], bool]) -> list[Any]:
    """Return *leaves* with a copy of each tensor that *is_kept* does not hold true of.

    :raises RuntimeError: if the device has no memory for them.
    """
    groups: dict[int, list[int]] = {}
    result = list(leaves)
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) or is_kept(leaf):
            continue
        if _is_plain(leaf):
            groups.setdefault(leaf.untyped_storage().data_ptr(), []).append(index)
        else:
            result[index] = leaf.clone()
    for indices in groups.values():
        for index, copy in zip(indices, _together([leaves[i] for i in indices]), strict=True):
            result[index] = copy
    return result


def storage_of(tensor: torch.Tensor) -> int | None:
    """Return the address of the storage that *tensor* is a view of; None for one that has none (a sparse one)."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else None


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.numel() > 0


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte of *tensor* in its storage and the one behind its last."""
    first = int(tensor.storage_offset()) * tensor.element_size()
    reach = sum((size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * tensor.element_size()


def _together(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies of *tensors*, views of one storage, as views of one new storage."""
    spans = [_span(tensor) for tensor in tensors]
    begin = min(first for first, _ in spans) // _ALIGNED * _ALIGNED
    end = max(last for _, last in spans)
    dense_bytes = sum({span: tensor.nbytes for span, tensor in zip(spans, tensors, strict=True)}.values())
    if end - begin > _MOST_SPARSE * max(dense_bytes, _ALIGNED):
        return [tensor.clone() for tensor in tensors]
    length = -(-(end - begin) // _ALIGNED) * _ALIGNED
    # The last bytes of a storage are copied up to its end only.
    there = min(length, tensors[0].untyped_storage().nbytes() - begin)
    source = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    source.set_(tensors[0].untyped_storage(), begin, (there,), (1,))
    target = source.new_empty(length)
    target[:there].copy_(source)
    return [
        target.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), (first - begin) // tensor.element_size())
        for tensor, (first, _) in zip(tensors, spans, strict=True)
    ]
