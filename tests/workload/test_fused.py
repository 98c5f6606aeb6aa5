"""The fused decoder against Transformers' own: the same weights, the same tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from llmkern.errors import UsageError
from llmkern.kernels.decode_layer import reference
from llmkern.kernels.formats import Int8Weight
from llmkern.workload.fused import FusedModel, check
from tests.test_cli import llmkern

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 500,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=256),
    "llama": LlamaConfig(
        **SIZES,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=8, sliding_window=None, tie_word_embeddings=True),
}


def model_of(name: str) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], torch_dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases that are not one and zero, or their places would not show.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompts(batch: int, length: int, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    ids, mask = torch.randint(0, 500, (batch, length)), torch.ones(batch, length, dtype=torch.long)
    mask[1:, :padded] = 0
    return ids, mask


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("padded", [0, 5])
def test_tokens_are_those_of_transformers(name: str, padded: int) -> None:
    model = model_of(name)
    ids, mask = prompts(3, 12, padded)
    expected = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    fused = FusedModel(copy.deepcopy(model), 40, 3)
    assert torch.equal(fused.generate(ids, mask, 24), expected)


def test_logits_are_those_of_transformers_step_by_step() -> None:
    model = model_of("qwen2")
    ids, mask = prompts(2, 9, 3)
    fused = FusedModel(copy.deepcopy(model), 20, 2)
    with torch.inference_mode():
        fused.prefill(ids, mask)
        for step in range(6):
            whole = torch.cat([ids, fused.tokens[:, 9 : 10 + step]], 1)
            seen = torch.cat([mask, torch.ones(2, step + 1, dtype=torch.long)], 1)
            places = (seen.cumsum(1) - 1).clamp(min=0)
            expected = model(input_ids=whole, attention_mask=seen, position_ids=places).logits[:, -1]
            torch.testing.assert_close(fused.logits(), expected, rtol=1e-4, atol=1e-4)
            fused.step()


def test_a_sequence_in_a_batch_is_as_alone() -> None:
    ids, mask = prompts(3, 12, 5)
    together = FusedModel(model_of("llama"), 40, 3).generate(ids, mask, 20)
    alone = FusedModel(model_of("llama"), 40, 1).generate(ids[1:2, 5:], mask[1:2, 5:], 20)
    assert torch.equal(together[1, 12:], alone[0, 7:])


def test_a_shortlist_chooses_what_all_rows_would() -> None:
    """Also where logits lie close together: a head of few different rows, all of them large."""
    model = model_of("qwen2")
    with torch.no_grad():
        head = model.lm_head.weight
        head.copy_(head[:4].repeat(len(head) // 4 + 1, 1)[: len(head)] + 1e-4 * torch.randn_like(head))
    ids, mask = prompts(2, 9, 3)
    by_all = FusedModel(copy.deepcopy(model), 40, 2).generate(ids, mask, 24)
    fused = FusedModel(copy.deepcopy(model), 40, 2, shortlist=True)
    assert fused.shortlist is not None
    assert torch.equal(fused.generate(ids, mask, 24), by_all)
    assert FusedModel(copy.deepcopy(model), 40, 9, shortlist=True).shortlist is None


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_the_largest_logit_is_on_the_shortlist_and_few_others_are(spread: float) -> None:
    torch.manual_seed(7)
    rows = torch.randn(4096, 512).to(torch.bfloat16)
    # Rows and elements of x of very different size: outliers.
    rows[::50] *= spread
    x = torch.randn(64, 512).to(torch.bfloat16)
    x[:, 3] *= 100 * spread
    weight = Int8Weight.quantize(rows)
    exact = x.double() @ rows.double().T
    rough = (x.double() @ weight.dequantized().double().T).to(torch.bfloat16)
    on = reference.allowed(x, rough, weight.scales)
    assert bool(on.gather(1, exact.argmax(1, keepdim=True)).all())
    # What is not on it is below the largest in fact.
    assert bool((exact.masked_fill(on, float("-inf")).amax(1) < exact.amax(1)).all())
    assert float(on.float().mean()) < 0.2


def test_where_nothing_is_a_number_all_rows_are_on_the_shortlist() -> None:
    x = torch.full((1, 64), float("nan"))
    assert bool(reference.allowed(x, torch.full((1, 32), float("nan")), torch.ones(32)).all())


def test_it_stops_when_all_have_met_an_end() -> None:
    ids, mask = prompts(2, 6, 0)
    fused = FusedModel(model_of("qwen2"), 70, 2)
    whole = fused.generate(ids, mask, 60)
    ends = frozenset(whole[:, 8].tolist())
    stopped = fused.generate(ids, mask, 60, ends, every=4)
    assert stopped.shape[1] == 6 + 4
    assert torch.equal(stopped, whole[:, :10])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "knows llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "knows SiLU"),
        ({"use_sliding_window": True, "sliding_window": 16}, "the last 16 tokens"),
    ],
)
def test_what_it_cannot_be_is_said(change: dict[str, Any], said: str) -> None:
    config = SimpleNamespace(**{**CONFIGS["qwen2"].to_dict(), **change})
    with pytest.raises(UsageError, match=said):
        check(config, 100, 1, torch.device("cpu"), torch.float32)
    with pytest.raises(UsageError, match="at most 64 sequences"):
        check(CONFIGS["qwen2"], 100, 65, torch.device("cpu"), torch.float32)


def test_more_tokens_than_places_are_refused() -> None:
    ids, mask = prompts(1, 6, 0)
    with pytest.raises(UsageError, match="exceed the cache of 10"):
        FusedModel(model_of("qwen2"), 10, 1).generate(ids, mask, 5)


def test_the_engine_is_recorded_and_reported_whole(tmp_path: Path) -> None:
    options = ("--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--warmup", "1", "--trace-repeats", "1")
    where = ("--device", "cpu", "--quick", "--quiet", "--unweighed-window-s", "0.2", "-o", tmp_path / "run")
    done = llmkern("trace", "--model", "qwen-tiny", "--engine", "fused", *options, *where, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["run"]["options"]["engine"] == "fused"
    (decode,) = (phase for phase in document["phases"] if phase["phase"] == "decode")
    # Seven a layer, the last norm, the head and the choice of a token, which is two launches on a GPU.
    layers = document["run"]["model"]["layers"]
    assert decode["launches"] == 7 * layers + 3
    kinds = {row["kind"] for row in document["tables"]["kinds"] if row["phase"] == "decode"}
    assert kinds == {"gemv", "attention", "norm", "sampling"}


def test_a_model_that_it_does_not_know_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 64}
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    options = ("--device", "cpu", "--weights", "random", "--prompt-tokens", "8", "--new-tokens", "4", "--quiet")
    done = llmkern("trace", "--model", tmp_path / "gpt2", "--engine", "fused", *options, "-o", tmp_path / "run")
    assert done.returncode == 2
    assert "--engine fused knows llama, mistral, qwen2, this is a gpt2" in done.stderr
    assert not (tmp_path / "run").exists()
