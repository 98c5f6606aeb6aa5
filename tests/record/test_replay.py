"""Replays run an operator on what it was given, again and again: on the same values each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from llmkern.record.operators import signature_of
from llmkern.record.passes.replay import Case, Keeper

aten: Any = torch.ops.aten


@pytest.mark.parametrize(
    ("function", "arguments", "drifts"),
    [
        (aten.add_.Tensor, (torch.ones(4), torch.ones(4)), True),
        (aten.mul_.Tensor, (torch.full((4,), 3.0), torch.full((4,), 2.0)), True),
        (aten.cumsum_.default, (torch.arange(1.0, 5.0), 0), True),
        (aten.index_add_.default, (torch.zeros(4), 0, torch.tensor([1]), torch.ones(1)), True),
        # Writing the same values again changes nothing.
        (aten.copy_.default, (torch.zeros(4), torch.arange(4.0)), False),
        (aten.fill_.Scalar, (torch.zeros(4), 3.0), False),
        (aten.relu_.default, (torch.randn(4),), False),
        (aten.index_put_.default, (torch.zeros(4), [torch.tensor([1])], torch.ones(1)), False),
        (aten.mm.out, (torch.ones(2, 2), torch.ones(2, 2)), False),
        # Neither does what is not written to at all; what is not a number equals itself.
        (aten.add.Tensor, (torch.ones(4), torch.ones(4)), False),
        (aten.copy_.default, (torch.zeros(4), torch.full((4,), float("nan"))), False),
    ],
)
def test_an_operator_that_changes_what_it_is_given_is_known(function: Any, arguments: Any, drifts: bool) -> None:
    """C5: operators in place were replayed on values that drifted away to infinity."""
    more = {"out": torch.zeros(2, 2)} if function is aten.mm.out else {}
    assert Case("x", function, [(arguments, more)]).drifts() is drifts


def test_a_keeper_keeps_what_was_given_before_it_is_changed() -> None:
    x, y = torch.ones(4), torch.full((4,), 2.0)
    name = signature_of(aten.add_.Tensor, tree_leaves(((x, y), {})))
    keeper = Keeper(torch.nn.Module(), {name})
    with keeper.keeping():
        x.add_(y)
    (case,) = keeper.cases.values()
    assert case.calls[0][0][0].tolist() == [1.0] * 4
    assert case.drifts()
