"""Arguments of the operators that will be replayed: weights as they are, activations as copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from llmkern.record.arguments import copies_of, storage_of
from llmkern.record.graphs import graph_signature, launches_seen
from llmkern.record.operators import computes, may_copy, signature_of
from llmkern.workload.load import stored_tensors

# So many layers' weights in turn are more than any L2 holds.
MOST_CALLS = 32


@dataclass
class Case:
    """One signature with the calls that take turns."""

    signature: str
    function: Any
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run(self, index: int) -> None:
        args, kwargs = self.calls[index % len(self.calls)]
        self.function(*args, **kwargs)

    def drifts(self) -> bool:
        """Whether a second run with the same arguments writes other values into them than the first did.

        Such an operator (an addition in place, say) would be replayed on values that run away to infinity.
        """
        schema = getattr(self.function, "_schema", None)
        if schema is None or not schema.is_mutable:
            return False
        held = [leaf for leaf in tree_leaves(self.calls[0]) if isinstance(leaf, torch.Tensor)]
        self.run(0)
        before = [_bits(tensor).clone() for tensor in held]
        self.run(0)
        return any(not torch.equal(old, _bits(tensor)) for old, tensor in zip(before, held, strict=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # As they are stored: what is not a number equals itself here.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Keeper(TorchDispatchMode):
    """Keeps the arguments of every operator in *wanted*: weights as they are, activations as copies.

    Of all activations but an operator's first no more than *most_bytes* are copied.
    """

    def __init__(self, model: nn.Module, wanted: set[str], most_bytes: float = 0.0) -> None:
        super().__init__()
        self._left_bytes = most_bytes
        self._weights = {storage_of(tensor) for tensor in stored_tensors(model)}
        self._wanted = wanted
        self.cases: dict[str, Case] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if computes(func) or may_copy(func):
            signature = signature_of(func, tree_leaves((args, kwargs)))
            if signature in self._wanted:
                self._keep(signature, func, args, kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep arguments, and CUDA graphs, for the time."""
        with self, launches_seen(self._graph):
            yield

    def _graph(self, graph: Any, _start_ns: int, _end_ns: int) -> None:
        name = graph_signature(graph)
        if name in self._wanted:
            # Looked up at each launch: now the method still reports to us.
            self.cases[name] = Case(name, lambda: graph.replay(), [((), {})])

    def _is_weight(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and storage_of(leaf) in self._weights

    def _keep(self, signature: str, func: Any, args: Any, kwargs: Any) -> None:
        leaves, shape = tree_flatten((args, kwargs))
        case = self.cases.get(signature)
        if case is None:
            case = self.cases[signature] = Case(signature, func)
            # Before it runs: an operator that works in place would have changed them.
            own = copies_of(leaves, self._is_weight)
        elif len(case.calls) < MOST_CALLS and any(map(self._is_weight, leaves)):
            first, _ = tree_flatten(case.calls[0])
            needed = sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor) and not self._is_weight(x))
            fits = needed <= self._left_bytes
            self._left_bytes -= needed if fits else 0
            own = (
                copies_of(leaves, self._is_weight)
                if fits
                else [x if self._is_weight(x) else kept for x, kept in zip(leaves, first, strict=True)]
            )
        else:
            return
        case.calls.append(tree_unflatten(own, shape))
