"""The runs under tests/data, recorded on an H100 and cut to a prefill and a few decoded tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from llmkern.attribute.attribution import Attribution, attribute
from llmkern.runfolder import RunFolder

DATA = Path(__file__).parent / "data"


def recorded_run(name: str) -> RunFolder:
    """Return the recorded run *name* (int8, int4, bf16-operators, bf16: that one without operators)."""
    return RunFolder(DATA / f"h100-qwen-7b-{name}")


@cache
def recorded(name: str) -> Attribution:
    """Return the attribution of the recorded run *name*."""
    return attribute(recorded_run(name))
