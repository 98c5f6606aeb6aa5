"""``llmkern evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmkern.commands import CONTEXT, common
from llmkern.errors import UsageError

FORMATS = ("int8", "nf4", "int4")


def _numbers(_context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and 1 <= int(part) <= 4096 for part in parts):
        raise click.BadParameter(f"{text!r} must be numbers from 1 to 4096, separated by commas.", param=parameter)
    return tuple(dict.fromkeys(map(int, parts)))


def _formats(_context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts or set(parts) - set(FORMATS):
        raise click.BadParameter(f"{text!r} must be of {', '.join(FORMATS)}, separated by commas.", param=parameter)
    return parts


@click.command("evaluate", context_settings=CONTEXT)
@click.argument("candidates", nargs=-1, metavar="[[NAME=]CANDIDATE]...")
@click.option(
    "--format", "formats", default="int8", show_default=True, callback=_formats, help="int8, nf4, int4, or several."
)
@click.option(
    "--shapes", default="qwen-7b", show_default=True, help="Models, whose linear layers are taken, or sizes as NxK."
)
@click.option("--batch", default="1,8,32", show_default=True, callback=_numbers, help="Tokens per call (M).")
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), default=None, help="Of x and y.  [default: bf16]")
@click.option(
    "--group",
    type=click.Choice(["64", "128"]),
    default="64",
    show_default=True,
    help="Weights per scale of int4 and NF4.",
)
@click.option("--energy/--no-energy", default=True, help="Joules per call, about 7 s per case.  [default: energy]")
@click.option("--peers/--no-peers", default=True, help="Our kernels, cuBLAS, bitsandbytes, …  [default: peers]")
@click.option(
    "--in-model", metavar="MODEL", help="Also put the candidates into this model and time decode. Needs one --format."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights and activations.")
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    help="Seconds after which a candidate's process is ended.",
)
@click.option(
    "--baseline", type=click.Path(dir_okay=False, path_type=Path), help="What --json printed earlier, to compare with."
)
@click.option(
    "--fail-above",
    callback=common.percentage,
    metavar="PERCENT",
    help="Exit with 1 if a candidate is that much slower than it.",
)
@common.as_json
@common.csv
@common.html
@common.debug
def command(
    candidates: tuple[str, ...],
    baseline: Path | None,
    fail_above: float | None,
    as_json: bool,
    csv_folder: Path | None,
    page: Path | None,
    debug: bool,
    **asked: Any,
) -> None:
    """Say of a kernel whether it is right, how fast with cold weights, and what a call costs in joules.

    A CANDIDATE is MODULE:FUNCTION, FILE.py:FUNCTION (a Python function of x, weight and bias, which may launch a Triton
    kernel) or FILE.cu with a declared signature; docs/write-a-kernel.md has one of each. Without a candidate, llmkern's
    own kernels and their peers are evaluated. Exit code 1: a candidate is wrong, or slower than --fail-above allows.
    """
    from llmkern.evaluate.document import RegressionError, check_baseline, document, read_baseline
    from llmkern.evaluate.request import evaluated
    from llmkern.evaluate.verdict import state
    from llmkern.report import evaluation as report

    if fail_above is not None and baseline is None:
        raise UsageError("--fail-above needs --baseline FILE, what an earlier 'llmkern evaluate --json' printed.")
    before = None if baseline is None else read_baseline(baseline)
    report.check_targets(csv_folder, page)
    statement = state(evaluated(candidates, **asked))
    if csv_folder is not None:
        report.write_csv_folder(statement, csv_folder)
    if page is not None:
        report.write_evaluation_page(statement, page)
        click.echo(f"Wrote {page} ({page.stat().st_size / 2**20:.1f} MiB).", err=True)
    if as_json:
        from llmkern.report.document import echo

        echo(document(statement))
    else:
        report.print_evaluation(statement, common.console())
    if before is not None:
        for sentence in check_baseline(statement, before, float("inf") if fail_above is None else fail_above):
            click.echo(sentence, err=as_json)
    wrong = [verdict.name for verdict in statement.verdicts if not verdict.right]
    if wrong:
        raise RegressionError(f"{', '.join(wrong)} did not pass; the first lines of the report say why.")
