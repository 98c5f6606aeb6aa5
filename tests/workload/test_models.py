"""The registry: architectures that really have the parameters they claim, and names that lead to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkern.errors import UsageError
from llmkern.workload.models import REGISTRY, build_config, find_model
from llmkern.workload.precision import count_parameters


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
def test_the_architecture_has_the_published_number_of_parameters(spec) -> None:
    linear, other = count_parameters(build_config(spec))
    assert linear + other == spec.parameters


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("qwen-7b", "qwen-7b"),
        ("Qwen2.5-7B", "qwen-7b"),
        ("qwen/qwen2.5-0.5b-instruct", "qwen-0.5b"),
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-70b"),
        (" mistral-7b ", "mistral-7b"),
    ],
)
def test_names_aliases_and_hub_ids(name: str, found: str) -> None:
    assert find_model(name).name == found


def test_any_hub_id_and_any_folder_will_do(tmp_path: Path) -> None:
    assert find_model("someone/some-model").hub_id == "someone/some-model"
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)).path == tmp_path


@pytest.mark.parametrize(
    ("name", "near"), [("qwen-7x", "qwen-7b"), ("lama-8b", "llama-8b"), ("mistral", "mistral-7b"), ("zzz", "qwen-tiny")]
)
def test_an_unknown_name_offers_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=rf"no model '{name}'; nearest: .*{near}.*llmkern models"):
        find_model(name)


def test_a_folder_without_a_model_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json.*save_pretrained"):
        find_model(str(tmp_path))


def test_a_hub_configuration_that_cannot_be_had_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"configuration of someone/some-model cannot be had.*check the id"):
        build_config(find_model("someone/some-model"))
