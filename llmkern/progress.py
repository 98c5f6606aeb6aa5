"""Progress bars on stderr, so that stdout holds the report alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stages:
    """Shows one bar per stage of a run; without a terminal one line per stage instead."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console or Console(stderr=True)
        self._quiet = quiet

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Show *title* with *total* steps (None: unknown) and yield the function that takes one step."""
        if self._quiet:
            yield lambda: None
            return
        if not self._console.is_terminal:
            self._console.print(f"{title} …", highlight=False)
            yield lambda: None
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        ) as progress:
            task = progress.add_task(title, total=total)
            yield lambda: progress.advance(task)
            progress.update(task, total=progress.tasks[0].completed or 1, completed=progress.tasks[0].completed or 1)
