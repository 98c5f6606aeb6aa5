"""``llmkern trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmkern.commands import CONTEXT, common
from llmkern.commands.common import Wanted
from llmkern.runfolder.vocabulary import ENGINES, FUSED, PRECISIONS, WEIGHTS


@click.command("trace", context_settings=CONTEXT)
@click.option("--model", required=True, help="Registry name (see 'llmkern models'), Hugging Face id or local path.")
@click.option(
    "--precision",
    type=click.Choice([*PRECISIONS, *FUSED]),
    default="bf16",
    show_default=True,
    help="int8: bitsandbytes LLM.int8(); int4: bitsandbytes NF4; int8-fused and int4-fused: with --engine fused.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cuda[:N]|cpu", help="Where to run.")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="eager",
    show_default=True,
    help="graph: every decode step from one captured CUDA graph, with a cache of fixed size; fused: the same over "
    "llmkern's own kernels, seven launches a layer, no host in the loop.",
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="auto",
    show_default=True,
    help="auto: hub or local weights if they can be had, else seeded random weights of the true architecture.",
)
@click.option("--batch", type=click.IntRange(1, 65536), default=1, show_default=True, help="Sequences at once.")
@click.option("--prompt-tokens", type=click.IntRange(1, 2**24), help="Tokens of each prompt.  [default: 512]")
@click.option("--new-tokens", type=click.IntRange(2, 2**24), default=32, show_default=True, help="Tokens to generate.")
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False, path_type=Path),
    help='JSON lines: {"messages": [...]}, {"prompt": "..."}, {"tokens": N} or a string; as many as --batch are used; '
    '"output_tokens": how long an answer was.',
)
@click.option(
    "--warmup", type=click.IntRange(1, 10**6), default=5, show_default=True, help="Warm-up generations (short ones)."
)
@click.option(
    "--repeats",
    type=click.IntRange(1, 10**6),
    help="Weighed generations (10, or 6 of more than 3 s); more where a window would be under 2 s.",
)
@click.option("--trace-repeats", type=click.IntRange(1, 10**6), help="Traced generations (2, or 1 of more than 4 s).")
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of random weights and prompts."
)
@click.option(
    "--outliers",
    type=click.IntRange(0, 2**24),
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
@click.option(
    "--cudnn-attention/--no-cudnn-attention",
    default=True,
    help="Whether PyTorch may choose cuDNN's attention, which plans for every new length.  [default: it may]",
)
@click.option("--quick", is_flag=True, help="Leave out the replays: kernels of equal duration then get equal energy.")
@click.option("--no-cache", is_flag=True, help="Replay anew what was replayed on this board before.")
@click.option(
    "--annotate-only",
    is_flag=True,
    help="Record no kernels: for 'nsys profile', which does; weigh energy, emit NVTX ranges and power.",
)
@click.option("--weigh-only", is_flag=True, help="Record no kernels: latency and energy of each phase only.")
@click.option(
    "--unweighed-window-s",
    type=click.FloatRange(0.0, 3600.0),
    metavar="SECONDS",
    help="Shortest window where no energy can be read.  [default: 2 s, as with energy]",
)
@click.option("--estimate-ram", is_flag=True, help="Add a documented estimate of the host RAM's energy.")
@common.out("Run folder to write.  [default: runs/DATE-MODEL-PRECISION]")
@click.option("--force", is_flag=True, help="Replace the run folder if it exists, once the new run is complete.")
@common.top
@common.as_json
@common.html
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@common.debug
def command(top: int, as_json: bool, page: Path | None, quiet: bool, debug: bool, **options: Any) -> None:
    """Run a model, record its kernels and energy, and print where the joules went.

    The run is recorded beside the run folder (RUN.partial) and put in its place when it is complete.
    """
    from llmkern.commands.common import check_wanted, show_report
    from llmkern.progress import Stages
    from llmkern.workload.models import find_model

    # What can be found wrong at once is not to wait for the libraries.
    find_model(options["model"])
    if options["precision"] in FUSED:
        options |= {"precision": FUSED[options["precision"]], "engine": "fused"}
    wanted = Wanted(top, as_json, page=page)
    if page is not None:
        check_wanted(options["out"] or Path("runs"), wanted)
    stages = Stages(quiet=quiet)
    with stages.stage("Starting PyTorch and Transformers"):
        from llmkern.record.options import TraceOptions
        from llmkern.session import trace as record
    show_report(record(TraceOptions(**options), stages), wanted)
