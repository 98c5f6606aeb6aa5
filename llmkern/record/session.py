"""One traced run from options to a finished run folder: load, warm up, rest, weigh, time."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llmkern.attribute.attribution import attribute
from llmkern.attribute.replayed import to_cache
from llmkern.errors import LlmkernError, OutOfMemoryError, UsageError
from llmkern.progress import Stages
from llmkern.record import environment, interrupts, replay_cache
from llmkern.record.annotate import Annotator
from llmkern.record.choose import choose_device
from llmkern.record.device import Device
from llmkern.record.engine import check_graph, use_graph
from llmkern.record.generation import Generation, decoder_layers
from llmkern.record.options import TraceOptions
from llmkern.record.passes import record_passes
from llmkern.run import TABLES, RunFolder, RunWriter
from llmkern.workload.load import LoadedModel, load_model
from llmkern.workload.models import ModelSpec, build_config, find_model
from llmkern.workload.precision import check_memory, check_precision, have_bitsandbytes, required_bytes
from llmkern.workload.prompts import Prompt, PromptSet, builtin_prompts, encode_prompts, parse_prompts

DEFAULT_PROMPT_TOKENS = 512


def trace(options: TraceOptions, stages: Stages) -> Path:
    """Record one run and return its folder.

    Raises LlmkernError with a sentence for every cause that the user can do something about.
    """
    started_s = time.monotonic()
    spec = find_model(options.model)
    device = choose_device(options.device)
    if not options.annotate_only:
        device.check_unprofiled()
    if options.engine == "graph":
        check_graph(device.kind)
    check_precision(options.precision, device.kind, device.capability(), have_bitsandbytes())
    config = build_config(spec)
    prompts = parse_prompts(options.prompts) if options.prompts is not None else None
    _check_positions(config, options)
    prompt_tokens = options.prompt_tokens or DEFAULT_PROMPT_TOKENS
    needed = required_bytes(
        config, options.precision, options.batch, prompt_tokens, options.new_tokens, options.double_quant
    )
    free, total = device.free_bytes()
    check_memory(needed, free, total, device.facts()["name"])
    folder = options.out or Path("runs") / _folder_name(spec, options)
    writer = RunWriter(
        folder,
        {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "options": options.facts(),
            "device": device.facts(),
            "host": environment.host(),
            "versions": environment.versions(),
        },
        force=options.force,
    )
    try:
        with interrupts.remembered():
            _record(options, spec, prompts, device, writer, stages)
        with stages.stage("Merging the segments", len(TABLES)) as advance:
            writer.finish(advance, elapsed_s=round(time.monotonic() - started_s, 3))
        if not (options.quick or options.no_cache or options.annotate_only):
            run = RunFolder(folder)
            found = attribute(run, equal_power=True)
            key = replay_cache.cache_key(run.facts["device"], run.facts["versions"])
            replay_cache.store(key, to_cache(run, found.weighed, (found.sensor, found.device)))
    except LlmkernError as error:
        _record_failure(writer, str(error))
        raise
    except torch.OutOfMemoryError as error:
        message = (
            f"{device.facts()['name']} ran out of memory: this run needs about {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB were free; choose a smaller --batch or --prompt-tokens, "
            "a smaller model or --precision int8 or int4."
        )
        _record_failure(writer, message)
        raise OutOfMemoryError(message) from error
    except KeyboardInterrupt:
        _record_failure(writer, "interrupted by the user")
        raise
    return folder


def _record(
    options: TraceOptions,
    spec: ModelSpec,
    given: list[Prompt] | None,
    device: Device,
    writer: RunWriter,
    stages: Stages,
) -> None:
    annotator = Annotator()
    with stages.stage(f"Loading {spec.name} {options.precision}") as advance:
        loaded = load_model(
            spec,
            precision=options.precision,
            weights=options.weights,
            device=device.torch_device,
            seed=options.seed,
            outliers=options.outliers,
            double_quant=options.double_quant,
            int8_threshold=options.int8_threshold,
            progress=lambda *_: advance(),
        )
    prompts = _prompts(options, given, loaded)
    writer.write_facts(model=_model_facts(spec, loaded), prompts=_prompt_facts(prompts))
    cache = None
    if options.engine == "graph":
        cache = use_graph(loaded.model, int(prompts.input_ids.shape[1]), options.new_tokens)
    generation = Generation(
        loaded.model,
        prompts.input_ids.to(device.torch_device),
        prompts.attention_mask.to(device.torch_device),
        annotator,
        device.synchronize,
        cache,
    )
    record_passes(device, generation, loaded.model, annotator, writer, stages, options)


def _check_positions(config: Any, options: TraceOptions) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    prompt_tokens = options.prompt_tokens or DEFAULT_PROMPT_TOKENS
    if limit is not None and prompt_tokens + options.new_tokens > limit:
        raise UsageError(
            f"{prompt_tokens} prompt and {options.new_tokens} new tokens exceed the model's {limit} positions: "
            "choose a smaller --prompt-tokens or --new-tokens."
        )


def _prompts(options: TraceOptions, given: list[Prompt] | None, loaded: LoadedModel) -> PromptSet:
    vocab_size = int(loaded.config.vocab_size)
    if given is not None:
        return encode_prompts(given, loaded.tokenizer, vocab_size, options.batch, options.prompt_tokens)
    prompt_tokens = options.prompt_tokens or DEFAULT_PROMPT_TOKENS
    return builtin_prompts(options.batch, prompt_tokens, loaded.tokenizer, vocab_size, options.seed)


def _model_facts(spec: ModelSpec, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "name": spec.name,
        "hub_id": spec.hub_id,
        "parameters": loaded.parameter_count,
        "weight_bytes": loaded.weight_bytes,
        "weights": loaded.weights_source,
        "weights_note": loaded.weights_note,
        "outliers": asdict(loaded.outliers) if loaded.outliers is not None else None,
        "layers": len(decoder_layers(loaded.model)),
        "build_s": round(loaded.build_s, 3),
    }


def _prompt_facts(prompts: PromptSet) -> dict[str, Any]:
    return {
        "batch": int(prompts.input_ids.shape[0]),
        "tokens": int(prompts.input_ids.shape[1]),
        "effective_tokens": [int(n) for n in prompts.effective_tokens],
        "computed_tokens": int(prompts.computed_tokens),
        "source": prompts.source,
    }


def _folder_name(spec: ModelSpec, options: TraceOptions) -> str:
    model = spec.name.replace("/", "_")
    return f"{datetime.now():%Y%m%d-%H%M%S}-{model}-{options.precision}"


def _record_failure(writer: RunWriter, reason: str) -> None:
    """Note why the recording stopped; the segments stay where they are."""
    # The disk may be what failed; the first error is the one to tell.
    with suppress(LlmkernError):
        writer.write_facts(status="failed", reason=reason)
