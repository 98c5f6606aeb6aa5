"""Pass *replay*: each distinct operator of the run alone, with its real arguments, for its joules per launch.

A sensor that ticks every 100 ms cannot see a kernel of 2 us, but it can see two seconds of nothing else. The weights of
all layers take turns, so that they come from memory and not from a warm cache; activations are those of the first call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from llmkern.errors import DeviceError
from llmkern.record.arguments import copies_of, storage_of
from llmkern.record.device.interface import Device
from llmkern.record.graphs import graph_signature, is_graph, launches_seen
from llmkern.record.operators import computes, may_copy, signature_of
from llmkern.record.passes.inspection import NEW_TOKENS
from llmkern.record.passes.weigh import idle
from llmkern.record.rig import Rig, Step
from llmkern.runfolder.facts import ReplayFacts
from llmkern.runfolder.replays import Wanted
from llmkern.workload.engine import taken_apart
from llmkern.workload.load import stored_tensors

WINDOW_S = 1.2
# A kernel alone is small, runs back to back, and is needed to a tenth.
ALONE_S = 0.8
# A graph of so many kernels takes the host less to launch than the device to run.
_ALONE_NODES = 240
# So many layers' weights in turn are more than any L2 holds.
MOST_CALLS = 32
# The activations of a layer decide how many bits switch; those of as many layers are kept as fit in this share of the
# free memory, and of the others the first's.
KEPT_SHARE = 0.1
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


@dataclass(frozen=True)
class Replayed:
    """One window: *launches* operators of *signature*, or of its *kernel* alone, between its start and end."""

    signature: str
    kernel: str | None
    start_ns: int
    end_ns: int
    launches: int
    duty: float
    captured: bool


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


def replay(rig: Rig, wanted: list[Wanted]) -> None:
    """Replay the operators *wanted* into table ``replays``, and rest once more when all is warm.

    An operator that changes what it is given is left out; the facts say how many there were.
    """
    if not wanted:
        return
    plans = {one.signature: one for one in wanted}
    cases, drifting = kept_cases(rig, list(plans))
    total = sum(len(plans[case.signature].duties) + len(plans[case.signature].alone) for case in cases)
    with rig.pumped("replay") as pump, rig.stages.stage("Replaying", total) as advance:
        for window in windows(rig, [(case, plans[case.signature]) for case in cases], advance):
            pump.check()
            row = {name: [value] for name, value in asdict(window).items()}
            rig.writer.append(
                "replays", {**row, "seconds": None, "dynamic_j": None, "floor_w": None, "clock_mhz": None}
            )
        # Warmer than before: this is where the floor's slope over temperature comes from.
        idle(rig)
    known = rig.writer.facts.replays or ReplayFacts()
    rig.writer.note(replays=replace(known, replayed=len(cases), drifting=drifting))


def kept_cases(rig: Rig, wanted: list[str]) -> tuple[list[Case], int]:
    """Return the cases of *wanted* that one more generation calls, and how many of them drift and are left out."""
    free_bytes, _ = rig.device.free_bytes()
    keeper = Keeper(rig.model, set(wanted), KEPT_SHARE * free_bytes)
    with taken_apart(rig.model), keeper.keeping():
        rig.generation(NEW_TOKENS)
    rig.annotator.drain()
    cases = [keeper.cases[name] for name in wanted if name in keeper.cases]
    with torch.inference_mode():
        steady = [case for case in cases if not case.drifts()]
    return steady, len(cases) - len(steady)


def windows(rig: Rig, cases: list[tuple[Case, Wanted]], advance: Step) -> Iterator[Replayed]:
    """Run each of *cases* as it is wanted and yield its windows, each begun at a counter tick and followed by two."""
    for case, wanted in cases:
        with torch.inference_mode(), burst_of(rig.device, case) as burst:
            for duty in wanted.duties:
                start_ns, end_ns, bursts = _window(rig, case.signature, burst.run, WINDOW_S, duty)
                launches = bursts * burst.launches
                yield Replayed(case.signature, None, start_ns, end_ns, launches, duty, burst.graph is not None)
                advance()
            apart = _taken_apart(rig.device, case, wanted) if burst.graph is not None and wanted.alone else ()
            for kernel, alone, count in apart:
                start_ns, end_ns, bursts = _window(rig, kernel, alone.replay, ALONE_S, 1.0)
                alone.reset()
                yield Replayed(case.signature, kernel, start_ns, end_ns, bursts * count, 1.0, True)
                advance()


def _window(rig: Rig, name: str, burst: Callable[[], None], seconds: float, duty: float) -> tuple[int, int, int]:
    """Run *burst* for *seconds*, the share *duty* of the time, and return the window's start and end and how often."""
    rig.wait_for_ticks(1)
    # Clock and throttle reasons several times in a window; reading them delays no joule.
    rig.pace(0.0)
    bursts = 0
    with rig.annotator.range(name[:80], "replay"):
        start_ns, start_s = time.time_ns(), time.monotonic()
        while time.monotonic() - start_s < seconds:
            begin_s = time.perf_counter()
            burst()
            rig.device.synchronize()
            bursts += 1
            if duty < 1:
                time.sleep((time.perf_counter() - begin_s) * (1 / duty - 1))
        end_ns = time.time_ns()
    rig.wait_for_ticks(2)
    return start_ns, end_ns, bursts


def _taken_apart(device: Device, case: Case, wanted: Wanted) -> Iterator[tuple[str, Any, int]]:
    """Yield each kernel that is wanted alone, a graph of it and nothing else, and how often that launches it.

    Of a call that does not launch what was inspected (another layer has more outliers, say) nothing is taken: no node's
    name would be certain.
    """
    # They hold the memory that the kernels read and write.
    graphs = [device.captured(partial(case.run, index)) for index in range(len(case.calls))]
    shapes = [(launch.grid, launch.block) if launch.blocks else None for launch in wanted.launched]
    found: dict[str, list[Any]] = {name: [] for name in wanted.alone}
    for graph in graphs:
        nodes = device.nodes(graph) if graph is not None else None
        if nodes is None or [node.block for node in nodes] != [shape and shape[1] for shape in shapes]:
            continue
        for node, launch, shape in zip(nodes, wanted.launched, shapes, strict=True):
            if launch.name in found and (node.grid, node.block) == shape:
                found[launch.name].append(node)
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


@dataclass(frozen=True)
class Burst:
    """About 1 ms of an operator: *run* launches it *launches* times, as a *graph* unless it cannot be captured."""

    run: Callable[[], None]
    launches: int
    graph: Any = None


@contextmanager
def burst_of(device: Device, case: Case) -> Iterator[Burst]:
    """Yield a burst of *case*.

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
    graph = None if is_graph(case.signature) else device.captured(eager)
    if graph is None:
        yield Burst(eager, count)
    else:
        yield Burst(graph.replay, count, graph)
        graph.reset()
