"""``llmkern export``."""

from __future__ import annotations

from pathlib import Path

import click

from llmkern.commands import CONTEXT, common
from llmkern.runfolder.vocabulary import TRACED


@click.command("export", context_settings=CONTEXT)
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["nsys", "perfetto", "parquet", "csv"]),
    required=True,
    help="nsys: SQLite in the schema of Nsight Systems' exports; perfetto: gzipped JSON for ui.perfetto.dev.",
)
@common.out("File or folder to write.  [default: RUN-FORMAT beside RUN]")
@click.option("--force", is_flag=True, help="Replace what llmkern wrote there before.")
@click.option("--pass", "pass_name", type=click.Choice(TRACED), help="Only this pass.  [default: both, as recorded]")
@click.option("--phase", help="Only this phase: prefill, decode, or what a capture's is called.")
@click.option("--tokens", metavar="A:B", help="Only these token steps.")
@click.option(
    "--merge",
    metavar="CAPTURE.nsys-rep",
    type=click.Path(path_type=Path),
    help="nsys: a native report with this capture in it; so is one whose --out ends in .nsys-rep.",
)
@common.gpu
@common.debug
def command(
    run_folder: Path,
    to: str,
    out: Path | None,
    force: bool,
    pass_name: str | None,
    phase: str | None,
    tokens: str | None,
    merge: Path | None,
    gpu: int | None,
    debug: bool,
) -> None:
    """Write RUN for another tool: kernels and gaps with their joules, host calls, ranges, power."""
    from llmkern.exchange.exporting import Request, export_run, parse_tokens

    request = Request(
        TRACED if pass_name is None else (pass_name,), phase, None if tokens is None else parse_tokens(tokens), gpu
    )
    written = export_run(run_folder, to, out, request, merge=merge, force=force)
    size = sum(f.stat().st_size for f in ([written] if written.is_file() else written.iterdir()))
    click.echo(f"Wrote {written} ({size / 2**20:.1f} MiB).", err=True)
