"""Launches of CUDA graphs, which PyTorch's dispatcher does not see, as operators of their own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

OPERATOR = "cuda_graph.replay"
_numbers = itertools.count(1)


def graph_signature(graph: Any) -> str:
    """Return the signature of launching *graph*: its number in this process. No other process can name it."""
    if not hasattr(graph, "llmkern_number"):
        graph.llmkern_number = next(_numbers)
    return f"{OPERATOR}[graph {graph.llmkern_number}]"


def is_graph(signature: str) -> bool:
    return signature.startswith(OPERATOR)


@contextmanager
def launches_seen(seen: Callable[[Any, int, int], None]) -> Iterator[None]:
    """Call *seen* with the graph and the start and end in ns after every launch of a torch.cuda.CUDAGraph."""
    kind: Any = torch.cuda.CUDAGraph
    launch = kind.replay

    def replay(graph: Any) -> None:
        start_ns = time.time_ns()
        launch(graph)
        seen(graph, start_ns, time.time_ns())

    kind.replay = replay
    try:
        yield
    finally:
        kind.replay = launch
