"""The study's models as data, and the way from a name to an architecture."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkern.errors import UsageError

# Transformers takes seconds to import; a mistyped name should not have to wait for it.
if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CLASSES = {"qwen2": "Qwen2Config", "mistral": "MistralConfig", "llama": "LlamaConfig"}


@dataclass(frozen=True)
class ModelSpec:
    """One model: its name, where its weights live, and the values of its published ``config.json``.

    *parameters* counts every weight, tied embeddings once. *path* is set for a local folder.
    """

    name: str
    hub_id: str | None
    aliases: tuple[str, ...] = ()
    architecture: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    path: Path | None = None


def _qwen(size: str, parameters: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> ModelSpec:
    # Up to 3B the output layer is the embedding; the vocabulary is padded differently from 7B on.
    small = size in ("0.5", "1.5", "3")
    return ModelSpec(
        f"qwen-{size}b",
        f"Qwen/Qwen2.5-{size}B-Instruct",
        (f"qwen2.5-{size}b", f"qwen2.5-{size}b-instruct"),
        {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": 151936 if small else 152064,
            "tie_word_embeddings": small,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
        },
        parameters,
    )


_LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama(size: str, parameters: int, hidden: int, inner: int, layers: int, heads: int) -> ModelSpec:
    return ModelSpec(
        f"llama-{size}b",
        f"meta-llama/Llama-3.1-{size}B-Instruct",
        (f"llama-3.1-{size}b", f"llama-3.1-{size}b-instruct", f"llama3.1-{size}b"),
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "rope_scaling": _LLAMA_ROPE,
            "max_position_embeddings": 131072,
        },
        parameters,
    )


REGISTRY: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "qwen-tiny",
            None,
            (),
            {
                "model_type": "qwen2",
                "hidden_size": 256,
                "intermediate_size": 768,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 4096,
                "tie_word_embeddings": False,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1e6,
                "max_position_embeddings": 8192,
            },
            5_247_232,
        ),
        _qwen("0.5", 494_032_768, 896, 4864, 24, 14, 2),
        _qwen("1.5", 1_543_714_304, 1536, 8960, 28, 12, 2),
        _qwen("3", 3_085_938_688, 2048, 11008, 36, 16, 2),
        _qwen("7", 7_615_616_512, 3584, 18944, 28, 28, 4),
        _qwen("14", 14_770_033_664, 5120, 13824, 48, 40, 8),
        ModelSpec(
            "mistral-7b",
            "mistralai/Mistral-7B-Instruct-v0.3",
            ("mistral-7b-instruct", "mistral-7b-v0.3"),
            {
                "model_type": "mistral",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 32768,
                "tie_word_embeddings": False,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "sliding_window": None,
                "max_position_embeddings": 32768,
            },
            7_248_023_552,
        ),
        _llama("8", 8_030_261_248, 4096, 14336, 32, 32),
        _llama("70", 70_553_706_496, 8192, 28672, 80, 64),
    )
}


def find_model(name: str) -> ModelSpec:
    """Return the model called *name*: a registry name or alias, a local folder, or a Hugging Face id.

    Raises UsageError that offers the nearest names.
    """
    wanted = name.strip().lower()
    if not wanted:
        raise UsageError("--model is empty: give a name from 'llmkern models', a Hugging Face id or a local folder.")
    for spec in REGISTRY.values():
        if wanted in (spec.name, *spec.aliases, *([spec.hub_id.lower()] if spec.hub_id else [])):
            return spec
    try:
        folder = Path(name).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        # A name that no file can have, or a home that nobody has.
        raise UsageError(
            f"--model {name[:60]!r} is no name of a model and no path ({first_line(error)}): see 'llmkern models'."
        ) from error
    if is_folder:
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"{folder} has no config.json, so it is not a model folder: give one that save_pretrained wrote."
            )
        return ModelSpec(folder.name, None, path=folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        return ModelSpec(name, name)
    known = [n for spec in REGISTRY.values() for n in (spec.name, *spec.aliases)]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5) or list(REGISTRY)
    raise UsageError(
        f"there is no model {name!r}; nearest: {', '.join(near)}. 'llmkern models' lists all, and a Hugging Face id "
        "(org/name) or a local folder will do as well."
    )


def build_config(spec: ModelSpec) -> PretrainedConfig:
    """Return the Transformers configuration of *spec*: that of a decoder which generates text.

    Raises UsageError when it has to come from a folder or the hub and cannot be had, or is of another kind of model.
    """
    import transformers

    if spec.architecture:
        values = dict(spec.architecture)
        rope = {"rope_theta": values.pop("rope_theta"), **values.pop("rope_scaling", {"rope_type": "default"})}
        architecture = getattr(transformers, _CLASSES[values.pop("model_type")])
        configuration: PretrainedConfig = architecture(rope_parameters=rope, **values)
        return configuration
    source = str(spec.path or spec.hub_id)
    try:
        found = transformers.AutoConfig.from_pretrained(source)
    except Exception as error:
        # A folder that somebody else wrote can be wrong in every way; all of them are this sentence.
        raise UsageError(
            f"the configuration of {source} cannot be had ({first_line(error)}): check the id and the network, log in "
            "with 'hf auth login' for gated models, or use a name from 'llmkern models'."
        ) from error
    check_decoder(found, source)
    return found


def check_decoder(config: PretrainedConfig, source: str) -> None:
    """Raise UsageError unless *config* is of a decoder-only language model."""
    from transformers.models.auto import modeling_auto

    kind = str(getattr(config, "model_type", "unknown"))
    what = None
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder"
    elif kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what = "not a causal language model"
    elif kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True):
        what = "an encoder"
    if what is not None:
        raise UsageError(
            f"{source} ({kind}) is {what}: llmkern traces decoder-only models, as AutoModelForCausalLM loads them; "
            "'llmkern models' lists some."
        )


def first_line(error: BaseException) -> str:
    """Return the first line of what *error* says, its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that its memory depends on, whatever its architecture calls them.

    *kv_heads* x *head_size* values are kept per layer, token and of keys and values each; 0 where no attention is.
    """

    layers: int
    hidden: int
    inner: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int | None


def shape_of(config: Any, source: str = "the model") -> Shape:
    """Return the sizes in *config*; raises UsageError for one that says none, or ones that cannot be."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

    def size(*names: str) -> int | None:
        for name in names:
            value = getattr(text, name, None)
            if isinstance(value, list | tuple) and value:
                # One per layer, where layers differ: the largest is what memory needs.
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    layers, hidden, vocabulary = size("num_hidden_layers"), size("hidden_size"), size("vocab_size")
    if layers is None or hidden is None or vocabulary is None:
        raise UsageError(
            f"the configuration of {source} lacks a positive num_hidden_layers, hidden_size or vocab_size: it is of no "
            "decoder-only language model that llmkern knows how to size."
        )
    heads = size("num_attention_heads")
    kv_heads = 1 if getattr(text, "multi_query", False) else size("num_key_value_heads", "num_kv_heads") or heads
    head_size = size("head_dim") or (hidden // heads if heads else 0)
    inner = size("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or 4 * hidden
    return Shape(layers, hidden, inner, kv_heads or 0, head_size, vocabulary, size("max_position_embeddings"))
