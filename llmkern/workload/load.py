"""Loads a model: from the hub or a folder if it can be had, with random weights otherwise."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig

from llmkern.errors import UsageError
from llmkern.workload.models import ModelSpec, build_config, first_line
from llmkern.workload.precision import DTYPES
from llmkern.workload.weights import OutlierPlan, RandomWeights, random_model

HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Source:
    """Where weights come from: *kind* is hub, local or random; *reason* says why random ones if they are."""

    kind: str
    reason: str = ""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, and what the report says of it.

    *weights_key* names the values of the weights: what is known of one set of them says nothing of another.
    """

    model: Any
    config: PretrainedConfig
    weights_source: str
    weights_note: str
    weights_key: str
    parameter_count: int
    weight_bytes: int
    outliers: OutlierPlan | None
    build_s: float


def load_model(
    spec: ModelSpec,
    source: Source,
    precision: str,
    device: torch.device,
    how: RandomWeights | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadedModel:
    """Return *spec* at *precision* on *device*; *how* quantizes, and draws random weights.

    Raises UsageError when the wanted weights cannot be had.
    """
    started_s = time.perf_counter()
    how = how or RandomWeights()
    # It warns at every call of every int8 layer of a bf16 model; writing that would be part of what is measured.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    plan = None
    if source.kind == "random":
        config = build_config(spec)
        model, plan = random_model(config, precision, device, how, progress)
        note = _random_note(how.seed, plan, source.reason)
        key = f"random, seed {how.seed}, {len(plan.dimensions) if plan else 0} outliers"
    else:
        model = _pretrained(spec, precision, device, how)
        config = model.config
        note = f"Weights of {spec.path or spec.hub_id}."
        key = f"{source.kind} {spec.hub_id or _fingerprint(spec)}"
    # The eos token would end a run early; the lengths of the study are exact.
    model.generation_config.eos_token_id = None
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return LoadedModel(
        model,
        config,
        source.kind,
        note,
        key,
        spec.parameters or sum(p.numel() for p in model.parameters()),
        stored_bytes(model),
        plan,
        time.perf_counter() - started_s,
    )


def _fingerprint(spec: ModelSpec) -> str:
    """Return what tells one folder of weights from another: the names, sizes and times of its files."""
    assert spec.path is not None
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(spec.path.glob("*.safetensors"))]
    return f"{zlib.crc32(repr(files).encode()):08x}"


def stored_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield all parameters and buffers of *model*, quantization scales included; shared ones come again."""
    for tensor in [*model.parameters(), *model.buffers()]:
        state = getattr(tensor, "quant_state", None)
        parts = [tensor, getattr(tensor, "SCB", None), getattr(tensor, "CB", None)]
        parts += [getattr(part, "absmax", None) for part in (state, getattr(state, "state2", None))]
        yield from (part for part in parts if isinstance(part, torch.Tensor))
    for module in model.modules():
        state = getattr(module, "state", None)
        for part in (getattr(state, "SCB", None), getattr(state, "CB", None)):
            if isinstance(part, torch.Tensor):
                yield part


def stored_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all stored tensors of *model*, shared ones once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in stored_tensors(model)}.values())


def choose_source(spec: ModelSpec, weights: str) -> Source:
    """Return where the weights of *spec* come from for ``--weights``; raises UsageError where they cannot be had."""
    if weights == "random":
        return Source("random", "as asked for")
    if spec.path is not None:
        if weights == "hub":
            raise UsageError(f"--weights hub, but --model {spec.path} is a folder: use --weights local or auto.")
        return Source("local")
    if weights == "local":
        raise UsageError(
            f"--weights local needs a folder: give its path as --model instead of {spec.name!r}, "
            "or use --weights random."
        )
    if spec.hub_id is None:
        if weights == "hub":
            raise UsageError(f"{spec.name} has no weights on the hub: use --weights random.")
        return Source("random", "the model has no published weights")
    problem = hub_problem(spec.hub_id)
    if problem is None:
        return Source("hub")
    if weights == "hub":
        raise UsageError(
            f"the weights of {spec.hub_id} cannot be had ({problem}): check the network, log in with 'hf auth login' "
            "for gated models, or use --weights random."
        )
    if not spec.architecture:
        raise UsageError(
            f"{spec.hub_id} cannot be had ({problem}) and its architecture is not known here: check the id and the "
            "network, or use a name from 'llmkern models'."
        )
    return Source("random", f"{spec.hub_id} cannot be had: {problem}")


def hub_problem(hub_id: str) -> str | None:
    """Return why the weights of *hub_id* cannot be loaded, None when they can; asks the hub once, briefly."""
    import huggingface_hub
    from huggingface_hub import constants

    for index in ("model.safetensors.index.json", "model.safetensors"):
        if isinstance(huggingface_hub.try_to_load_from_cache(hub_id, index), str):
            return None
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and they are not in the cache"
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(hub_id, "config.json"), timeout=HUB_TIMEOUT_S)
    except Exception as error:
        # Whatever the hub or the network says, random weights are the way on.
        return f"{type(error).__name__} from the hub"
    return None


def _pretrained(spec: ModelSpec, precision: str, device: torch.device, how: RandomWeights) -> Any:
    source = str(spec.path or spec.hub_id)
    dtype = DTYPES[precision]
    quantization = None
    if precision == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=how.int8_threshold)
    elif precision == "int4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=how.double_quant,
        )
    try:
        # Pickled weights could run anything; safetensors hold numbers.
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map={"": device}, quantization_config=quantization, use_safetensors=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # A folder that somebody else wrote can be wrong in every way; all of them are this sentence.
        raise UsageError(
            f"the weights of {source} cannot be loaded ({first_line(error)}): check the folder or id (weights have to "
            "be safetensors), or use --weights random."
        ) from error
    model.eval()
    return model


def load_tokenizer(spec: ModelSpec, source: Source) -> Any:
    """Return the tokenizer of *spec*, None if it has none or its weights are random: prompts are then token ids."""
    if source.kind == "random":
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(spec.path or spec.hub_id))
    except Exception:
        # Whatever is wrong with it, token ids are the way on, and the report names the source of the prompts.
        return None
    # From a folder without a vocabulary Transformers makes a tokenizer that knows its special tokens only.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def _random_note(seed: int, plan: OutlierPlan | None, reason: str) -> str:
    outliers = (
        f"{len(plan.dimensions)} hidden dimensions carry planted outlier features ({plan.source})"
        if plan is not None
        else "no outlier features are planted, so LLM.int8() finds none"
    )
    return f"Weights are random (seed {seed}; {reason}): energy and time are real, the text is not; {outliers}."
