"""What can be found wrong with the runs of a plan, and how large they are, before the first of them is begun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkern.errors import LlmkernError
from llmkern.study.cost import Size, seconds
from llmkern.study.execute import PROMPTS, RUNS, Task, processes
from llmkern.study.plan import Configuration, Source
from llmkern.study.prompts import write_prompts

# Where there is no energy, latency alone needs no windows as long as a counter does.
_UNWEIGHED_S = 0.5


@dataclass(frozen=True)
class Checked:
    """One run: the seconds that it may take and the bytes that it needs, or the sentence that says why it cannot be."""

    name: str
    guessed_s: float = 0.0
    needed_bytes: int = 0
    problem: str = ""


def tasks_of(source: Source, folder: Path) -> list[Task]:
    """Return the runs of a plan with their options; prompts that are drawn are written into *folder* first."""
    settings = source.plan.options
    common: dict[str, Any] = {
        "weigh_only": settings.record == "windows",
        "quick": settings.record != "replays",
        "unweighed_window_s": _UNWEIGHED_S,
        **{name: getattr(settings, name) for name in ("repeats", "warmup", "weights", "device", "outliers")},
        "cudnn_attention": settings.cudnn_attention,
    }
    found = []
    for one in source.configurations():
        options = {**common, "seed": settings.seed, "model": one.model, "precision": one.precision}
        options |= {"engine": one.engine, "batch": one.batch}
        if one.precision == "int4":
            options["double_quant"] = settings.double_quant
        if one.precision == "int8":
            options["int8_threshold"] = settings.int8_threshold
        if one.prompts:
            written = write_prompts(source, one, folder / PROMPTS)
            options |= {"prompts": written.file, "new_tokens": written.answers, "prefill_prompts": written.prompt_set}
        else:
            options |= {"prompt_tokens": one.prompt_tokens, "new_tokens": one.new_tokens}
            options["seed"] += one.draw
        found.append(Task(one, options))
    return found


def check(tasks: list[Task], record: str, folder: Path) -> list[Checked]:
    """Return what can be said of each task by this device, in a process of its own: nothing of it stays behind."""
    with processes().Pool(1) as pool:
        found: list[Checked] = pool.apply(_check_all, (tasks, record, folder))
    return found


def _check_all(tasks: list[Task], record: str, folder: Path) -> list[Checked]:
    return [_check(task, record, folder) for task in tasks]


def _check(task: Task, record: str, folder: Path) -> Checked:
    from llmkern.record.options import TraceOptions
    from llmkern.session import prepare
    from llmkern.workload.models import build_config, shape_of
    from llmkern.workload.precision import count_parameters, weight_bytes

    options = TraceOptions(**{**task.options, "out": folder / RUNS / task.name, "force": True})
    try:
        job = prepare(options)
        config = build_config(job.spec)
        linear, other = count_parameters(config)
    except LlmkernError as error:
        return Checked(task.name, problem=str(error))
    weights = int(weight_bytes(linear, other, options.precision, options.double_quant))
    tokens = int(job.prompts.input_ids.shape[1])
    kind, layers = job.device.facts().kind, shape_of(config).layers
    more = sum(batch.computed_tokens for batch in job.prompt_set)
    size = Size(kind, linear + other, weights, layers, tokens, job.options.new_tokens, more)
    return Checked(task.name, round(seconds(task.configuration, size, record, options.repeats), 1), job.needed)


def place_of(source: Source, one: Configuration, problem: str) -> str:
    """Return the line of the plan that *problem* of the run *one* is about, as well as it can be told."""
    axes = source.plan.axes
    told = problem.lower()
    axis = "model"
    for name, words in (
        ("engine", ("engine", "fused", "graph")),
        ("precision", ("bitsandbytes", "compute capability")),
        ("prompt_tokens", ("positions",)),
        ("batch", ("batch of",)),
    ):
        if len(getattr(axes, name)) and any(word in told for word in words) and "gib" not in told:
            axis = name
            break
    if axis == "prompt_tokens" and one.prompts:
        return source.at("prompts", one.prompts)
    return source.at("axes", axis, value=getattr(one, axis))
