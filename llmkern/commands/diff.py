"""``llmkern diff``."""

from __future__ import annotations

from pathlib import Path

import click

from llmkern.commands import CONTEXT, common
from llmkern.errors import UsageError


@click.command("diff", context_settings=CONTEXT)
@click.argument("before", metavar="BEFORE", type=click.Path(path_type=Path))
@click.argument("others", metavar="AFTER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", metavar="FIX", help="Check what the run BEFORE predicted for this fix (graph, ...).")
@click.option(
    "--fail-above",
    callback=common.percentage,
    metavar="PERCENT",
    help="Exit with 1 if a phase takes that much more energy (time, without energy) than BEFORE, outside the noise.",
)
@common.top
@common.as_json
@common.csv
@common.html
@common.debug
def command(
    before: Path,
    others: tuple[Path, ...],
    against: str | None,
    fail_above: float | None,
    top: int,
    as_json: bool,
    csv_folder: Path | None,
    page: Path | None,
    debug: bool,
) -> None:
    """Say where the difference per token between two runs went: which kernels, which gaps, which modules.

    With several AFTER each is one line per phase beside BEFORE: by how much it differs, and whether that is outside the
    noise.
    """
    with common.importing():
        from llmkern.attribute.attribution import attribute
        from llmkern.explain.compare import Difference, compare
        from llmkern.explain.versus import ExceededError, versus
        from llmkern.report.difference import print_difference
    from llmkern.report import comparison
    from llmkern.report.document import difference_document, echo, run_facts
    from llmkern.report.records import check_csv_folder, difference_tables, write_csv
    from llmkern.runfolder import RunFolder
    from llmkern.runfolder.place import check_output

    paths = [before, *others]
    for target, option in ((csv_folder, "--csv"), (page, "--html")):
        if target is not None:
            check_output(target, paths, option)
    if csv_folder is not None:
        check_csv_folder(csv_folder)
    if page is not None:
        comparison.check_page(page)
    if against is not None and len(others) > 1:
        raise UsageError(f"--against {against} holds one run against a prediction: give one AFTER, not {len(others)}.")
    runs = [RunFolder(path) for path in paths]
    first, *rest = [attribute(run) for run in runs]
    lines = versus(first, rest)
    timelines = set(first.accounts)
    differences: list[list[Difference]] = [
        compare(first, one, against) if against is not None or timelines & set(one.accounts) else [] for one in rest
    ]
    names = [str(path) for path in paths]
    if csv_folder is not None:
        tables = difference_tables(differences[0]) if len(others) == 1 and differences[0] else {}
        write_csv({**tables, "versus": comparison.versus_table(names, lines)}, csv_folder)
    if page is not None:
        comparison.write_page(comparison.page([run.facts for run in runs], names, lines, differences), page)
        click.echo(f"Wrote {page} ({page.stat().st_size / 2**20:.1f} MiB).", err=True)
    if as_json:
        told = [run_facts(run.facts, str(run.path), run.status) for run in runs]
        echo(difference_document(told, differences, comparison.versus_facts(names, lines)))
    elif len(others) == 1 and differences[0]:
        print_difference(runs[0].facts, runs[1].facts, differences[0], common.console(), top)
    else:
        comparison.print_versus([run.facts for run in runs], names, lines, common.console())
    exceeded = [line for line in lines if fail_above is not None and line.exceeds(fail_above)]
    if exceeded:
        said = "; ".join(f"{names[line.run]}: {line.phase} takes {line.verdict}" for line in exceeded)
        raise ExceededError(f"above the limit of {100 * (fail_above or 0):g}%: {said}.")
