"""Annotation for a profiler that is watching: phases, token steps, layers and modules as NVTX, power as a counter.

llmkern records no kernel then: the profiler does, and its capture completes the run folder afterwards (llmkern import).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pynvml
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from llmkern.record.annotate import Annotator
from llmkern.record.device import Device, EnergyMeter
from llmkern.record.generation import Generation
from llmkern.record.pump import Pump
from llmkern.record.timing import ranges
from llmkern.run import RunWriter

# As often as NVML refreshes its fields.
_POWER_S = 0.1


def annotate_generations(
    device: Device,
    generation: Generation,
    model: nn.Module,
    annotator: Annotator,
    meters: list[EnergyMeter],
    writer: RunWriter,
    *,
    new_tokens: int,
    repeats: int,
    advance: Callable[[], None],
) -> None:
    """Run *repeats* generations of *new_tokens* tokens with every range down to the modules, inside one of pass time.

    What the capture holds outside that range, the weighed windows before it above all, is not taken for traced.
    """
    sources: list[Callable[[], Any]] = [lambda: ranges(annotator, "time"), *(meter.drain for meter in meters)]
    with Pump(writer, sources) as pump:
        with annotator.range("pass time", "pass"), ExitStack() as stack:
            stack.enter_context(generation.layers_annotated())
            stack.enter_context(modules_annotated(model, annotator))
            if device.kind == "cuda":
                stack.enter_context(power_counted(annotator, str(device.facts().get("uuid"))))
            for repeat in range(repeats):
                annotator.repeat = repeat
                generation(new_tokens)
                pump.check()
                advance()
            annotator.repeat = None
        device.synchronize()


@contextmanager
def modules_annotated(model: nn.Module, annotator: Annotator) -> Iterator[None]:
    """Mark every module's forward as an NVTX range of its name, with the shape of its first tensor as payload."""
    names = {id(module): name for name, module in model.named_modules() if name}

    def enter(module: nn.Module, args: Any) -> None:
        name = names.get(id(module))
        if name is not None:
            first = next((x for x in args if isinstance(x, torch.Tensor)), None)
            annotator.emit(name, "module", np.array([] if first is None else first.shape, np.int64))

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        if id(module) in names:
            annotator.emit_end()

    hooks = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def power_counted(annotator: Annotator, uuid: str) -> Iterator[None]:
    """Send the board's power in W to the profiler as an NVTX counter ten times a second; none where NVML gives none."""
    counter = annotator.counter("power [W]")
    done = threading.Event()

    def sample() -> None:
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            while not done.wait(_POWER_S - time.monotonic() % _POWER_S):
                counter.sample(pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
        except pynvml.NVMLError:
            # The joules come from the meters, which have said already what this board cannot do.
            return

    thread = threading.Thread(target=sample, name="llmkern-power", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
