"""Random weights: reproducible, the same draw at every precision, with outliers where they are planted only."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from llmkern.workload.models import ModelSpec, build_config, find_model
from llmkern.workload.weights import RandomWeights, outlier_shares, random_model

CPU = torch.device("cpu")


def build(precision: str = "bf16", seed: int = 0, outliers: int = 6, name: str = "qwen-tiny", **changes: Any) -> Any:
    config = build_config(find_model(name))
    for key, value in changes.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return random_model(config, precision, CPU, RandomWeights(seed, outliers))


def test_a_seed_gives_the_same_weights_and_another_others() -> None:
    one, again, other = (build(seed=s)[0].state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.01), ("int4", 0.11)])
def test_quantized_weights_are_the_same_draw(precision: str, error: float) -> None:
    plain, quantized = build("bf16")[0], build(precision)[0]
    layer, reference = quantized.model.layers[1].mlp.up_proj, plain.model.layers[1].mlp.up_proj.weight.float()
    if precision == "int8":
        restored = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
    else:
        restored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert ((restored - reference).norm() / reference.norm()).item() < error
    # and the layer computes with them
    x = torch.randn(3, reference.shape[1], dtype=torch.bfloat16)
    expected = x.float() @ restored.T
    assert ((layer(x).float() - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_the_output_is_finite_and_not_constant(precision: str) -> None:
    model, _ = build(precision)
    with torch.inference_mode():
        logits = model(input_ids=torch.randint(10, 4000, (2, 12))).logits.float()
    assert logits.isfinite().all()
    assert logits.std() > 1e-3


def test_outliers_are_where_they_are_planted() -> None:
    # Attention's pattern differs from sequence to sequence: a single short one may pass the threshold in down_proj at
    # a quarter of its tokens, four long ones hardly ever. In fp32, which CPUs multiply several times faster than bf16.
    ids = torch.randint(10, 500, (4, 256), generator=torch.Generator().manual_seed(0))
    wide = {"name": "qwen-7b", "num_hidden_layers": 1, "vocab_size": 512}
    model, plan = build("fp32", outliers=6, **wide)
    assert plan is not None
    assert len(plan.dimensions) == 6
    shares = outlier_shares(model, ids)
    for name, share in shares.items():
        planted = name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        assert share > 0.9 if planted else share < 0.1, name
    bare, none = build("fp32", outliers=0, **wide)
    assert none is None
    assert set(outlier_shares(bare, ids).values()) == {0.0}


def test_tied_embeddings_are_one_tensor() -> None:
    model, _ = build(name="qwen-0.5b", num_hidden_layers=1, vocab_size=512)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", ["qwen-0.5b", "mistral-7b", "llama-8b"])
def test_every_family_can_be_built(name: str) -> None:
    small = {"num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
    model, _ = build(name=name, num_attention_heads=8, num_key_value_heads=2, **small)
    with torch.inference_mode():
        assert model(input_ids=torch.arange(10, 20)[None]).logits.isfinite().all()


def test_the_spec_of_a_model_is_plain_data() -> None:
    assert ModelSpec("x", None).parameters == 0
