"""The workload of a bench: a model with random weights, built-in prompts, and the rig to record it with."""

from __future__ import annotations

import time
from pathlib import Path

from llmkern.progress import Stages
from llmkern.record import environment
from llmkern.record.annotate import Annotator
from llmkern.record.clock import ClockWatch
from llmkern.record.device.interface import Device, EnergyMeter
from llmkern.record.generation import Generation
from llmkern.record.options import TraceOptions
from llmkern.record.rig import Rig
from llmkern.runfolder import RunWriter
from llmkern.runfolder.facts import ModelFacts, RunFacts
from llmkern.workload.load import LoadedModel, Source, load_model
from llmkern.workload.models import find_model, shape_of
from llmkern.workload.prompts import builtin_prompts


def loaded_at(model: str, precision: str, device: Device) -> LoadedModel:
    """Return *model* with random weights at *precision* on *device*."""
    return load_model(find_model(model), Source("random", "as asked for"), precision, device.torch_device)


def generation_of(device: Device, loaded: LoadedModel, batch: int, prompt_tokens: int) -> Generation:
    """Return the generation of *loaded* for *batch* built-in prompts of *prompt_tokens* tokens."""
    prompts = builtin_prompts(batch, prompt_tokens, None, shape_of(loaded.config).vocabulary, 0)
    ids, mask = (t.to(device.torch_device) for t in (prompts.input_ids, prompts.attention_mask))
    return Generation(loaded.model, {"input_ids": ids, "attention_mask": mask}, Annotator(), device.synchronize)


def rig_of(
    device: Device, loaded: LoadedModel, options: TraceOptions, folder: Path, meters: tuple[EnergyMeter, ...] = ()
) -> Rig:
    """Return the rig that records what *options* ask for into *folder*."""
    facts = RunFacts(
        device=device.facts(), options=options.facts(), host=environment.host(), versions=environment.versions()
    )
    writer = RunWriter(folder, facts)
    model = ModelFacts(
        name=options.model, weights="random", weight_bytes=loaded.weight_bytes, weights_key=loaded.weights_key
    )
    writer.note(model=model)
    generation = generation_of(device, loaded, options.batch, options.prompt_tokens or 512)
    return Rig(device, meters, generation, loaded.model, writer, Stages(quiet=True), options, ClockWatch())


def published(rig: Rig) -> Path:
    """Merge what *rig* recorded, put it in its place and return that."""
    rig.writer.merge()
    return rig.writer.publish(elapsed_s=None, started=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
