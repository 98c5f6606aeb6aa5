"""Any decoder-only model: configurations of other families, built at random, sized, generated from and traced (U1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llmkern.errors import LlmkernError, UsageError
from llmkern.record.annotate import Annotator
from llmkern.record.generation import Generation, decoder_layers
from llmkern.workload.models import build_config, find_model, shape_of
from llmkern.workload.precision import Workload, required_bytes
from llmkern.workload.weights import RandomWeights, random_model

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 64},
    "opt": {**SMALL, "ffn_dim": 128, "max_position_embeddings": 64, "word_embed_proj_dim": 64},
    "gpt_neox": {**SMALL, "max_position_embeddings": 64},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 64, "multi_query": True},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320, "state_size": 8},
    "gemma3_text": {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "phi": {**SMALL, "max_position_embeddings": 64},
    "falcon": {**SMALL, "multi_query": True, "new_decoder_architecture": False},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320},
    "stablelm": {**SMALL, "num_key_value_heads": 4},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2},
}


def folder_of(tmp_path: Path, kind: str, **values: Any) -> Path:
    folder = tmp_path / kind
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **values}))
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_another_family_is_built_sized_and_generates(kind: str, tmp_path: Path) -> None:
    config = build_config(find_model(str(folder_of(tmp_path, kind, **MODELS[kind]))))
    shape = shape_of(config, kind)
    assert (shape.layers, shape.hidden, shape.vocabulary) == (2, 64, 320)
    assert required_bytes(config, Workload("fp32", 1, 8, 4)) > 2**20
    model, _ = random_model(config, "fp32", CPU, RandomWeights())
    ids = torch.randint(10, 300, (2, 8))
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    note = Annotator()
    Generation(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, note, lambda: None)(3)
    assert [r.phase for r in note.drain() if r.category == "phase"] == ["prefill", "decode"]
    assert len(decoder_layers(model)) == 2


def test_random_weights_are_the_architectures_own_where_it_knows_better(tmp_path: Path) -> None:
    gemma, _ = random_model(AutoConfig.for_model("gemma3_text", **MODELS["gemma3_text"]), "fp32", CPU, RandomWeights())
    # Its norms weigh with one plus their weight.
    assert gemma.model.layers[0].input_layernorm.weight.abs().median() == 0
    mamba, _ = random_model(AutoConfig.for_model("mamba", **MODELS["mamba"]), "fp32", CPU, RandomWeights())
    expected = torch.log(torch.arange(1, 9, dtype=torch.float32)).expand(128, 8)
    torch.testing.assert_close(mamba.backbone.layers[0].mixer.A_log, expected)


def test_a_key_value_head_that_no_config_names_is_found(tmp_path: Path) -> None:
    def kept(kind: str, **more: Any) -> tuple[int, int]:
        shape = shape_of(AutoConfig.for_model(kind, **{**MODELS[kind], **more}))
        return shape.kv_heads, shape.head_size

    assert kept("gpt2") == (4, 16)
    assert kept("gpt_bigcode") == (1, 16)
    assert kept("gemma3_text") == (2, 16)
    assert kept("mamba") == (0, 0)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("t5", {"d_model": 64}, r"t5\) is an encoder-decoder: llmkern traces decoder-only models"),
        ("bert", {"hidden_size": 64}, r"bert\) is an encoder"),
        ("vit", {"hidden_size": 64}, r"vit\) is not a causal language model"),
        ("nobody-knows", {}, r"configuration of .* cannot be had"),
    ],
)
def test_other_kinds_of_models_are_one_sentence(
    kind: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        build_config(find_model(str(folder_of(tmp_path, kind, **values))))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -64},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"vocab_size": [320]},
        {"rope_parameters": 7},
        {"hidden_act": "none such"},
    ],
)
def test_bad_fields_of_a_folder_are_one_sentence(values: dict[str, Any], tmp_path: Path) -> None:
    """U11: bad field types ended as a fault of llmkern."""
    folder = folder_of(tmp_path, "qwen2", **{**SMALL, "num_key_value_heads": 2, **values})
    with pytest.raises(LlmkernError, match=r"config|lacks|cannot be had|no model can be made"):
        _size_and_build(folder)


def _size_and_build(folder: Path) -> None:
    config = build_config(find_model(str(folder)))
    shape_of(config, str(folder))
    required_bytes(config, Workload("fp32", 1, 8, 4))
    random_model(config, "fp32", CPU, RandomWeights())


@pytest.mark.parametrize("text", ["", "[]", '"qwen2"', '{"model_type": 7}', "{" * 5000, '{"model_type": "qwen2"'])
def test_a_config_that_is_none_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="cannot be had"):
        build_config(find_model(str(tmp_path)))
