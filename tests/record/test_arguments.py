"""Arguments that a replay keeps: the copies share, overlap, stride and align as the run's own tensors do."""

from __future__ import annotations

import pytest
import torch

from llmkern.record.arguments import copies_of


def _copies(*tensors: torch.Tensor) -> list[torch.Tensor]:
    found = copies_of(tensors, lambda tensor: False)
    for copy, tensor in zip(found, tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert (copy.shape, copy.stride(), copy.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    return found


def test_one_tensor_twice_stays_one() -> None:
    """``x + x`` reads its bytes once; of two copies a kernel would read twice as many (H100: +24 % joules)."""
    x = torch.randn(1000)
    first, second = _copies(x, x)
    assert first.data_ptr() == second.data_ptr()


def test_views_keep_their_places_and_strides() -> None:
    x = torch.randn(4, 64)
    left, right, whole = _copies(x[:, :32], x[:, 32:], x)
    assert right.data_ptr() - left.data_ptr() == 32 * 4
    whole[0, 32] = 7.0
    assert right[0, 0] == 7.0


def test_a_view_with_another_type_shares_the_bytes() -> None:
    x = torch.randn(64)
    _, bits = _copies(x, x.view(torch.int32)[3:])
    assert bits.storage_offset() == 3


@pytest.mark.parametrize("offset", [1, 2, 8, 300])
def test_alignment_is_kept(offset: int) -> None:
    """It decides whether a kernel may load 16 bytes at once."""
    x = torch.randn(1024)[offset:]
    (copy,) = _copies(x)
    assert (copy.data_ptr() - copy.untyped_storage().data_ptr()) % 512 == offset * 4 % 512


def test_an_expanded_tensor_stays_expanded() -> None:
    (copy,) = _copies(torch.randn(1, 8).expand(512, 8))
    assert copy.untyped_storage().nbytes() < 1024


def test_a_small_view_does_not_take_its_whole_storage() -> None:
    x = torch.randn(1 << 16)
    copies = copies_of([x[::4096], x[1:9]], lambda tensor: False)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, (x[::4096], x[1:9]), strict=True))
    assert all(copy.untyped_storage().nbytes() < 4096 for copy in copies)


def test_what_is_kept_and_what_is_no_tensor_come_back_themselves() -> None:
    weight, x = torch.randn(3), torch.randn(3)
    kept, copy, number = copies_of([weight, x, 2.5], lambda tensor: tensor is weight)
    assert kept is weight
    assert copy is not x
    assert number == 2.5


def test_tensors_without_strides_or_elements_are_copied_by_themselves() -> None:
    sparse = torch.eye(3).to_sparse()
    first, second = copies_of([sparse, torch.empty(0, 4)], lambda tensor: False)
    assert torch.equal(first.to_dense(), torch.eye(3))
    assert second.shape == (0, 4)


def test_works_on_what_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(8, 8)
        copy, _ = copies_of([x.t(), x], lambda tensor: False)
        assert torch.equal(copy, x.t())
