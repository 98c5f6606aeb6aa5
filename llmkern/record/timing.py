"""Pass *time*: the timeline of every kernel, copy and host launch, with ranges down to the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    new_tokens: int,
    repeats: int,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Record *repeats* generations of *new_tokens* tokens and return what the recorder says of itself.

    Raises DeviceError when another profiler holds the device.
    """
    recorder = device.recorder()
    recorder.start()
    try:
        # The first launches under a new recorder are slow (instrumentation, lazy loading): run and forget them.
        generation(min(2, new_tokens))
        device.synchronize()
        recorder.discard()
        annotator.drain()
        with Pump(writer, [lambda: flushed(recorder), lambda: ranges(annotator, "time"), *_readings(meters)]) as pump:
            with generation.layers_annotated():
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


def flushed(recorder: KernelRecorder) -> dict[str, Mapping[str, Any]]:
    """Return what *recorder* has as rows of pass ``time``; a buffer that is not full comes with a later call.

    To force it out would lose the times of kernels that still run. A buffer holds some 4,800 kernels, under a second of
    any run that launches eagerly.
    """
    recorder.flush()
    return {table: {"pass": "time", **rows} for table, rows in recorder.drain().items()}


def ranges(annotator: Annotator, pass_name: str) -> dict[str, Mapping[str, Any]]:
    return {"ranges": columns(annotator.drain(), pass_name)}


def _readings(meters: list[EnergyMeter]) -> list[Callable[[], Mapping[str, Mapping[str, Any]]]]:
    return [meter.drain for meter in meters]
