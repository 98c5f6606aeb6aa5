"""The run folder, the only thing that the recording half and the analysing half share."""

from __future__ import annotations

from llmkern.runfolder.reader import RunFolder
from llmkern.runfolder.writer import RunWriter

__all__ = ["RunFolder", "RunWriter"]
