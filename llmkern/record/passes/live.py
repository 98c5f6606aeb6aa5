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
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from llmkern.record.annotate import Annotator
from llmkern.record.passes.timeline import TRACE_REPEATS
from llmkern.record.rig import Rig
from llmkern.runfolder.vocabulary import PASS, TIME

# As often as NVML refreshes its fields.
_POWER_S = 0.1


def annotate_generations(rig: Rig) -> None:
    """Run the traced generations with every range down to the modules, inside one of pass time.

    What the capture holds outside that range, the weighed windows before it above all, is not taken for traced.
    """
    note = rig.annotator
    repeats = rig.options.trace_repeats or TRACE_REPEATS
    with rig.stages.stage("Annotating", repeats) as advance, rig.pumped(TIME) as pump:
        with note.range(f"{PASS} {TIME}", PASS), ExitStack() as stack:
            stack.enter_context(rig.generation.layers_annotated())
            stack.enter_context(modules_annotated(rig.model, note))
            power_w = rig.device.board_power()
            if power_w is not None:
                stack.enter_context(power_counted(note, power_w))
            for repeat in range(repeats):
                note.repeat = repeat
                rig.generation(rig.options.new_tokens)
                pump.check()
                advance()
            note.repeat = None
        rig.device.synchronize()


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
def power_counted(annotator: Annotator, power_w: Callable[[], float | None]) -> Iterator[None]:
    """Send *power_w* of the board to the profiler as an NVTX counter ten times a second, until it gives none."""
    counter = annotator.counter("power [W]")
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_POWER_S - time.monotonic() % _POWER_S):
            watts = power_w()
            if watts is None:
                # The joules come from the meters, which have said already what this board cannot do.
                return
            counter.sample(watts)

    thread = threading.Thread(target=sample, name="llmkern-power", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
