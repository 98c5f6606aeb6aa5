"""The command line: ``llmkern trace | report | diff | export | import | doctor | models``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from llmkern import __version__
from llmkern.errors import LlmkernError

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
INTERNAL_ERROR = 70


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="llmkern")
def cli() -> None:
    """Where each joule of an LLM inference run goes: which kernel, or which idle gap between kernels."""


_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON (docs/json.md) instead.")
_TOP = click.option("--top", type=click.IntRange(1), default=8, show_default=True, help="Rows in the longer tables.")
_DEBUG = click.option("--debug", is_flag=True, help="Show a traceback when something unforeseen goes wrong.")


@cli.command(context_settings=_CONTEXT)
@click.option("--model", required=True, help="Registry name (see 'llmkern models'), Hugging Face id or local path.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16", "int8", "int4"]),
    default="bf16",
    show_default=True,
    help="int8: bitsandbytes LLM.int8(); int4: bitsandbytes NF4.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cuda[:N]|cpu", help="Where to run.")
@click.option(
    "--engine",
    type=click.Choice(["eager", "graph"]),
    default="eager",
    show_default=True,
    help="graph: every decode step from one captured CUDA graph, with a cache of fixed size.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "hub", "local", "random"]),
    default="auto",
    show_default=True,
    help="auto: hub or local weights if they can be had, else seeded random weights of the true architecture.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Tokens of each prompt.  [default: 512]")
@click.option("--new-tokens", type=click.IntRange(2), default=32, show_default=True, help="Tokens to generate.")
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False, path_type=Path),
    help='JSON lines: {"messages": [...]}, {"prompt": "..."} or a string.',
)
@click.option(
    "--warmup", type=click.IntRange(1), default=5, show_default=True, help="Warm-up generations (short ones)."
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Weighed generations; more where a window would be under 2 s.",
)
@click.option("--trace-repeats", type=click.IntRange(1), default=2, show_default=True, help="Traced generations.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and prompts.")
@click.option(
    "--outliers",
    type=click.IntRange(0),
    default=6,
    show_default=True,
    help="Hidden dimensions with planted outlier features in random weights; 0 removes them.",
)
@click.option("--double-quant", is_flag=True, help="int4: quantize the scales as well.")
@click.option(
    "--int8-threshold",
    type=click.FloatRange(0.0),
    default=6.0,
    show_default=True,
    help="int8: activations above it take the fp16 path; 0 switches that path off.",
)
@click.option("--quick", is_flag=True, help="Leave out the replays: kernels of equal duration then get equal energy.")
@click.option("--no-cache", is_flag=True, help="Replay anew what was replayed on this board before.")
@click.option(
    "--annotate-only",
    is_flag=True,
    help="Record no kernels: for 'nsys profile', which does; weigh energy, emit NVTX ranges and power.",
)
@click.option("--estimate-ram", is_flag=True, help="Add a documented estimate of the host RAM's energy.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run folder to write.  [default: runs/DATE-MODEL-PRECISION]"
)
@click.option("--force", is_flag=True, help="Replace the run folder if it exists.")
@_TOP
@_JSON
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@_DEBUG
def trace(top: int, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Run a model, record its kernels and energy, and print where the joules went."""
    from llmkern.progress import Stages
    from llmkern.workload.models import find_model

    # What can be found wrong at once is not to wait for the libraries.
    find_model(options["model"])
    stages = Stages(quiet=quiet)
    with stages.stage("Starting PyTorch and Transformers"):
        from llmkern.record.options import TraceOptions
        from llmkern.record.session import trace as record
    folder = record(TraceOptions(**options), stages)
    _report(folder, top, as_json)


@cli.command(context_settings=_CONTEXT)
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@_TOP
@_JSON
@click.option("--csv", "csv_folder", type=click.Path(path_type=Path), help="Write every table as CSV to this folder.")
@click.option("--html", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write a self-contained page.")
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="With --html: say why RUN costs more or less than this run."
)
@_DEBUG
def report(run_folder: Path, page: Path | None, baseline: Path | None, debug: bool, **how: Any) -> None:
    """Print the report of run folder RUN again, or write it as JSON, CSV or an HTML page."""
    if baseline is not None and page is None:
        raise click.UsageError("--baseline needs --html FILE; to compare in the terminal, use 'llmkern diff'.")
    _report(run_folder, page=page, baseline=baseline, **how)


@cli.command(context_settings=_CONTEXT)
@click.argument("before", metavar="BEFORE", type=click.Path(path_type=Path))
@click.argument("after", metavar="AFTER", type=click.Path(path_type=Path))
@click.option("--against", metavar="FIX", help="Check what the run BEFORE predicted for this fix (graph, ...).")
@_TOP
@_JSON
@click.option("--csv", "csv_folder", type=click.Path(path_type=Path), help="Write every table as CSV to this folder.")
@_DEBUG
def diff(
    before: Path, after: Path, against: str | None, top: int, as_json: bool, csv_folder: Path | None, debug: bool
) -> None:
    """Say where the difference per token between two runs went: which kernels, which gaps, which modules."""
    from llmkern.attribute.attribution import attribute
    from llmkern.explain.compare import compare
    from llmkern.report.difference import print_difference
    from llmkern.report.document import difference_document, echo
    from llmkern.report.tables import difference_tables, write_csv
    from llmkern.run import RunFolder

    first, second = (attribute(RunFolder(path)) for path in (before, after))
    differences = compare(first, second, against)
    if csv_folder is not None:
        write_csv(difference_tables(differences), csv_folder)
    if as_json:
        echo(difference_document(first, second, differences))
    else:
        print_difference(first, second, differences, _console(), top)


@cli.command(context_settings=_CONTEXT)
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["nsys", "perfetto", "parquet", "csv"]),
    required=True,
    help="nsys: SQLite in the schema of Nsight Systems' exports; perfetto: gzipped JSON for ui.perfetto.dev.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="File or folder to write.  [default: RUN-FORMAT beside RUN]"
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@click.option(
    "--pass", "pass_name", type=click.Choice(["calls", "time"]), help="Only this pass.  [default: both, as recorded]"
)
@click.option("--phase", type=click.Choice(["prefill", "decode"]), help="Only this phase.")
@click.option("--tokens", metavar="A:B", help="Only these token steps.")
@click.option(
    "--merge",
    metavar="CAPTURE.nsys-rep",
    type=click.Path(path_type=Path),
    help="nsys: a native report with this capture in it; so is one whose --out ends in .nsys-rep.",
)
@_DEBUG
def export(
    run_folder: Path,
    to: str,
    out: Path | None,
    force: bool,
    pass_name: str | None,
    phase: str | None,
    tokens: str | None,
    merge: Path | None,
    debug: bool,
) -> None:
    """Write RUN for another tool: kernels and gaps with their joules, host calls, ranges, power."""
    from llmkern.exchange.exporting import export_run, parse_tokens
    from llmkern.exchange.overlay import PASSES

    written = export_run(
        run_folder,
        to,
        out,
        passes=PASSES if pass_name is None else (pass_name,),
        phase=phase,
        tokens=None if tokens is None else parse_tokens(tokens),
        merge=merge,
        force=force,
    )
    size = sum(f.stat().st_size for f in ([written] if written.is_file() else written.iterdir()))
    click.echo(f"Wrote {written} ({size / 2**20:.1f} MiB).", err=True)


@cli.command("import", context_settings=_CONTEXT)
@click.argument("capture", metavar="CAPTURE", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Run folder to write.  [default: runs/CAPTURE]")
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
@_TOP
@_JSON
@_DEBUG
def import_(
    capture: Path,
    out: Path | None,
    force: bool,
    energy: Path | None,
    phases: tuple[str, ...],
    top: int,
    as_json: bool,
    debug: bool,
) -> None:
    """Make a run folder of CAPTURE, an SQLite export of Nsight Systems or a trace of torch.profiler, and report it."""
    from llmkern.exchange.importing import import_capture

    names = {name: phase or name for name, _, phase in (text.partition("=") for text in phases)}
    folder = out or Path("runs") / capture.name.split(".")[0]
    _report(import_capture(capture, folder, energy=energy, phases=names, force=force).path, top, as_json)


@cli.command(context_settings=_CONTEXT)
@_JSON
@_DEBUG
def doctor(as_json: bool, debug: bool) -> None:
    """Say what works on this machine and what to do about the rest."""
    from llmkern.doctor import examine, print_findings

    found = examine()
    if as_json:
        from dataclasses import asdict

        from llmkern.report.document import SCHEMA, echo

        echo({"schema": SCHEMA, "document": "doctor", "findings": [asdict(finding) for finding in found]})
    else:
        print_findings(found, _console())


@cli.command(context_settings=_CONTEXT)
@_JSON
def models(as_json: bool) -> None:
    """List the models that --model knows by name."""
    from rich.table import Table

    from llmkern.workload.models import REGISTRY

    if as_json:
        from llmkern.report.document import SCHEMA, echo

        rows = [
            {"name": s.name, "parameters": s.parameters, "hub_id": s.hub_id, "aliases": list(s.aliases)}
            for s in REGISTRY.values()
        ]
        echo({"schema": SCHEMA, "document": "models", "models": rows})
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "parameters", "Hugging Face id", "also called"):
        table.add_column(title, justify="right" if title == "parameters" else "left")
    for spec in REGISTRY.values():
        table.add_row(spec.name, f"{spec.parameters / 1e9:.2f} B", spec.hub_id or "–", ", ".join(spec.aliases))
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    # A pipe has no width of its own; 100 columns keep the tables readable in a file.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(width=width)


def _report(
    folder: Path,
    top: int,
    as_json: bool,
    csv_folder: Path | None = None,
    page: Path | None = None,
    baseline: Path | None = None,
) -> None:
    from llmkern.attribute.attribution import attribute
    from llmkern.explain import Explanation
    from llmkern.report.doubts import doubts
    from llmkern.run import RunFolder, write_table

    run = RunFolder(folder)
    explanation = Explanation(attribute(run))
    frame = explanation.attribution.frame
    if run.complete:
        write_table(run.path, "attribution", {c: frame[c] for c in frame.columns})
    uncertain = doubts(run, explanation.attribution)
    if csv_folder is not None:
        from llmkern.report.tables import run_tables, write_csv

        write_csv(run_tables(explanation), csv_folder)
    if page is not None:
        from llmkern.report.html import write_page
        from llmkern.report.terminal import books

        other = attribute(RunFolder(baseline)) if baseline is not None else None
        write_page(explanation, uncertain, books(run, explanation.attribution), page, other)
        click.echo(f"Wrote {page} ({page.stat().st_size / 2**20:.1f} MiB).", err=True)
        if not as_json:
            return
    if as_json:
        from llmkern.report.document import echo, report_document

        echo(report_document(explanation, uncertain))
        return
    from llmkern.report.terminal import print_report

    print_report(explanation, uncertain, _console(), top)


def run(command: click.Command, program: str) -> None:
    """Run *command* and leave the process: 0 when it worked, else a sentence on stderr and the error's exit code."""
    # Libraries talk on stdout and stderr while they load; the report should stand alone.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        command.main(prog_name=program, standalone_mode=False)
    except LlmkernError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; what was recorded until then is in the run folder.", 130)
    except BrokenPipeError:
        # The reader of our output has gone (head, less): that is no fault of the run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        kind = type(error).__name__
        _fail(
            f"something unforeseen went wrong ({kind}: {error}). This is a fault of llmkern: run the command again "
            "with --debug and report what it prints.",
            INTERNAL_ERROR,
        )
    sys.exit(0)


def _fail(message: str, code: int) -> None:
    click.echo(f"llmkern: {message}", err=True)
    sys.exit(code)


def main() -> None:
    """Run the command ``llmkern``."""
    run(cli, "llmkern")
