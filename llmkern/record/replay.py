"""Pass *replay*: each distinct operator of the run alone, with its real arguments, for its joules per launch.

A sensor that ticks every 100 ms cannot see a kernel of 2 us, but it can see two seconds of nothing else. The weights of
all layers take turns, so that they come from memory and not from a warm cache; activations are those of the first call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from llmkern.record.annotate import Annotator
from llmkern.record.device import Device, EnergyMeter
from llmkern.record.graphs import graph_signature, is_graph, launches_seen
from llmkern.record.operators import computes, may_copy, signature_of
from llmkern.record.weigh import pace, wait_for_ticks
from llmkern.workload.load import stored_tensors

WINDOW_S = 2.0
# As loaded as a decode loop, and as a prefill: towards the power cap a launch costs less, on a hot die more.
DUTIES = (0.3, 0.9)
# So many layers' weights in turn are more than any L2 holds.
MOST_CALLS = 32
# As finely mixed with rest as in a run, where kernels and gaps take turns within a millisecond.
_BURST_S = 0.001


@dataclass
class Case:
    """One signature with the calls that take turns."""

    signature: str
    function: Any
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run(self, index: int) -> None:
        args, kwargs = self.calls[index % len(self.calls)]
        self.function(*args, **kwargs)


@dataclass(frozen=True)
class Replayed:
    """One window: *launches* operators of *signature* between its start and end."""

    signature: str
    start_ns: int
    end_ns: int
    launches: int
    duty: float
    captured: bool


class Keeper(TorchDispatchMode):
    """Keeps the arguments of every operator in *wanted*: weights as they are, activations as copies of the first."""

    def __init__(self, model: nn.Module, wanted: set[str]) -> None:
        super().__init__()
        self._weights = {t.data_ptr() for t in stored_tensors(model)}
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
        return isinstance(leaf, torch.Tensor) and leaf.data_ptr() in self._weights

    def _keep(self, signature: str, func: Any, args: Any, kwargs: Any) -> None:
        leaves, shape = tree_flatten((args, kwargs))
        case = self.cases.get(signature)
        if case is None:
            case = self.cases[signature] = Case(signature, func)
            # Before it runs: an operator that works in place would have changed them.
            own = [x.clone() if isinstance(x, torch.Tensor) and not self._is_weight(x) else x for x in leaves]
        elif len(case.calls) < MOST_CALLS and any(map(self._is_weight, leaves)):
            first, _ = tree_flatten(case.calls[0])
            own = [x if self._is_weight(x) else kept for x, kept in zip(leaves, first, strict=True)]
        else:
            return
        case.calls.append(tree_unflatten(own, shape))


def replay(
    device: Device,
    cases: list[Case],
    annotator: Annotator,
    meters: list[EnergyMeter],
    advance: Callable[[], None],
) -> Iterator[Replayed]:
    """Run each of *cases* for a window at each of DUTIES, begun at a counter tick and followed by two, and yield it."""
    for case in cases:
        with torch.inference_mode(), burst_of(device, case) as (burst, per_burst, captured):
            for duty in DUTIES:
                wait_for_ticks(meters, 1)
                # Clock and throttle reasons several times in a window; reading them delays no joule.
                pace(meters, 0.0)
                launches = 0
                with annotator.range(case.signature[:80], "replay"):
                    start_ns = time.time_ns()
                    while (time.time_ns() - start_ns) / 1e9 < WINDOW_S:
                        begin_s = time.perf_counter()
                        burst()
                        device.synchronize()
                        launches += per_burst
                        time.sleep((time.perf_counter() - begin_s) * (1 / duty - 1))
                    end_ns = time.time_ns()
                wait_for_ticks(meters, 2)
                yield Replayed(case.signature, start_ns, end_ns, launches, duty, captured)
                advance()


@contextmanager
def burst_of(device: Device, case: Case) -> Iterator[tuple[Callable[[], None], int, bool]]:
    """Yield a function that launches about 1 ms of *case*, how many launches that is, and whether it is a CUDA graph.

    Operators that synchronize cannot be captured and are launched one by one; then the host's time is idle time, which
    the floor pays for.
    """
    for index in range(len(case.calls)):
        case.run(index)
    device.synchronize()
    begin_s = time.perf_counter()
    case.run(0)
    device.synchronize()
    count = max(1, min(2000, round(_BURST_S / max(time.perf_counter() - begin_s, 1e-6))))
    # Every call as often as the others, so that a burst moves each layer's weights.
    count = -(-count // len(case.calls)) * len(case.calls)

    def eager() -> None:
        for index in range(count):
            case.run(index)

    # A graph cannot be captured in another.
    graph = None if is_graph(case.signature) else _captured(device, eager)
    if graph is None:
        yield eager, count, False
    else:
        yield graph.replay, count, True
        graph.reset()


def _captured(device: Device, work: Callable[[], None]) -> Any:
    if device.kind != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        # It synchronizes, or allocates in a way that capture forbids.
        torch.cuda.synchronize()
        return None
    return graph
