"""``llmkern diff``."""

from __future__ import annotations

from pathlib import Path

import click

from llmkern.commands import CONTEXT, common


@click.command("diff", context_settings=CONTEXT)
@click.argument("before", metavar="BEFORE", type=click.Path(path_type=Path))
@click.argument("after", metavar="AFTER", type=click.Path(path_type=Path))
@click.option("--against", metavar="FIX", help="Check what the run BEFORE predicted for this fix (graph, ...).")
@common.top
@common.as_json
@common.csv
@common.debug
def command(
    before: Path, after: Path, against: str | None, top: int, as_json: bool, csv_folder: Path | None, debug: bool
) -> None:
    """Say where the difference per token between two runs went: which kernels, which gaps, which modules."""
    with common.importing():
        from llmkern.attribute.attribution import attribute
        from llmkern.explain.compare import compare
        from llmkern.report.difference import print_difference
    from llmkern.report.document import difference_document, echo, run_facts
    from llmkern.report.records import check_csv_folder, difference_tables, write_csv
    from llmkern.runfolder import RunFolder
    from llmkern.runfolder.place import check_output

    if csv_folder is not None:
        check_output(csv_folder, [before, after], "--csv")
        check_csv_folder(csv_folder)
    runs = [RunFolder(path) for path in (before, after)]
    first, second = (attribute(run) for run in runs)
    differences = compare(first, second, against)
    if csv_folder is not None:
        write_csv(difference_tables(differences), csv_folder)
    if as_json:
        told = [run_facts(run.facts, str(run.path), run.status) for run in runs]
        echo(difference_document(told[0], told[1], differences))
    else:
        print_difference(runs[0].facts, runs[1].facts, differences, common.console(), top)
