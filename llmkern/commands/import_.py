"""``llmkern import``."""

from __future__ import annotations

from pathlib import Path

import click

from llmkern.commands import CONTEXT, common
from llmkern.commands.common import Wanted, show_report


@click.command("import", context_settings=CONTEXT)
@click.argument("captures", metavar="CAPTURE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@common.out("Run folder to write.  [default: runs/CAPTURE]")
@click.option("--force", is_flag=True, help="Replace the run folder if it exists.")
@click.option(
    "--energy", metavar="RUN", type=click.Path(path_type=Path), help="Give the kernels the joules of this weighed run."
)
@click.option(
    "--phase",
    "phases",
    metavar="NAME[=PHASE]",
    multiple=True,
    help="Ranges of this name are one unit of a phase.  [default: those called prefill or decode]",
)
@common.top
@common.as_json
@common.debug
def command(
    captures: tuple[Path, ...],
    out: Path | None,
    force: bool,
    energy: Path | None,
    phases: tuple[str, ...],
    top: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Make a run folder of CAPTURE, an SQLite export of Nsight Systems or a trace of torch.profiler, and report it.

    Several are the files of one job, one for each rank: they become the devices of one run.
    """
    from llmkern.exchange.importing import default_folder, import_capture

    folder = out if out is not None else default_folder(captures[0], energy)
    run = import_capture(captures, folder, energy=energy, phases=phases, force=force)
    show_report(run.path, Wanted(top, as_json))
