"""Passes *calls* and *time*: the timeline of every kernel and copy, with ranges of phases and tokens.

Pass *calls* records one generation with ranges of the layers and the host calls behind the kernels, which is what a
gap's cause is read from. They cost the launching thread about as much as the kernels' records do, so pass *time*, from
which times are taken, goes without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from llmkern.record.annotate import Annotator, columns
from llmkern.record.device import Device, EnergyMeter, KernelRecorder
from llmkern.record.generation import Generation
from llmkern.record.pump import Pump
from llmkern.run import RunWriter


def record_timeline(
    device: Device,
    generation: Generation,
    annotator: Annotator,
    meters: list[EnergyMeter],
    writer: RunWriter,
    *,
    pass_name: str,
    new_tokens: int,
    repeats: int,
    advance: Callable[[], None],
    layers: bool = True,
) -> dict[str, Any]:
    """Record *repeats* generations of *new_tokens* tokens and return what the recorder says of itself.

    Host calls are recorded in pass ``calls`` only, ranges of the layers with *layers*. Raises DeviceError when another
    profiler holds the device.
    """
    recorder = device.recorder()
    recorder.start(host_calls=pass_name == "calls")
    try:
        # The first launches under a new recorder are slow (instrumentation, lazy loading): run and forget them.
        generation(min(2, new_tokens))
        device.synchronize()
        recorder.discard()
        annotator.drain()
        sources = [lambda: flushed(recorder, pass_name), lambda: ranges(annotator, pass_name)]
        with Pump(writer, [*sources, *(meter.drain for meter in meters)]) as pump:
            with generation.layers_annotated() if layers else nullcontext():
                for repeat in range(repeats):
                    annotator.repeat = repeat
                    generation(new_tokens)
                    pump.check()
                    advance()
            annotator.repeat = None
            device.synchronize()
            recorder.stop()
    finally:
        recorder.stop()
    return recorder.facts()


def flushed(recorder: KernelRecorder, pass_name: str) -> dict[str, Mapping[str, Any]]:
    """Return what *recorder* has as rows of pass *pass_name*; a buffer that is not full comes with a later call.

    To force it out would lose the times of kernels that still run. A buffer holds some 4,800 kernels, under a second of
    any run that launches eagerly.
    """
    recorder.flush()
    return {table: {"pass": pass_name, **rows} for table, rows in recorder.drain().items()}


def ranges(annotator: Annotator, pass_name: str) -> dict[str, Mapping[str, Any]]:
    return {"ranges": columns(annotator.drain(), pass_name)}
