"""``llmkern collect``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmkern.commands import CONTEXT, common
from llmkern.errors import UsageError


@click.command("collect", context_settings=CONTEXT)
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@common.out("Write page, figures (SVG, PNG) and tables (CSV, Parquet) to this folder.")
@click.option("--title", default="Runs together", show_default=True, help="Of the page.")
@common.debug
def command(folders: tuple[Path, ...], out: Path | None, title: str, debug: bool) -> None:
    """Put many runs into one frame and say what they say together; FOLDERs are runs, studies or folders of runs."""
    collected(list(folders), out, lambda text: click.echo(text, err=True), title)


def collected(folders: list[Path], out: Path | None, say: Callable[[str], Any], title: str = "") -> None:
    """Print what the runs in *folders* say, and write page, figures and tables into *out* (None: nothing)."""
    with common.importing():
        from llmkern.report.study import print_study, write_study
        from llmkern.study.collect import collect
        from llmkern.study.execute import STATE, open_study
        from llmkern.study.statement import state

    failed: dict[str, str] = {}
    for folder in folders:
        if (folder / STATE).is_file():
            study = open_study(folder)
            title = study.title or title
            failed |= study.failed
    if out is not None:
        _check(out)
    collection = collect(folders)
    failed = {name: reason for name, reason in failed.items() if name not in {r.folder.name for r in collection.runs}}
    if not collection.runs:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(collection.left_out.items())[:3])
        raise UsageError(f"none of the runs in {', '.join(map(str, folders))} can be compared ({told}).")
    statement = state(collection, title, failed)
    # The answer first: it stands whatever becomes of the files.
    print_study(statement, common.console())
    if out is not None:
        files = write_study(statement, out)
        say(f"Wrote {files[0]}, {len(statement.figures)} figures and the tables beside it.")


def _check(out: Path) -> None:
    """Refuse a folder that holds what a study has not; raises UsageError."""
    from llmkern.study.execute import LOCK, LOGS, PROMPTS, RUNS, STATE

    if not out.parts:
        raise UsageError("--out is empty, which would be the current folder: give the name of something new.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a folder with --out.")
    ours = {STATE, RUNS, LOGS, PROMPTS, LOCK, "study.html", "numbers.parquet", "tables", "figures"}
    other = next((e.name for e in out.iterdir() if e.name not in ours), None) if out.exists() else None
    if other is not None:
        raise UsageError(f"{out} holds {other}, which no study writes: give a new folder with --out.")
