"""``llmkern study``."""

from __future__ import annotations

import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from llmkern.commands import CONTEXT, common
from llmkern.errors import LlmkernError, UsageError


class RunsFailedError(LlmkernError):
    """Some runs of a study failed; the others are there."""

    exit_code = 1


def _names(_context: click.Context, _parameter: click.Parameter, text: str | None) -> list[str] | None:
    if text is None:
        return None
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise click.BadParameter("is empty: give values with commas between them.")
    return found


def _numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    names = _names(context, parameter, text)
    try:
        return None if names is None else [int(name) for name in names]
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: give whole numbers with commas between them, like 1,8,64.") from error


def _duration(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)", text.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]] if found else 0.0
    if seconds <= 0:
        raise click.BadParameter(f"{text!r}: give a length of time with its unit, like 30m, 90s or 2h.")
    return seconds


def work(options: dict[str, Any], log: str) -> None:
    """Record one run as ``llmkern trace`` would, and leave the process with its exit code."""
    from llmkern.commands import run

    sys.argv = ["llmkern", "trace", *_as_arguments(options)]

    @click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def record() -> None:
        from llmkern.progress import Stages
        from llmkern.record.options import TraceOptions
        from llmkern.session import trace

        click.echo(f"recorded {trace(TraceOptions(**options), Stages(quiet=True))}")

    run(record, "llmkern trace")


def _as_arguments(options: dict[str, Any]) -> list[str]:
    found = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(flag)
        elif value is not None and value is not False:
            found += [flag, str(value)]
    return found


@click.command("study", context_settings=CONTEXT)
@click.argument("plan", metavar="PLAN")
@common.out("Folder of the study; what is complete there is kept.  [default: studies/PLAN]")
@click.option("--models", callback=_names, help="In the place of the plan's: names with commas between them.")
@click.option("--precisions", callback=_names, help="In the place of the plan's, like fp32,bf16,int8.")
@click.option("--engines", callback=_names, help="In the place of the plan's: eager, graph, fused.")
@click.option("--batches", callback=_numbers, help="In the place of the plan's, like 1,8,64.")
@click.option("--prompts", callback=_names, help="Which of the plan's sets of prompts.")
@click.option("--prompt-tokens", callback=_numbers, help="In the place of the plan's.")
@click.option("--new-tokens", callback=_numbers, help="In the place of the plan's.")
@click.option("--draws", callback=_numbers, help="In the place of the plan's, like 0,1,2.")
@click.option(
    "--record", type=click.Choice(["windows", "timeline", "replays"]), help="How much of each run (docs/study.md)."
)
@click.option("--repeats", type=click.IntRange(1, 10**6), help="Weighed generations of each run.")
@click.option("--weights", type=click.Choice(["auto", "hub", "local", "random"]), help="As for 'llmkern trace'.")
@click.option("--device", metavar="auto|cuda[:N]|cpu", help="Where to run.")
@click.option("--seed", type=click.IntRange(0, 2**31), help="Of weights, prompts and the order of the runs.")
@click.option("--budget", callback=_duration, metavar="TIME", help="Like 30m: the most informative runs that fit.")
@click.option("--skip-impossible", is_flag=True, help="Leave out what this device cannot run, and say so.")
@click.option("--dry-run", is_flag=True, help="Print the runs with their time and memory, and run nothing.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@common.debug
def command(
    plan: str,
    out: Path | None,
    budget: float | None,
    skip_impossible: bool,
    dry_run: bool,
    quiet: bool,
    debug: bool,
    **asked: Any,
) -> None:
    """Run every configuration of PLAN, a TOML file or precision, batch or paper, and show what all of them say.

    Each is a run folder of its own in FOLDER/runs; a study that was ended goes on where it was. FOLDER/study.html has
    the figures, FOLDER/numbers.csv and numbers.parquet what they were drawn from.
    """
    import tempfile

    from llmkern.study.plan import read_plan

    axes = ("models", "precisions", "engines", "batches", "prompts", "prompt_tokens", "new_tokens", "draws")
    named = {"models": "model", "precisions": "precision", "engines": "engine", "batches": "batch", "draws": "draw"}
    changed = {named.get(axis, axis): asked[axis] for axis in axes if asked[axis] is not None}
    options = {name: value for name, value in asked.items() if name not in axes and value is not None}
    source = read_plan(plan, changed, options)
    # Names and counts first: what is mistyped is not to wait for the libraries.
    _check_models(source)
    source.configurations()
    folder = out or Path("studies") / Path(plan).stem
    say = (lambda text: None) if quiet else (lambda text: click.echo(text, err=True))
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            _print_table(_prepared(source, Path(scratch), folder, say)[1], budget)
        return
    _run(source, folder, plan, budget, skip_impossible, say)


def _check_models(source: Any) -> None:
    from llmkern.workload.models import find_model

    for name in source.plan.axes.model:
        try:
            find_model(name)
        except UsageError as error:
            raise UsageError(f"{source.at('axes', 'model', value=name)}: {error}") from error


def _prepared(source: Any, scratch: Path, folder: Path, say: Any) -> tuple[list[Any], list[Any]]:
    from llmkern.study.check import check, tasks_of

    say("Checking the plan against this device …")
    tasks = tasks_of(source, scratch)
    return tasks, check(tasks, source.plan.options.record, folder)


def _print_table(checked: list[Any], budget: float | None) -> None:
    from rich.table import Table

    from llmkern.text import duration

    table = Table(box=None, pad_edge=False)
    for title in ("run", "about", "needs", "cannot be, because"):
        table.add_column(title, justify="left" if title in ("run", "cannot be, because") else "right")
    for one in checked:
        if one.problem:
            table.add_row(one.name, "–", "–", one.problem)
        else:
            table.add_row(one.name, duration(one.guessed_s), f"{one.needed_bytes / 2**30:.1f} GiB", "")
    console = common.console()
    console.print(table)
    total_s = sum(one.guessed_s for one in checked)
    limit = "" if budget is None else f", of a budget of {duration(budget)}"
    click.echo(f"{len(checked)} runs, roughly {duration(total_s)}{limit}; a guess until the first are done.")


def _run(source: Any, folder: Path, plan: str, budget: float | None, skip: bool, say: Any) -> None:
    from llmkern.runfolder.facts import without_home
    from llmkern.study import execute as study
    from llmkern.study.check import place_of
    from llmkern.study.cost import Costs, most_informative

    state = study.open_study(folder)
    with study.held(folder):
        tasks, checked = _prepared(source, folder, folder, say)
        problems = {one.name: one.problem for one in checked if one.problem}
        told = [
            f"{place_of(source, task.configuration, problems[task.name])}: {task.name}: {problems[task.name]}"
            for task in tasks
            if task.name in problems
        ]
        if told and not skip:
            more = f" (and {len(told) - 1} more like it)" if len(told) > 1 else ""
            raise UsageError(f"{told[0]}{more} Take it out of the plan, or add --skip-impossible.")
        for sentence in told:
            say(f"Left out: {sentence}")
        costs = Costs({one.name: one.guessed_s for one in checked if not one.problem}, state.took_s)
        tasks = [task for task in tasks if task.name not in problems]
        if not tasks:
            raise UsageError(f"{source.name}: nothing of it can be run here; the reasons are above.")
        if budget is not None:
            missing = [t.configuration for t in tasks if not study.done(folder, t)]
            chosen = {one.name for one in most_informative(missing, lambda name: costs.of([name]), budget)}
            chosen |= {t.name for t in tasks if study.done(folder, t)}
            if len(chosen) < len(tasks):
                say(f"{len(tasks) - len(chosen)} of {len(tasks)} runs are left out: they do not fit into the budget.")
            tasks = [task for task in tasks if task.name in chosen]
        state.title = source.plan.title or Path(plan).stem
        state.command = without_home(shlex.join(["llmkern", *sys.argv[1:]]))
        state.started = datetime.now(UTC).isoformat(timespec="seconds")
        for name, problem in problems.items():
            state.runs.setdefault(name, {})
            state.runs[name] = {"status": study.FAILED, "reason": problem, "elapsed_s": 0.0}
        state.write()
        try:
            study.execute(state, tasks, work, study.Order(costs, source.plan.options.seed, budget), say)
        finally:
            # Signals are told by whoever called; what is complete is worth looking at in any case.
            there = [task for task in tasks if study.done(folder, task)]
            say(f"{len(there)} of {len(tasks)} runs are complete in {folder / study.RUNS}.")
        _collect(folder, say)
    failed = {name: reason for name, reason in state.failed.items() if name in {task.name for task in tasks}}
    if failed:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise RunsFailedError(f"{len(failed)} of {len(tasks)} runs failed; start again to repeat them:{lines}")


def _collect(folder: Path, say: Any) -> None:
    from llmkern.commands.collect import collected

    collected([folder], folder, say)
