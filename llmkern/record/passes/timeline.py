"""Passes *calls* and *time*: the timeline of every kernel and copy, with ranges of phases and tokens.

Pass *calls* records one generation with ranges of the layers and the host calls behind the kernels, which is what a
gap's cause is read from. They cost the launching thread about as much as the kernels' records do, so pass *time*, from
which times are taken, goes without.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from llmkern.record.device.interface import KernelRecorder
from llmkern.record.rig import Rig, Step
from llmkern.runfolder.vocabulary import CALLS

# By default: two generations show whether they differ, and one that takes longer than LONG_S has steps enough.
TRACE_REPEATS, LONG_S = 2, 4.0


def record_timelines(rig: Rig) -> None:
    """Record every traced pass that the device has; raises DeviceError when another profiler holds it."""
    wanted = rig.options.trace_repeats or TRACE_REPEATS
    passes = {name: 1 if name == CALLS else wanted for name in rig.device.traced_passes}
    with rig.stages.stage("Timing", sum(passes.values())) as advance:
        for name, repeats in passes.items():
            record_timeline(rig, name, repeats, advance, layers=name == next(iter(passes)))


def record_timeline(rig: Rig, pass_name: str, repeats: int, advance: Step, *, layers: bool = True) -> None:
    """Record *repeats* generations as pass *pass_name*, and in the facts what the recorder says of itself.

    Where their number was not asked for, none begins after LONG_S. Host calls are recorded in pass ``calls`` only,
    ranges of the layers with *layers*.
    """
    note, new_tokens = rig.annotator, rig.options.new_tokens
    with rig.device.recorder() as recorder:
        recorder.start(host_calls=pass_name == CALLS)
        # The first launches under a new recorder are slow (instrumentation, lazy loading): run and forget them.
        rig.generation(min(2, new_tokens))
        rig.device.synchronize()
        recorder.discard()
        note.drain()
        with rig.pumped(pass_name, lambda: flushed(recorder, pass_name)) as pump:
            with rig.generation.layers_annotated() if layers else nullcontext():
                begin_s = time.monotonic()
                for repeat in range(repeats):
                    if repeat and rig.options.trace_repeats is None and time.monotonic() - begin_s > LONG_S:
                        break
                    note.repeat = repeat
                    rig.generation(new_tokens)
                    pump.check()
                    advance()
            note.repeat = None
            rig.device.synchronize()
            recorder.stop()
        rig.writer.note(recorders={**rig.writer.facts.recorders, pass_name: recorder.facts()})


def flushed(recorder: KernelRecorder, pass_name: str) -> dict[str, Mapping[str, Any]]:
    """Return what *recorder* has as rows of pass *pass_name*; a buffer that is not full comes with a later call.

    To force it out would lose the times of kernels that still run. A buffer holds some 4,800 kernels, under a second of
    any run that launches eagerly.
    """
    recorder.flush()
    return {table: {"pass": pass_name, **rows} for table, rows in recorder.drain().items()}
