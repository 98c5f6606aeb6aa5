"""What a run is recorded with: one value that every pass takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmkern.progress import Stages
from llmkern.record.annotate import Annotator, columns
from llmkern.record.clock import ClockWatch
from llmkern.record.device.interface import Device, EnergyMeter
from llmkern.record.generation import FusedGeneration, Generation
from llmkern.record.options import TraceOptions
from llmkern.record.pump import Pump, Source
from llmkern.runfolder import RunWriter

# A read of the NVML counter takes about 3 ms inside the driver, and launches wait for it. Ticks between the ends of a
# window are not needed: the counter integrates.
RARE_TICK_S = 60.0


@dataclass(frozen=True)
class Rig:
    """A device with its meters, a model that is ready to generate, and where what they do is written."""

    device: Device
    meters: tuple[EnergyMeter, ...]
    generation: Generation | FusedGeneration
    model: nn.Module
    writer: RunWriter
    stages: Stages
    options: TraceOptions
    clock: ClockWatch
    # Of other batches of prompts, which are prefilled only.
    prompt_set: tuple[Generation, ...] = ()

    @property
    def annotator(self) -> Annotator:
        return self.generation.annotator

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Let the meters read for the time."""
        with ExitStack() as stack:
            for meter in self.meters:
                meter.start()
                stack.callback(meter.stop)
            yield

    def pumped(self, pass_name: str, *sources: Source) -> Pump:
        """Return a pump of *sources*, the ranges of *pass_name* and what the meters read."""
        return Pump(
            self.writer,
            [*sources, lambda: ranges(self.annotator, pass_name), *(meter.drain for meter in self.meters)],
            self.clock,
        )

    def pace(self, every_s: float) -> None:
        """Let the meters read about one tick in *every_s* seconds from now on; 0 reads every tick."""
        for meter in self.meters:
            meter.pace(every_s)

    def wait_for_ticks(self, count: int) -> None:
        """Wait for *count* ticks of the first meter; without a meter return at once."""
        for meter in self.meters[:1]:
            for _ in range(count):
                # A counter that stands still must not stop the run: the attribution will find the window without ticks.
                meter.wait_for_tick(1.0)


def ranges(annotator: Annotator, pass_name: str) -> dict[str, Mapping[str, Any]]:
    """Return the ranges that were closed since the last call as rows of *pass_name*."""
    return {"ranges": columns(annotator.drain(), pass_name)}


Step = Callable[[], None]
