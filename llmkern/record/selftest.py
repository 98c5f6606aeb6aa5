"""Drives the board with a load of known times, so that what its power sensors make of it can be seen."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from llmkern.record.annotate import Annotator
from llmkern.record.device import Device, EnergyMeter
from llmkern.record.weigh import RARE_TICK_S, pace

CYCLES = 10
ON_S = 0.12
# Never the same twice, so that no sensor can run in step with the load.
OFF_S = (0.10, 0.26)
_REST_S = 0.4


def drive_sensors(device: Device, annotator: Annotator, meters: list[EnergyMeter], advance: Callable[[], None]) -> None:
    """Load the device CYCLES times for ON_S, marked by ranges of category ``load``, and read every sensor closely."""
    pauses = random.Random(0)
    # Kernels are loaded at their first launch.
    device.work(0.02)
    for meter in meters:
        meter.watch_closely(True)
    pace(meters, 0.0)
    try:
        with annotator.range("sensors", "selftest"):
            time.sleep(_REST_S)
            for _ in range(CYCLES):
                with annotator.range("load", "load"):
                    device.work(ON_S)
                time.sleep(pauses.uniform(*OFF_S))
                advance()
            time.sleep(_REST_S)
    finally:
        for meter in meters:
            meter.watch_closely(False)
        pace(meters, RARE_TICK_S)
