"""Kernels of an operator one by one: from a graph of all of it, or of the operators that it calls itself.

An operator that asks the device something in the middle (LLM.int8() looks for outliers) cannot be captured whole. What
it calls can, one call after the other, but for those calls that ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkern.errors import DeviceError
from llmkern.record.device.interface import Device
from llmkern.record.operators import computes
from llmkern.record.passes.kept import Case
from llmkern.runfolder.replays import Wanted

# A graph of so many kernels takes the host less to launch than the device to run.
_ALONE_NODES = 240
# Of an operator that is captured call by call so many of its own calls: each is some captures.
_MOST_INSIDE = 4


def taken_apart(device: Device, case: Case, wanted: Wanted) -> Iterator[tuple[str, Any, int]]:
    """Yield each kernel that is wanted alone, a graph of it and nothing else, and how often that launches it."""
    # They hold the memory that the kernels read and write.
    graphs = [device.captured(partial(case.run, index)) for index in range(len(case.calls))]
    found = _nodes_of_whole(device, graphs, wanted)
    inside = []
    if not any(graphs):
        inside = [_Inside(device) for _ in case.calls[:_MOST_INSIDE]]
        for index, watched in enumerate(inside):
            watched.run(case, index)
        graphs = [graph for watched in inside for graph in watched.graphs]
        found = _nodes_by_name(device, graphs, wanted)
    for kernel, own in found.items():
        if own:
            # All layers' weights take turns here too.
            own *= max(1, _ALONE_NODES // len(own))
            # What the driver refuses stays together.
            with suppress(DeviceError):
                yield kernel, device.alone(own), len(own)
    for graph in graphs:
        if graph is not None:
            graph.reset()


def _nodes_of_whole(device: Device, graphs: list[Any], wanted: Wanted) -> dict[str, list[Any]]:
    """Return the nodes of each kernel wanted alone in *graphs* of all of the operator.

    Of a call that does not launch what was inspected (another layer has more outliers, say) nothing is taken: which
    kernel a node is shows in its place only.
    """
    shapes = [(launch.grid, launch.block) if launch.blocks else None for launch in wanted.launched]
    found: dict[str, list[Any]] = {name: [] for name in wanted.alone}
    for graph in graphs:
        nodes = device.nodes(graph) if graph is not None else None
        if nodes is None or [node.block for node in nodes] != [shape and shape[1] for shape in shapes]:
            continue
        for node, launch, shape in zip(nodes, wanted.launched, shapes, strict=True):
            if launch.name in found and (node.grid, node.block) == shape:
                found[launch.name].append(node)
    return found


def _nodes_by_name(device: Device, graphs: list[Any], wanted: Wanted) -> dict[str, list[Any]]:
    """Return the nodes of each kernel wanted alone in *graphs* of parts of the operator, known by name and shape."""
    found: dict[str, list[Any]] = {name: [] for name in wanted.alone}
    shapes = {(launch.name, launch.grid, launch.block) for launch in wanted.launched}
    for graph in graphs:
        for node in device.nodes(graph) or ():
            if node.name in found and (node.name, node.grid, node.block) in shapes:
                found[node.name].append(node)
    return found


class _Inside(TorchDispatchMode):
    """Captures every operator that a call of another calls, each for itself; those that cannot be are left out."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self.graphs: list[Any] = []
        # What they read was made on the way and has to stay.
        self._held: list[Any] = []

    def run(self, case: Case, index: int) -> None:
        """Run call *index* of *case*, seeing what it calls; where its kernel cannot be called directly, do nothing."""
        args, kwargs = case.calls[index % len(case.calls)]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        redispatch = getattr(case.function, "redispatch", None)
        if redispatch is None or not tensors:
            return
        # Past the place where a mode sees the operator itself, and no further.
        keys = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(tensors[0].device.type.upper()))
        with suppress(NotImplementedError), self:
            redispatch(keys, *args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # First, while what it reads is as it was: captured, it changes nothing.
        graph = self._device.captured(partial(func, *args, **kwargs)) if computes(func) else None
        result = func(*args, **kwargs)
        if graph is not None:
            self.graphs.append(graph)
            self._held.append((args, kwargs, result))
        return result
