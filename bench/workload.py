"""The workload of a bench: built-in prompts for a model that is loaded."""

from __future__ import annotations

from llmkern.record.annotate import Annotator
from llmkern.record.device import Device
from llmkern.record.generation import Generation
from llmkern.workload.load import LoadedModel
from llmkern.workload.prompts import builtin_prompts


def generation_of(
    device: Device, loaded: LoadedModel, annotator: Annotator, batch: int, prompt_tokens: int
) -> Generation:
    """Return the generation of *loaded* for *batch* built-in prompts of *prompt_tokens* tokens."""
    prompts = builtin_prompts(batch, prompt_tokens, loaded.tokenizer, int(loaded.config.vocab_size), 0)
    ids, mask = (t.to(device.torch_device) for t in (prompts.input_ids, prompts.attention_mask))
    return Generation(loaded.model, ids, mask, annotator, device.synchronize)
