"""``llmkern macro``."""

from __future__ import annotations

from pathlib import Path

import click

from llmkern.commands import CONTEXT, common


@click.command("macro", context_settings=CONTEXT)
@click.argument("before", metavar="BEFORE", type=click.Path(path_type=Path))
@click.argument("after", metavar="AFTER", type=click.Path(path_type=Path))
@click.option(
    "--requests-per-day", type=click.FloatRange(0, 1e15, min_open=True), required=True, help="How many a day has."
)
@click.option(
    "--household-kwh",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=11.7,
    show_default=True,
    help="What a household uses a day; the study's figure, or your country's.",
)
@click.option(
    "--co2-g-per-kwh",
    type=click.FloatRange(0, 1e5),
    help="Grams of CO2 per kWh of your grid; without it there are none.",
)
@common.as_json
@common.debug
def command(
    before: Path,
    after: Path,
    requests_per_day: float,
    household_kwh: float,
    co2_g_per_kwh: float | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Say what a day of requests takes by each of two runs, and what the second saves: kWh, households, kg of CO2."""
    with common.importing():
        from llmkern.report.macro import macro_document, print_macro
        from llmkern.runfolder import RunFolder
        from llmkern.study.collect import read_run
        from llmkern.study.macro import macro

    found = macro(
        read_run(RunFolder(before)), read_run(RunFolder(after)), requests_per_day, household_kwh, co2_g_per_kwh
    )
    if as_json:
        from llmkern.report.document import echo

        echo(macro_document(found))
    else:
        print_macro(found, common.console())
