"""``llmkern report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmkern.commands import CONTEXT, common
from llmkern.commands.common import Wanted, show_report


@click.command("report", context_settings=CONTEXT)
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@common.top
@common.as_json
@common.csv
@common.html
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="With --html: say why RUN costs more or less than this run."
)
@common.gpu
@common.debug
def command(run_folder: Path, page: Path | None, baseline: Path | None, debug: bool, **how: Any) -> None:
    """Print the report of run folder RUN again, or write it as JSON, CSV or an HTML page."""
    if baseline is not None and page is None:
        raise click.UsageError("--baseline needs --html FILE; to compare in the terminal, use 'llmkern diff'.")
    show_report(run_folder, Wanted(page=page, baseline=baseline, **how))
