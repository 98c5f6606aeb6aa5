"""Drives the board with a load of known times, so that what its power sensors make of it can be seen."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack

from llmkern.record.rig import RARE_TICK_S, Rig, Step

CYCLES = 10
ON_S = 0.12
# Never the same twice, so that no sensor can run in step with the load.
OFF_S = (0.10, 0.26)
_REST_S = 0.4


def try_sensors(rig: Rig) -> None:
    """Record how the sensors of a device follow a load; on one without sensors to be tested do nothing."""
    if not rig.meters or not rig.device.has_sensors_to_test:
        return
    with rig.stages.stage("Testing the sensors", CYCLES) as advance, rig.pumped("selftest"):
        drive_sensors(rig, advance)


def drive_sensors(rig: Rig, advance: Step) -> None:
    """Load the device CYCLES times for ON_S, marked by ranges of category ``load``, and read every sensor closely."""
    pauses = random.Random(0)
    # Kernels are loaded at their first launch.
    rig.device.work(0.02)
    with ExitStack() as stack:
        for meter in rig.meters:
            meter.watch_closely(True)
            stack.callback(meter.watch_closely, False)
        rig.pace(0.0)
        stack.callback(rig.pace, RARE_TICK_S)
        with rig.annotator.range("sensors", "selftest"):
            time.sleep(_REST_S)
            for _ in range(CYCLES):
                with rig.annotator.range("load", "load"):
                    rig.device.work(ON_S)
                time.sleep(pauses.uniform(*OFF_S))
                advance()
            time.sleep(_REST_S)
