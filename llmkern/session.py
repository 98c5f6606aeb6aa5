"""One traced run from options to a finished run folder: the only file that knows both halves."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llmkern.attribute.attribution import attribute
from llmkern.attribute.split.evidence import to_cache
from llmkern.attribute.split.kernel_classes import launched_by
from llmkern.attribute.split.replay_plan import plan_replays, without
from llmkern.errors import InterruptedRunError, LlmkernError, OutOfMemoryError, UsageError
from llmkern.progress import Stages
from llmkern.record import environment, replay_cache, signals
from llmkern.record.annotate import Annotator
from llmkern.record.clock import ClockWatch
from llmkern.record.device.choose import choose_device
from llmkern.record.device.interface import Device
from llmkern.record.generation import FusedGeneration, Generation, decoder_layers
from llmkern.record.options import TraceOptions
from llmkern.record.passes.effect import record_effect
from llmkern.record.passes.inspection import inspect
from llmkern.record.passes.live import annotate_generations
from llmkern.record.passes.replay import replay
from llmkern.record.passes.selftest import try_sensors
from llmkern.record.passes.timeline import record_timelines
from llmkern.record.passes.weigh import warm_up, weigh
from llmkern.record.rig import Rig
from llmkern.runfolder import RunFolder, RunWriter
from llmkern.runfolder import vocabulary as word
from llmkern.runfolder.facts import (
    ModelFacts,
    OutlierFacts,
    PromptFacts,
    PromptSetFacts,
    ReplayFacts,
    RunFacts,
    without_home,
)
from llmkern.runfolder.place import check_output, check_run_target
from llmkern.runfolder.schema import TABLES
from llmkern.workload.engine import attention, use_graph
from llmkern.workload.fused import FusedModel
from llmkern.workload.fused import check as check_fused
from llmkern.workload.load import LoadedModel, Source, choose_source, load_model, load_tokenizer, stored_bytes
from llmkern.workload.models import ModelSpec, Shape, build_config, find_model, shape_of
from llmkern.workload.precision import (
    DTYPES,
    Workload,
    check_memory,
    check_precision,
    have_bitsandbytes,
    required_bytes,
)
from llmkern.workload.prompts import PromptSet, builtin_prompts, encode_prompts, encode_set, parse_prompts
from llmkern.workload.weights import RandomWeights

DEFAULT_PROMPT_TOKENS = 512


def trace(options: TraceOptions, stages: Stages) -> Path:
    """Record one run and return its folder.

    Raises LlmkernError with a sentence for every cause that the user can do something about, a signal among them.
    """
    started_s = time.monotonic()
    job = prepare(options)
    writer = RunWriter(job.target, job.facts(), force=options.force)
    with recording(writer, job.out_of_memory()), attention(cudnn=options.cudnn_attention):
        rig = assemble(job, writer, stages)
        record(rig)
        elapsed_s = round(time.monotonic() - started_s, 3)
        with signals.deferred():
            finish(writer, stages, elapsed_s=elapsed_s, clock=rig.clock.facts())
        if options.records_kernels and not (options.quick or options.no_cache):
            keep_replays(RunFolder(job.target))
    return job.target


@dataclass(frozen=True)
class Job:
    """What was asked for, checked as far as that is possible before the model is loaded; memory in bytes."""

    options: TraceOptions
    spec: ModelSpec
    device: Device
    source: Source
    prompts: PromptSet
    prompt_set: tuple[PromptSet, ...]
    target: Path
    needed: int
    free: int
    total: int

    def facts(self) -> RunFacts:
        return RunFacts(
            command=without_home(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            options=self.options.facts(),
            device=self.device.facts(),
            host=environment.host(),
            versions=environment.versions(),
            prompts=PromptFacts(
                batch=int(self.prompts.input_ids.shape[0]),
                tokens=int(self.prompts.input_ids.shape[1]),
                effective_tokens=tuple(int(n) for n in self.prompts.effective_tokens),
                computed_tokens=int(self.prompts.computed_tokens),
                output_tokens=tuple(min(n, self.options.new_tokens) for n in self.prompts.output_tokens),
                source=self.prompts.source,
            ),
            prompt_set=PromptSetFacts(
                batches=len(self.prompt_set),
                effective_tokens=sum(sum(batch.effective_tokens) for batch in self.prompt_set),
                computed_tokens=sum(batch.computed_tokens for batch in self.prompt_set),
            )
            if self.prompt_set
            else None,
        )

    def out_of_memory(self) -> str:
        """Return what to say when the device has no more memory."""
        return (
            f"{self.device.facts().name} ran out of memory: this run needs about {self.needed / 2**30:.1f} GiB, "
            f"{self.free / 2**30:.1f} of {self.total / 2**30:.1f} GiB were free; choose a smaller --batch or "
            "--prompt-tokens, a smaller model or --precision int8 or int4."
        )


def prepare(options: TraceOptions) -> Job:
    """Return the job that *options* ask for; raises LlmkernError for whatever is wrong before weights are loaded."""
    check_options(options)
    spec = find_model(options.model)
    given = parse_prompts(options.prompts) if options.prompts is not None else None
    target = options.out if options.out is not None else Path("runs") / _folder_name(spec, options)
    check_output(target, [options.prompts, spec.path])
    check_run_target(target, options.force)
    device = choose_device(options.device)
    if options.records_kernels:
        device.check_unprofiled()
    if options.engine == "graph":
        device.check_graphs()
    check_precision(options.precision, device.capability(), have_bitsandbytes())
    config = build_config(spec)
    shape = shape_of(config, spec.name)
    source = choose_source(spec, options.weights)
    _check_outliers(options, source, shape)
    tokenizer = load_tokenizer(spec, source)
    if given is not None:
        prompts = encode_prompts(given, tokenizer, shape.vocabulary, options.batch, options.prompt_tokens, options.seed)
    else:
        tokens = options.prompt_tokens or DEFAULT_PROMPT_TOKENS
        _check_positions(tokens, options.new_tokens, shape)
        prompts = builtin_prompts(options.batch, tokens, tokenizer, shape.vocabulary, options.seed)
    tokens = int(prompts.input_ids.shape[1])
    _check_positions(tokens, options.new_tokens, shape)
    prompt_set: tuple[PromptSet, ...] = ()
    if options.prefill_prompts is not None:
        more = parse_prompts(options.prefill_prompts)
        prompt_set = encode_set(more, tokenizer, shape.vocabulary, options.batch, options.seed)
        tokens = max(tokens, *(int(batch.input_ids.shape[1]) for batch in prompt_set))
        _check_positions(tokens, 1, shape)
    work = Workload(options.precision, options.batch, tokens, options.new_tokens, options.double_quant)
    if options.engine == "fused":
        dtype = DTYPES.get(options.precision, torch.bfloat16)
        check_fused(config, tokens + options.new_tokens, options.batch, device.torch_device, dtype)
    needed = required_bytes(config, work)
    free, total = device.free_bytes()
    check_memory(needed, free, total, device.facts().name)
    return Job(options, spec, device, source, prompts, prompt_set, target, needed, free, total)


def check_options(options: TraceOptions) -> None:
    """Refuse options that mean nothing or nothing together; raises UsageError."""
    if not math.isfinite(options.int8_threshold):
        raise UsageError(
            f"--int8-threshold {options.int8_threshold} is no number to compare with: 6.0 is usual, 0 is off."
        )
    if options.int8_threshold != TraceOptions.int8_threshold and options.precision != "int8":
        raise UsageError(
            f"--int8-threshold {options.int8_threshold:g} means nothing at --precision {options.precision}: leave it "
            "out, or use --precision int8."
        )
    if options.annotate_only and options.weigh_only:
        raise UsageError(
            "--annotate-only is for a profiler that watches, --weigh-only for none: leave one of the two out."
        )
    if options.prefill_prompts is not None and options.engine != "eager":
        raise UsageError(
            f"prompts of many lengths cannot be weighed with --engine {options.engine}, whose cache has one: use eager."
        )
    if options.double_quant and options.precision != "int4":
        raise UsageError(
            f"--double-quant quantizes the scales of int4, there are none at --precision {options.precision}: leave it "
            "out, or use --precision int4."
        )


def _check_outliers(options: TraceOptions, source: Source, shape: Shape) -> None:
    if options.outliers > shape.hidden:
        raise UsageError(
            f"--outliers {options.outliers}: the model has {shape.hidden} hidden dimensions; real models have about 6 "
            "with outlier features."
        )
    if options.outliers != TraceOptions.outliers and source.kind != "random":
        raise UsageError(
            f"--outliers {options.outliers} plants them in random weights, and these are {source.kind} ones: leave it "
            "out, or add --weights random."
        )


def _check_positions(prompt_tokens: int, new_tokens: int, shape: Shape) -> None:
    if shape.positions is not None and prompt_tokens + new_tokens > shape.positions:
        raise UsageError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the model's {shape.positions} positions: "
            "choose a smaller --prompt-tokens or --new-tokens."
        )


@contextmanager
def recording(writer: RunWriter, out_of_memory: str) -> Iterator[None]:
    """Whatever ends the recording early, note it in the run folder, and say where what was recorded is."""
    try:
        yield
    except BaseException as error:
        # C code that is interrupted while it is initialized makes another error of it.
        if isinstance(error, KeyboardInterrupt) or signals.came() is not None:
            raise _interrupted(writer) from error
        if isinstance(error, LlmkernError):
            folder = writer.give_up(word.FAILED, str(error))
            raise type(error)(f"{error}{_kept(folder)}") from error
        if isinstance(error, torch.OutOfMemoryError):
            folder = writer.give_up(word.FAILED, out_of_memory)
            raise OutOfMemoryError(f"{out_of_memory}{_kept(folder)}") from error
        # A fault of ours must not cost what was recorded before it.
        writer.give_up(word.FAILED, f"{type(error).__name__}: {error}"[:500])
        raise


def _interrupted(writer: RunWriter) -> InterruptedRunError:
    """Note in the run folder which signal ended the run, and return what is to be said of it."""
    came = signals.came()
    name, code = (came.name, 128 + int(came)) if came is not None else ("SIGINT", 130)
    if writer.facts.status == word.COMPLETE:
        return InterruptedRunError(f"ended by {name} after the run was complete: it is in {writer.path}.", code)
    folder = writer.give_up(word.INTERRUPTED, f"ended by {name}")
    if folder is None:
        return InterruptedRunError(f"ended by {name} before anything was recorded; nothing is left behind.", code)
    return InterruptedRunError(f"ended by {name};{_kept(folder).removeprefix(' –')}", code)


def _kept(folder: Path | None) -> str:
    if folder is None:
        return ""
    where = shlex.quote(str(folder))
    return f" – what was recorded until then is in {folder}: 'llmkern report {where}' tells what it allows."


def assemble(job: Job, writer: RunWriter, stages: Stages) -> Rig:
    """Load the model and return everything that the passes need."""
    options, device = job.options, job.device
    clock = ClockWatch()
    with stages.stage(f"Loading {job.spec.name} {options.precision}") as advance:
        how = RandomWeights(options.seed, options.outliers, options.double_quant, options.int8_threshold)
        loaded = load_model(job.spec, job.source, options.precision, device.torch_device, how, lambda *_: advance())
    model = loaded.model
    if options.engine == "fused":
        batch, tokens = job.prompts.input_ids.shape
        with stages.stage("Fusing", loaded.config.num_hidden_layers) as advance:
            model = FusedModel(loaded.model, tokens + options.new_tokens, batch, lambda _: advance())
        # Packed scales may take fewer bytes than those that were loaded.
        loaded = replace(loaded, model=model, weight_bytes=stored_bytes(model))
    writer.note(model=_model_facts(job.spec, loaded))
    ids, mask = (t.to(device.torch_device) for t in (job.prompts.input_ids, job.prompts.attention_mask))
    inputs = {"input_ids": ids, "attention_mask": mask}
    if options.engine == "fused":
        fused = FusedGeneration(model, inputs, Annotator(), device.synchronize)
        return Rig(device, tuple(device.meters()), fused, model, writer, stages, options, clock)
    cache = None
    if options.engine == "graph":
        cache = use_graph(model, int(ids.shape[1]), options.new_tokens)
    generation = Generation(model, inputs, Annotator(), device.synchronize, cache)
    more = tuple(
        replace(generation, inputs={name: getattr(batch, name).to(device.torch_device) for name in inputs})
        for batch in job.prompt_set
    )
    return Rig(device, tuple(device.meters()), generation, model, writer, stages, options, clock, more)


def record(rig: Rig) -> None:
    """Record every pass that the options ask for; raises LlmkernError where one cannot go on."""
    with rig.metered():
        if not rig.options.weigh_only:
            # The counter alone is asked then.
            with timed(rig, "selftest"):
                try_sensors(rig)
        with timed(rig, "warmup"):
            plan = warm_up(rig)
        with timed(rig, "weigh"):
            weigh(rig, plan)
        if rig.options.annotate_only:
            with timed(rig, "time"):
                annotate_generations(rig)
        elif rig.options.records_kernels:
            with timed(rig, "time"):
                record_timelines(rig)
            with timed(rig, "effect"):
                record_effect(rig)
            with timed(rig, "inspect"):
                inspect(rig)
            if rig.meters and not rig.options.quick:
                with timed(rig, "replay"):
                    replay_what_matters(rig)
        rig.writer.note(sensors={meter.name: meter.facts() for meter in rig.meters})


@contextmanager
def timed(rig: Rig, name: str) -> Iterator[None]:
    """Note how long the pass *name* took."""
    begin_s = time.monotonic()
    yield
    rig.writer.note(pass_s={**rig.writer.facts.pass_s, name: round(time.monotonic() - begin_s, 3)})


def replay_what_matters(rig: Rig) -> None:
    """Replay the operators that hold most of the energy so far, but for those that this board has replayed before."""
    found = attribute(RunFolder(rig.writer.path), equal_power=True)
    wanted = plan_replays(found.kernels, launched_by(found.inspected, found.ops), list(found.accounts))
    if not rig.options.no_cache:
        facts = rig.writer.facts
        known = replay_cache.load(replay_cache.cache_key(facts.device, facts.versions, facts.model))
        known = known[known["signature"].isin([one.signature for one in wanted])]
        known = known.astype({"clock_mhz": object}).where(known.notna(), None)
        columns = {name: known[name].to_list() for name in known.columns if name != "key"}
        rig.writer.append("replays", {**columns, "start_ns": None, "end_ns": None, "captured": None})
        whole = known["kernel"].isna()
        cached = set(zip(known["signature"], known["kernel"].where(~whole, None), strict=True))
        rig.writer.note(
            replays=replace(facts.replays or ReplayFacts(), cached=int(known["signature"][whole].nunique()))
        )
        wanted = without(wanted, cached)
    replay(rig, wanted)


def finish(writer: RunWriter, stages: Stages, **facts: Any) -> None:
    """Merge the segments, write the attribution, and put the run in its place."""
    with stages.stage("Merging the segments", len(TABLES)) as advance:
        writer.merge(advance)
    try:
        with stages.stage("Attributing"):
            frame = attribute(RunFolder(writer.path)).table()
            if len(frame):
                writer.put("attribution", {column: frame[column] for column in frame.columns})
    finally:
        # What was recorded is whole, whatever can be made of it.
        writer.publish(**facts)


def keep_replays(run: RunFolder) -> None:
    """Put what *run* replayed into the user's cache."""
    found = attribute(run, equal_power=True)
    key = replay_cache.cache_key(run.facts.device, run.facts.versions, run.facts.model)
    replay_cache.store(key, to_cache(run, found.weighed, (found.sensor, found.device)))


def _model_facts(spec: ModelSpec, loaded: LoadedModel) -> ModelFacts:
    plan = loaded.outliers
    outliers = None
    if plan is not None:
        outliers = OutlierFacts(
            dimensions=plan.dimensions, gain=plan.gain, threshold=plan.threshold, source=plan.source
        )
    return ModelFacts(
        name=spec.name,
        hub_id=spec.hub_id,
        parameters=loaded.parameter_count,
        weight_bytes=loaded.weight_bytes,
        weights=loaded.weights_source,  # type: ignore[arg-type]
        weights_note=without_home(loaded.weights_note),
        weights_key=loaded.weights_key,
        outliers=outliers,
        layers=len(decoder_layers(loaded.model)),
        build_s=round(loaded.build_s, 3),
    )


def _folder_name(spec: ModelSpec, options: TraceOptions) -> str:
    model = spec.name.replace("/", "_")
    return f"{datetime.now():%Y%m%d-%H%M%S}-{model}-{options.precision}"
