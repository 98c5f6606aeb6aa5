"""Pass *inspect*: which operator, module and layer stand behind each kernel, with shapes, bytes and FLOPs.

Every operator is caught below autograd, where PyTorch dispatches it to the device. That slows the host down several
times, so the times of this pass are used for one thing only: a kernel belongs to the operator during which the host
launched it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkern.record.graphs import OPERATOR, graph_signature, launches_seen
from llmkern.record.operators import computes, copied, describe, flops, may_copy, moved_bytes, signature_of
from llmkern.record.rig import Rig
from llmkern.runfolder.vocabulary import INSPECT
from llmkern.workload.engine import taken_apart

# Prefill and three decoded tokens: odd and even tokens may differ (alignment chooses the kernel), and so does the last.
NEW_TOKENS = 4
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class OpCall:
    """One operator as it was dispatched; times in ns, *moved_bytes* and *flops* by its shapes."""

    start_ns: int
    end_ns: int
    thread: int
    phase: str | None
    token: int | None
    op: str
    module: str
    layer: int | None
    shapes: str
    dtypes: str
    signature: str
    moved_bytes: int
    flops: int


class Inspector(TorchDispatchMode):
    """Notes every operator that computes something on the thread that entered it, and every launch of a CUDA graph.

    *phase_and_token* tells where the generation is. FLOPs are those of PyTorch's own counter and, for bitsandbytes'
    products, 2 x outputs x inputs; bytes are each tensor read once and each result written once.
    """

    def __init__(self, model: nn.Module, phase_and_token: Callable[[], tuple[str | None, int | None]]) -> None:
        super().__init__()
        self._names = {id(m): name for name, m in model.named_modules()}
        self._where = phase_and_token
        self._stack: list[str] = []
        self._thread = threading.get_native_id()
        self.calls: list[OpCall] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Catch operators, and the modules they are called in, for the time."""

        def enter(module: nn.Module, _args: Any) -> None:
            self._stack.append(self._names.get(id(module), ""))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._stack.pop()

        hooks = [
            module_hooks.register_module_forward_pre_hook(enter),
            module_hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with self, launches_seen(self._graph):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._stack.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        start_ns = time.time_ns()
        result = func(*args, **kwargs)
        end_ns = time.time_ns()
        leaves = tree_leaves((args, kwargs))
        inputs = [x for x in leaves if isinstance(x, torch.Tensor)]
        if computes(func) or (may_copy(func) and copied(inputs, result)):
            shapes, dtypes = describe(leaves)
            outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            moved, work = moved_bytes(str(func), inputs, outputs), flops(func, (args, kwargs), result, inputs, outputs)
            self._note(start_ns, end_ns, (str(func), shapes, dtypes, signature_of(func, leaves), moved, work))
        return result

    def _graph(self, graph: Any, start_ns: int, end_ns: int) -> None:
        self._note(start_ns, end_ns, (OPERATOR, "", "", graph_signature(graph), 0, 0))

    def _note(self, start_ns: int, end_ns: int, told: tuple[Any, ...]) -> None:
        phase, token = self._where()
        module = next((name for name in reversed(self._stack) if name), "")
        layer = _LAYER.search(module)
        number = int(layer[1]) if layer else None
        op, *rest = told
        self.calls.append(OpCall(start_ns, end_ns, self._thread, phase, token, op, module, number, *rest))


def inspect(rig: Rig) -> None:
    """Record one short generation with every operator, and in the facts how many there were.

    Writes tables ``ops``, and ``kernels``, ``launches`` and ``ranges`` of pass ``inspect``.
    """
    inspector = Inspector(rig.model, rig.generation.where)
    with rig.stages.stage("Inspecting"), rig.device.recorder() as recorder:
        recorder.start()
        # What is compiled or loaded on first use would belong to the first operator that needs it.
        rig.generation(NEW_TOKENS)
        recorder.discard()
        rig.annotator.drain()
        with rig.pumped(INSPECT, lambda: _rows(recorder.drain())):
            with taken_apart(rig.model), inspector.watching():
                rig.generation(NEW_TOKENS)
            rig.device.synchronize()
            recorder.stop()
        rig.writer.append("ops", op_columns(inspector.calls))
        found = replace(recorder.facts(), ops=len(inspector.calls), new_tokens=NEW_TOKENS)
        rig.writer.note(recorders={**rig.writer.facts.recorders, INSPECT: found})


def _rows(drained: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {table: {"pass": INSPECT, **rows} for table, rows in drained.items()}


def op_columns(calls: list[OpCall]) -> dict[str, Any]:
    """Return *calls* as columns of table ``ops``."""
    return {field: [getattr(call, field) for call in calls] for field in OpCall.__dataclass_fields__}
