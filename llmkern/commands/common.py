"""Options that several commands have, and how a report leaves the process."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (docs/json.md) instead.")
top = click.option("--top", type=click.IntRange(1), default=8, show_default=True, help="Rows in the longer tables.")
debug = click.option("--debug", is_flag=True, help="Show a traceback when something unforeseen goes wrong.")
csv = click.option(
    "--csv", "csv_folder", type=click.Path(path_type=Path), help="Write every table as CSV to this folder."
)
html = click.option(
    "--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write a self-contained page."
)


gpu = click.option(
    "--gpu", type=click.IntRange(0), metavar="N", help="Of a capture of several devices: the account of this one."
)


def percentage(_context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """Return a percentage that an option was given as a share."""
    if text is None:
        return None
    try:
        value = float(text.rstrip("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise click.BadParameter(f"{text!r} must be a percentage of 0 or more, as in 3%.", param=parameter)
    return value


def out(what: str) -> Any:
    """Return the option for where *what* is written."""
    return click.option("--out", "-o", type=click.Path(path_type=Path), help=what)


@dataclass(frozen=True)
class Wanted:
    """What of a report is wanted: *top* rows or JSON, tables in *csv_folder*, a *page* against a *baseline*.

    *gpu* is the device of several that it is of.
    """

    top: int = 8
    as_json: bool = False
    csv_folder: Path | None = None
    page: Path | None = None
    gpu: int | None = None
    baseline: Path | None = None


def console() -> Any:
    """Return the console of a report; a pipe has no width of its own, 100 columns keep tables readable in a file."""
    from llmkern.report.console import PlainConsole

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return PlainConsole(width=width)


def check_wanted(folder: Path, wanted: Wanted) -> None:
    """Refuse a page or tables where they may not be written; raises UsageError."""
    from llmkern.runfolder.place import check_file_target, check_output

    if wanted.page is not None:
        from llmkern.report.html import is_page

        check_output(wanted.page, [folder, wanted.baseline], "--html")
        check_file_target(wanted.page, is_page, force=True, option="--html")
    if wanted.csv_folder is not None:
        from llmkern.report.records import check_csv_folder

        check_output(wanted.csv_folder, [folder, wanted.baseline], "--csv")
        check_csv_folder(wanted.csv_folder)


@contextmanager
def importing() -> Iterator[None]:
    """Import what reads runs, without the garbage collector, now and later: modules are a hundred thousand objects.

    Matrices of a hundred unknowns are no work for a second thread of BLAS, which would spin between them.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _show_served(folder: Path, wanted: Wanted) -> None:
    """Print or write what is to be said of a run that served requests."""
    from llmkern.report.serve import print_serve, serve_document
    from llmkern.serve.statement import state

    statement = state([folder], {})
    if wanted.page is not None and statement.arrivals:
        from llmkern.report.serve_page import write_serve_page

        write_serve_page(statement, wanted.page)
        click.echo(f"Wrote {wanted.page} ({wanted.page.stat().st_size / 2**20:.1f} MiB).", err=True)
    if wanted.csv_folder is not None and statement.arrivals:
        from llmkern.report.records import write_csv

        found = statement.arrivals[0].found
        write_csv({"requests": found.requests, "iterations": found.iterations}, wanted.csv_folder)
    if wanted.as_json:
        from llmkern.report.document import echo

        echo(serve_document(statement))
    elif wanted.page is None:
        print_serve(statement, console())


def show_report(folder: Path, wanted: Wanted) -> None:
    """Print or write the report of run *folder*; nothing is written into it."""
    with importing():
        from llmkern.attribute.attribution import attribute
        from llmkern.explain import Explanation
        from llmkern.explain.statement import state
        from llmkern.runfolder import RunFolder

    run = RunFolder(folder)
    if wanted.gpu is not None:
        run = run.of_device(wanted.gpu)
    check_wanted(run.path, wanted)
    if run.has("requests"):
        _show_served(run.path, wanted)
        return
    explanation = Explanation(attribute(run))
    statement = state(explanation, wanted.top)
    if wanted.page is not None:
        from llmkern.explain.page_data import page_data
        from llmkern.report.html import write_page

        other = attribute(RunFolder(wanted.baseline)) if wanted.baseline is not None else None
        write_page(statement, page_data(explanation, other), wanted.page)
        click.echo(f"Wrote {wanted.page} ({wanted.page.stat().st_size / 2**20:.1f} MiB).", err=True)
    if wanted.csv_folder is not None or wanted.as_json:
        from llmkern.explain.tables import run_tables

        tables = run_tables(explanation)
        if wanted.csv_folder is not None:
            from llmkern.report.records import statement_tables, write_csv

            write_csv({**statement_tables(statement), **tables}, wanted.csv_folder)
        if wanted.as_json:
            from llmkern.report.document import echo, report_document

            echo(report_document(statement, tables))
            return
    if wanted.page is not None:
        return
    from llmkern.report.terminal import print_report

    print_report(statement, console())
