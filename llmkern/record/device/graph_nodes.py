"""The kernels of a captured CUDA graph, and graphs of some of them alone.

PyTorch captures a graph and launches it whole. What one kernel of an operator costs only shows when it runs without the
others, so its nodes are copied, parameters and all, into a graph of their own; the memory that they read and write is
that of the captured graph, which has to be kept.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from llmkern.errors import DeviceError
from llmkern.record.device.native import native


@dataclass(frozen=True)
class Node:
    """One node of a captured graph in the order of its capture; *grid* and *block* are None for what is no kernel.

    *name* is the kernel's as a recorder has it, None where the driver cannot tell.
    """

    handle: Any
    grid: tuple[int, int, int] | None = None
    block: tuple[int, int, int] | None = None
    name: str | None = None


class KernelGraph:
    """Copies of kernel *nodes*, one after the other, as a graph with replay() and reset().

    Raises DeviceError when the driver refuses one.
    """

    def __init__(self, nodes: list[Node]) -> None:
        driver = _driver()
        self._graph = _done(driver.cuGraphCreate(0))
        self._executable = None
        try:
            before: list[Any] = []
            for node in nodes:
                parameters = _done(driver.cuGraphKernelNodeGetParams(node.handle))
                copied = _done(driver.cuGraphAddKernelNode(self._graph, before, len(before), parameters))
                # Clusters and priorities are attributes, not parameters.
                _done(driver.cuGraphKernelNodeCopyAttributes(copied, node.handle))
                before = [copied]
            self._executable = _done(driver.cuGraphInstantiate(self._graph, 0))
        except DeviceError:
            self.reset()
            raise

    def replay(self) -> None:
        """Launch all copies on PyTorch's current stream."""
        _done(_driver().cuGraphLaunch(self._executable, torch.cuda.current_stream().cuda_stream))

    def reset(self) -> None:
        """Give the graph back; it may not run any more."""
        driver = _driver()
        if self._executable is not None:
            driver.cuGraphExecDestroy(self._executable)
            self._executable = None
        if self._graph is not None:
            driver.cuGraphDestroy(self._graph)
            self._graph = None


def nodes_of(graph: Any) -> list[Node] | None:
    """Return the nodes of captured *graph* (torch.cuda.CUDAGraph) in order, None where that cannot be told.

    It was captured with keep_graph, on one stream: each node waits for the one before.
    """
    try:
        driver = _driver()
    except ImportError:
        return None
    handle = driver.CUgraph(init_value=graph.raw_cuda_graph())
    try:
        _, count = _several(driver.cuGraphGetNodes(handle, 0))
        nodes, _ = _several(driver.cuGraphGetNodes(handle, count))
        found = []
        for node in nodes[:count]:
            if _done(driver.cuGraphNodeGetType(node)) != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
                found.append(Node(node))
                continue
            told = _done(driver.cuGraphKernelNodeGetParams(node))
            grid, block = (tuple(getattr(told, f"{what}Dim{axis}") for axis in "XYZ") for what in ("grid", "block"))
            found.append(Node(node, grid, block, _name(told)))
    except DeviceError:
        return None
    return found


def _name(parameters: Any) -> str | None:
    """Return the name of the kernel of node *parameters*."""
    driver = _driver()
    by_handle = ((parameters.kern, "cuKernelGetName"), (parameters.func, "cuFuncGetName"))
    for handle, ask in by_handle:
        # A driver before CUDA 12.3 knows no names.
        if int(handle) and hasattr(driver, ask):
            with suppress(DeviceError):
                return str(native().demangle(_done(getattr(driver, ask)(handle)).decode()))
    return None


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _done(result: tuple[Any, ...]) -> Any:
    """Return the single value of a driver call's *result*; raises DeviceError where it failed."""
    values = _several(result)
    return values[0] if values else None


def _several(result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise DeviceError(f"The CUDA driver answered {result[0].name}.")
    return result[1:]
