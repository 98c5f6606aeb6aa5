"""``llmkern serve-study``."""

from __future__ import annotations

import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import click

from llmkern.commands import CONTEXT, common
from llmkern.errors import LlmkernError, UsageError
from llmkern.runfolder.vocabulary import PRECISIONS, WEIGHTS

_PATTERNS = ("sequential", "burst", "uniform:0.05-0.5", "fixed:0.3")


def _lengths(_context: click.Context, parameter: click.Parameter, text: str) -> tuple[float, float, int, int]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None:
        raise click.BadParameter(f"{text!r}: give a number of tokens, or two like 200-4000.", param=parameter)
    low, high = int(found[1]), int(found[2] or found[1])
    if not 1 <= low <= high <= 2**24:
        raise click.BadParameter(f"{text!r}: give at least 1, and the smaller one first.", param=parameter)
    # Log-normal between the two: two sigmas of it lie within.
    return (low * high) ** 0.5, 0.25 * _log(high / low), low, high


def _log(ratio: float) -> float:
    import math

    return math.log(ratio) if ratio > 1 else 0.0


def _gpus(_context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text):
        raise click.BadParameter(f"{text!r}: give numbers that nvidia-smi shows, like 0 or 0,1.", param=parameter)
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _seconds(_context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)", text.strip())
    seconds = float(found[1]) * {"ms": 1e-3, "s": 1.0}[found[2]] if found else 0.0
    if seconds <= 0:
        raise click.BadParameter(f"{text!r}: give a length of time with its unit, like 2s or 300ms.", param=parameter)
    return seconds


def work(options: dict[str, Any], log: str) -> None:
    """Serve one pattern of arrivals and leave the process with its exit code."""
    from llmkern.commands import run

    sys.argv = ["llmkern", "serve-study", "--arrivals", options["arrivals"], "--model", options["trace"]["model"]]

    @click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def record() -> None:
        from llmkern.progress import Stages
        from llmkern.record.options import TraceOptions
        from llmkern.serve.session import ServeOptions, serve
        from llmkern.study.plan import Lengths

        trace = TraceOptions(**options.pop("trace"), out=options.pop("out"), force=options.pop("force"))
        prompts, answers = (Lengths(*options.pop(name)) for name in ("prompts", "answers"))
        url, gpus, start = (options.pop(name) for name in ("url", "gpus", "start"))
        asked = ServeOptions(trace=trace, prompts=prompts, answers=answers, **options)
        if url is None:
            click.echo(f"recorded {serve(asked, Stages(quiet=True))}")
            return
        from llmkern.serve.by_url import Asked, serve_by_url
        from llmkern.serve.remote import Address

        server = Asked(Address(url, trace.model, os.environ.get("OPENAI_API_KEY", "none")), gpus, start)
        click.echo(f"recorded {serve_by_url(asked, server, Stages(quiet=True))}")

    run(record, "llmkern serve-study")


@click.command("serve-study", context_settings=CONTEXT)
@click.option("--model", required=True, help="As for 'llmkern trace'; with --url the name that the server has for it.")
@click.option(
    "--url",
    metavar="URL",
    help="An OpenAI-compatible server (http://host:8000/v1) in the place of one in this process; its key is taken from "
    "OPENAI_API_KEY.",
)
@click.option("--gpu", "gpus", callback=_gpus, metavar="N[,N]", help="With --url: this host's GPUs that it runs on.")
@click.option("--start", metavar="COMMAND", help="With --url: start the server with it, and stop it in the end.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="bf16", show_default=True)
@click.option("--device", default="auto", show_default=True, metavar="auto|cuda[:N]|cpu", help="Where to run.")
@click.option(
    "--cudnn-attention/--no-cudnn-attention",
    default=False,
    help="Whether PyTorch may choose cuDNN's attention, which plans for every new length: a server meets one with "
    "every token.  [default: it may not]",
)
@click.option("--weights", type=click.Choice(WEIGHTS), default="auto", show_default=True)
@click.option(
    "--arrivals",
    multiple=True,
    metavar="PATTERN",
    help="burst, burst:8@2 (8 every 2 s), fixed:0.3, uniform:0.1-0.5, poisson:5 (a second), sequential (each when the "
    f"one before is answered), trace:FILE; several times for several.  [default: {', '.join(_PATTERNS)}]",
)
@click.option("--find-shape", is_flag=True, help="Search the bursts that take least at --rate within --p99-ttft.")
@click.option("--rate", type=click.FloatRange(0, 1e4, min_open=True), help="With --find-shape: requests a second.")
@click.option(
    "--p99-ttft", callback=_seconds, metavar="TIME", help="With --find-shape: how long a first token may take, like 2s."
)
@click.option("--requests", type=click.IntRange(1, 10**6), default=100, show_default=True, help="How many of each.")
@click.option(
    "--prompt-tokens", callback=_lengths, default="200-1000", show_default=True, help="Of a prompt: one, or from-to."
)
@click.option(
    "--new-tokens", callback=_lengths, default="10-200", show_default=True, help="Of an answer: one, or from-to."
)
@click.option("--max-in-flight", type=click.IntRange(1, 10**6), help="Requests that are sent before one is answered.")
@click.option("--max-batch-tokens", type=click.IntRange(1, 2**24), help="Tokens of one iteration.")
@click.option("--max-batch", type=click.IntRange(1, 10**6), help="Requests of one iteration.")
@click.option(
    "--patience-s",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=600.0,
    show_default=True,
    help="Without an answer for so long, what is open is left unanswered.",
)
@click.option(
    "--record-requests",
    type=click.IntRange(0, 10**5),
    default=4,
    show_default=True,
    help="So many come once more with every kernel recorded (not by URL); 0 records none.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="Serve every pattern so often, in rounds of random order: 3 or more say what comes and goes from run to run.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of weights and requests.")
@common.out("Folder of the runs.  [default: serving/MODEL-PRECISION]")
@click.option("--force", is_flag=True, help="Serve patterns again that are there.")
@common.as_json
@common.html
@common.debug
def command(
    model: str,
    arrivals: tuple[str, ...],
    out: Path | None,
    force: bool,
    as_json: bool,
    page: Path | None,
    debug: bool,
    max_batch: int | None,
    find_shape: bool,
    rate: float | None,
    p99_ttft: float | None,
    repeats: int,
    **asked: Any,
) -> None:
    """Serve requests that arrive in different ways, and say what one of them takes: joules, idle joules, waiting.

    The server is Transformers' continuous batching in a process of its own for each pattern. Sum of the requests + idle
    = what the counter moved; a request's joules are its share, by tokens, of every iteration that it was in.
    """
    from llmkern.serve.arrivals import schedule
    from llmkern.workload.models import find_model

    url = asked["url"]
    if url is None:
        find_model(model)
        useless = next((name for name in ("gpus", "start") if asked[name]), None)
        if useless is not None:
            raise UsageError(f"--{useless.removesuffix('s')} is for a server by URL: add --url, or leave it out.")
    elif not re.match(r"https?://[^/]+", url):
        raise UsageError(f"--url {url!r} is no address: give one like http://localhost:8000/v1.")
    patterns = arrivals or _PATTERNS
    if find_shape and (rate is None or p99_ttft is None or arrivals):
        raise UsageError(
            "--find-shape needs --rate and --p99-ttft, and finds the --arrivals by itself: leave them out."
        )
    if find_shape and repeats > 1:
        raise UsageError(f"--find-shape serves every shape once: leave --repeats {repeats} out.")
    if not find_shape and (rate is not None or p99_ttft is not None):
        raise UsageError("--rate and --p99-ttft are for --find-shape: add it, or give --arrivals poisson:RATE.")
    for pattern in patterns:
        # What is mistyped is told before anything is loaded.
        schedule(pattern, [(1, 1)] * asked["requests"], asked["seed"])
    twice = next((pattern for pattern in patterns if patterns.count(pattern) > 1), None)
    if twice is not None:
        raise UsageError(f"--arrivals {twice} is there twice: leave one out.")
    folder = out or Path("serving") / name_of(f"{model}-{asked['precision'] if url is None else 'by-url'}")
    trace = {name: asked[name] for name in ("precision", "device", "weights", "seed", "cudnn_attention")}
    options = {
        name: asked[name] for name in ("requests", "max_in_flight", "max_batch_tokens", "patience_s", "record_requests")
    }
    options |= {name: asked[name] for name in ("url", "gpus", "start")}
    options |= {"prompts": asked["prompt_tokens"], "answers": asked["new_tokens"], "max_requests_per_batch": max_batch}
    everything = {**options, "trace": {"model": model, **trace}}
    everything["asked"] = ", ".join(f"{name} {value}" for name, value in _told(everything).items())
    if find_shape:
        assert rate is not None
        assert p99_ttft is not None
        patterns, said = _search(folder, everything, (rate, p99_ttft), force)
        failed = {}
    else:
        failed, said = _serve_all(folder, _rounds(patterns, repeats, asked["seed"]), everything, force), ""

    with common.importing():
        from llmkern.report.serve import print_serve, serve_document
        from llmkern.serve.statement import state
        from llmkern.study.execute import RUNS
    names = [name_of(p, number) for number in range(1, repeats + 1) for p in patterns]
    statement = state([folder / RUNS / name for name in names if name not in failed], failed)
    if page is not None and statement.arrivals:
        from llmkern.report.serve_page import write_serve_page

        write_serve_page(statement, page)
        click.echo(f"Wrote {page} ({page.stat().st_size / 2**20:.1f} MiB).", err=True)
    if as_json:
        from llmkern.report.document import echo

        echo(serve_document(statement))
    else:
        print_serve(statement, common.console())
        if said:
            click.echo(f"\n{said}")
    if statement.failed:
        what = "patterns" if repeats == 1 else "runs"
        raise LlmkernError(f"{len(statement.failed)} of {len(names)} {what} are not here; the reasons are above.")


def _rounds(patterns: tuple[str, ...], repeats: int, seed: int) -> list[tuple[str, ...]]:
    """Return in which order *patterns* are served in each round: what drifts must not fall on the same ones."""
    if repeats == 1:
        return [patterns]
    generator = random.Random(seed)
    return [tuple(generator.sample(patterns, len(patterns))) for _ in range(repeats)]


def _search(
    folder: Path, options: dict[str, Any], asked: tuple[float, float], force: bool
) -> tuple[tuple[str, ...], str]:
    """Serve shapes until the best is known; return the patterns that were tried, and what is to be said of them."""
    from llmkern.serve.shape import find_shape, told
    from llmkern.serve.statement import read
    from llmkern.study.execute import RUNS

    def measure(pattern: str) -> Any:
        failed = _serve_all(folder, [(pattern,)], options, force)
        if failed:
            raise LlmkernError(f"{pattern} could not be served: {next(iter(failed.values()))}")
        return read(folder / RUNS / name_of(pattern))

    rate, limit_s = asked
    # Fewer than four bursts say nothing of the 99th percentile.
    shapes = find_shape(measure, rate, limit_s, options["requests"] // 4)
    frontier = ", ".join(one.result.pattern for one in shapes if one.on_frontier)
    return tuple(one.result.pattern for one in shapes), f"{told(shapes, rate, limit_s)} Frontier: {frontier}."


def name_of(pattern: str, number: int = 1) -> str:
    """Return *pattern* (or a model's name) as the name of a folder, of its run *number*."""
    name = re.sub(r"[^\w.-]+", "-", pattern).strip("-.") or "arrivals"
    return name if number == 1 else f"{name}.run-{number}"


def _serve_all(folder: Path, rounds: list[tuple[str, ...]], options: dict[str, Any], force: bool) -> dict[str, str]:
    """Serve the patterns of every round that are not there yet, and return why others failed, by names of folders.

    Raises UsageError, before anything is served, where a run is there that is of something else.
    """
    from dataclasses import dataclass

    from llmkern.runfolder import RunFolder
    from llmkern.study.execute import RUNS, held, in_child, why

    @dataclass(frozen=True)
    class Pattern:
        name: str
        options: dict[str, Any]

    failed = {}
    runs = [
        (pattern, number, folder / RUNS / name_of(pattern, number))
        for number, patterns in enumerate(rounds, start=1)
        for pattern in patterns
    ]
    with held(folder):
        there = {target for pattern, _, target in runs if not force and _there(target, options, pattern, RunFolder)}
        for pattern, number, target in runs:
            if target in there:
                click.echo(f"{pattern}: there already, kept.", err=True)
                continue
            click.echo(f"Serving {pattern}{'' if number == 1 else f', run {number}'} …", err=True)
            # What iterations consist of one run says.
            recorded = options["record_requests"] if number == 1 else 0
            task = Pattern(target.name, {**options, "arrivals": pattern, "record_requests": recorded})
            code, log = in_child(folder, task, work)
            if code:
                failed[target.name] = why(log, code)
    return failed


def _told(options: dict[str, Any]) -> dict[str, Any]:
    """Return by name all that a run must have been asked for to be one of these; what it records is none of it."""
    trace = options["trace"]
    lengths = {name: "-".join(map(str, options[key][2:])) for name, key in (("prompts", "prompts"), ("new", "answers"))}
    limits = {
        name: options[key]
        for name, key in (
            ("in flight", "max_in_flight"),
            ("batch tokens", "max_batch_tokens"),
            ("batch", "max_requests_per_batch"),
        )
        if options[key] is not None
    }
    found = {"model": trace["model"], "requests": options["requests"], **lengths, "seed": trace["seed"], **limits}
    if options["url"] is not None:
        return {**found, "server": options["url"].rpartition("@")[2]}
    found |= {"precision": trace["precision"], "weights": trace["weights"]}
    return {**found, "cuDNN's attention": "yes" if trace["cudnn_attention"] else "no"}


def _there(target: Path, options: dict[str, Any], pattern: str, reader: Any) -> bool:
    """Return whether the run *target* is there and complete; raises UsageError where it is one of something else."""
    try:
        run = reader(target)
    except LlmkernError:
        return False
    if not run.complete:
        return False
    labels, asked = run.facts.labels, options["asked"]
    count, model = labels.get("requests", "0"), run.facts.options.model
    # Runs of an earlier llmkern say no more than these.
    told = labels.get("asked") or asked
    alike = (labels.get("arrivals"), count, model) == (pattern, str(options["requests"]), options["trace"]["model"])
    if alike and told == asked:
        return True
    was = told if told != asked else f"{labels.get('arrivals', 'no arrivals')}, {count} requests to {model}"
    raise UsageError(
        f"{target} is there and of something else ({was}; now {asked}): choose another folder with --out, or add "
        "--force."
    )
