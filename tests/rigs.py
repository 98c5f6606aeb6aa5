"""Rigs for passes that are tried alone: everything that a test does not give stands still."""

from __future__ import annotations

from typing import Any

from llmkern.progress import Stages
from llmkern.record.annotate import Annotator
from llmkern.record.clock import ClockWatch
from llmkern.record.options import TraceOptions
from llmkern.record.rig import Rig


class Silence:
    """A generation that only has an annotator."""

    def __init__(self) -> None:
        self.annotator = Annotator()


def made_rig(**parts: Any) -> Rig:
    """Return a rig of *parts*; the others do nothing."""
    rest: dict[str, Any] = {
        "device": None,
        "meters": (),
        "generation": Silence(),
        "model": None,
        "writer": None,
        "stages": Stages(quiet=True),
        "options": TraceOptions("qwen-tiny"),
        "clock": ClockWatch(),
    }
    return Rig(**{**rest, **parts})
