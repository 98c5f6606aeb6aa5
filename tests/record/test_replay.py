"""Replays run an operator on what it was given, again and again: on the same values each time."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from llmkern.record.operators import signature_of
from llmkern.record.passes.apart import taken_apart
from llmkern.record.passes.kept import Case, Keeper
from llmkern.runfolder.replays import Launch, Wanted

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


def test_each_layers_activations_are_kept_while_there_is_room() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False) for _ in range(3)])
    inputs = [torch.full((1, 4), float(i)) for i in range(3)]
    name = signature_of(aten.linear.default, tree_leaves(((inputs[0], model[0].weight), {})))
    for most_bytes, kept in ((0.0, [0.0, 0.0, 0.0]), (16.0, [0.0, 1.0, 0.0]), (1e6, [0.0, 1.0, 2.0])):
        keeper = Keeper(model, {name}, most_bytes)
        with torch.inference_mode(), keeper.keeping():
            for x, layer in zip(inputs, model, strict=True):
                layer(x)
        (case,) = keeper.cases.values()
        assert [float(args[0][0, 0]) for args, _ in case.calls] == kept
        assert [args[1].data_ptr() for args, _ in case.calls] == [layer.weight.data_ptr() for layer in model]


@dataclass(frozen=True)
class Node:
    grid: tuple[int, int, int] | None
    block: tuple[int, int, int] | None
    call: int


class Graphs:
    """A device that captures by noting which call was captured; *odd* calls launch a kernel more."""

    def __init__(self, case: Case, launched: tuple[Launch, ...], odd: int) -> None:
        self.case, self.launched, self.odd = case, launched, odd
        self.reset: list[Any] = []

    def synchronize(self) -> None: ...

    def captured(self, work: Any) -> Any:
        graph = SimpleNamespace(calls=[*work.args])
        graph.reset = lambda: self.reset.append(graph)
        return graph

    def nodes(self, graph: Any) -> list[Node]:
        found = []
        for call in graph.calls:
            more = (self.launched[0],) if call % len(self.case.calls) == self.odd else ()
            for launch in (*more, *self.launched):
                shape = (launch.grid, launch.block) if launch.blocks else (None, None)
                found.append(Node(*shape, call))
        return found

    def alone(self, nodes: list[Node]) -> Any:
        return SimpleNamespace(nodes=nodes, reset=lambda: self.reset.append(nodes))


def test_kernels_run_alone_with_every_calls_parameters_but_of_calls_that_launch_something_else() -> None:
    block = (128, 1, 1)
    launched = (Launch("a", (2, 1, 1), block), Launch("memcpy", (0, 0, 0), (0, 0, 0)), Launch("b", (9, 1, 1), block))
    case = Case("x", lambda *_: None, [((i,), {}) for i in range(3)])
    device: Any = Graphs(case, launched, odd=1)
    found = list(taken_apart(device, case, Wanted("x", launched, (), ("b", "a", "not there"))))
    assert [(kernel, count) for kernel, _, count in found] == [("b", 240), ("a", 240)]
    for kernel, graph, _ in found:
        assert {node.call for node in graph.nodes} == {0, 2}
        assert {node.grid for node in graph.nodes} == {{"a": (2, 1, 1), "b": (9, 1, 1)}[kernel]}
    # What holds the kernels' memory is given back, after the last of them.
    assert len(device.reset) == 3


@torch.library.custom_op("llmkern_tests::asking", mutates_args=())
def _asking(x: torch.Tensor, limit: float) -> torch.Tensor:
    """What LLM.int8() does: a comparison, a question to the device, and work that hangs on the answer."""
    large = x.abs() >= limit
    return x * 2 if large.any() else x + 1


class PartGraphs:
    """A device that refuses to capture what asks; an operator launches one kernel of its own name."""

    def __init__(self) -> None:
        self.reset: list[Any] = []

    def captured(self, work: Any) -> Any:
        operator = str(getattr(work, "func", work))
        if "run" in operator or "is_nonzero" in operator:
            return None
        work()
        graph = SimpleNamespace(operator=operator)
        graph.reset = lambda: self.reset.append(graph)
        return graph

    def nodes(self, graph: Any) -> list[Any]:
        return [SimpleNamespace(name=graph.operator, grid=(1, 1, 1), block=(64, 1, 1))]

    def alone(self, nodes: list[Any]) -> Any:
        return SimpleNamespace(nodes=nodes, reset=lambda: None)


def test_an_operator_that_asks_the_device_is_taken_apart_at_what_it_calls() -> None:
    shape: Any = ((1, 1, 1), (64, 1, 1))
    launched = (
        Launch("aten.abs.default", *shape),
        Launch("aten.ge.Scalar", *shape),
        Launch("aten.any.default", *shape),
        Launch("memcpy DtoH (pinned)", (0, 0, 0), (0, 0, 0)),
        # Launched in another shape than what the call launches: not the same kernel.
        Launch("aten.mul.Tensor", (7, 1, 1), (64, 1, 1)),
    )
    x = torch.tensor([1.0, 9.0])
    case = Case("x", torch.ops.llmkern_tests.asking.default, [((x, 5.0), {})])
    wanted = Wanted("x", launched, (), ("aten.abs.default", "aten.ge.Scalar", "aten.mul.Tensor", "aten.any.default"))
    device: Any = PartGraphs()
    with torch.inference_mode():
        found = {kernel: count for kernel, _, count in taken_apart(device, case, wanted)}
    assert found == {"aten.abs.default": 240, "aten.ge.Scalar": 240, "aten.any.default": 240}
    assert {graph.operator for graph in device.reset} >= {"aten.abs.default", "aten.mul.Tensor"}


def test_an_operator_whose_kernel_cannot_be_called_directly_stays_whole() -> None:
    launched = (Launch("a", (1, 1, 1), (64, 1, 1)),)
    for function, args in ((lambda x: x, (torch.ones(2),)), (torch.ops.aten.rand.default, ([2],))):
        case = Case("x", function, [(args, {})])
        device: Any = PartGraphs()
        assert list(taken_apart(device, case, Wanted("x", launched, (), ("a",)))) == []
