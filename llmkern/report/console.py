"""The console of every report: what comes from models, captures and folders is text there, never markup or control."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from llmkern.text import visible


class PlainConsole(Console):
    """A rich console without markup, emoji codes and highlighting, that shows control characters instead of sending
    them.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **how)

    def on_broken_pipe(self) -> None:
        """Leave it to the command: rich would end the process with 1, and a reader that has enough is no error."""
        raise BrokenPipeError

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the segments of *renderable*; those of rich's own control stay as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
