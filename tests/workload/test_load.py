"""Loading: where the weights come from, and what is said when they cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmkern.errors import UsageError
from llmkern.workload.load import Source, choose_source, load_model, load_tokenizer
from llmkern.workload.models import find_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mine"
    load_model(find_model("qwen-tiny"), Source("random"), "bf16", CPU).model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_saved_model_is_loaded_with_its_own_weights(saved: Path, precision: str) -> None:
    spec = find_model(str(saved))
    source = choose_source(spec, "auto")
    loaded = load_model(spec, source, precision, CPU)
    assert (loaded.weights_source, load_tokenizer(spec, source)) == ("local", None)
    assert str(saved) in loaded.weights_note
    ids = torch.randint(10, 4000, (1, 16))
    random = load_model(find_model("qwen-tiny"), Source("random"), precision, CPU)
    with torch.inference_mode():
        ours, theirs = (m(input_ids=ids).logits.float() for m in (random.model, loaded.model))
    # Quantized at random's build or at loading, the weights are the same.
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.03
    assert loaded.weight_bytes == pytest.approx(random.weight_bytes, rel=0.01)


def test_auto_falls_back_to_random_weights_and_says_why() -> None:
    spec = find_model("qwen-tiny")
    loaded = load_model(spec, choose_source(spec, "auto"), "bf16", CPU)
    assert loaded.weights_source == "random"
    assert "no published weights" in loaded.weights_note
    assert "the text is not" in loaded.weights_note


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("qwen-7b", "hub", r"weights of Qwen/Qwen2\.5-7B-Instruct cannot be had .*--weights random"),
        ("qwen-7b", "local", r"--weights local needs a folder"),
        ("qwen-tiny", "hub", r"no weights on the hub"),
        ("someone/some-model", "auto", r"cannot be had .*architecture is not known here"),
    ],
)
def test_weights_that_cannot_be_had_are_a_sentence(model: str, weights: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_source(find_model(model), weights)


def test_a_torn_checkpoint_is_a_sentence(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:200] if "safetensors" in file.name else file.read_bytes())
    with pytest.raises(UsageError, match=r"weights of .* cannot be loaded"):
        load_model(find_model(str(tmp_path)), Source("local"), "bf16", CPU)
