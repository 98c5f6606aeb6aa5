"""Decode from a captured step: the same tokens, with a capture that runs on the CPU what a graph runs on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkern.errors import DeviceError, UsageError
from llmkern.record.annotate import Annotator
from llmkern.record.device.cpu import CpuDevice
from llmkern.record.generation import Generation
from llmkern.workload.engine import CapturedDecode, Launch, static_cache, taken_apart
from llmkern.workload.load import Source, load_model
from llmkern.workload.models import find_model

TOKENS, NEW = 12, 7


class Captures:
    """Captures by remembering: what a graph would launch is called again with the tensors that it was captured with."""

    def __init__(self) -> None:
        self.captured = self.launched = 0

    def __call__(self, forward: Launch) -> Launch:
        self.captured += 1

        def launch() -> Any:
            self.launched += 1
            return forward()

        return launch


@pytest.fixture
def model() -> Any:
    return load_model(find_model("qwen-tiny"), Source("random"), "fp32", torch.device("cpu")).model


def tokens_of(model: Any, batch: int, cache: Any = None) -> list[list[int]]:
    """Return the tokens of two generations of different lengths."""
    ids = torch.randint(10, 4000, (batch, TOKENS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    made: list[list[int]] = []
    generate = model.generate

    def noted(**arguments: Any) -> Any:
        result = generate(**arguments)
        made.append(result[:, TOKENS:].flatten().tolist())
        return result

    model.generate = noted
    run = Generation(model, {"input_ids": ids, "attention_mask": mask}, Annotator(), lambda: None, cache)
    for new_tokens in (NEW, 3, 1, NEW):
        run(new_tokens)
    del model.generate
    return made


@pytest.mark.parametrize("batch", [1, 2])
def test_the_tokens_are_those_of_the_eager_model(model: Any, batch: int) -> None:
    expected = tokens_of(model, batch)
    captures = Captures()
    model.forward = CapturedDecode(model.forward, captures)
    cache = static_cache(model.config, TOKENS, NEW)
    assert tokens_of(model, batch, cache) == expected
    # The first decode step of all runs as it is; the other 13 of 6 + 2 + 0 + 6 come from one capture.
    assert (captures.captured, captures.launched) == (1, 13)


def test_taken_apart_it_runs_what_was_captured_operator_by_operator(model: Any) -> None:
    captures = Captures()
    model.forward = CapturedDecode(model.forward, captures)
    cache = static_cache(model.config, TOKENS, NEW)
    expected = tokens_of(model, 1, cache)
    launched = captures.launched
    with taken_apart(model):
        assert tokens_of(model, 1, cache) == expected
    assert captures.launched == launched
    assert tokens_of(model, 1, cache) == expected
    assert captures.launched > launched


def test_a_model_without_a_graph_has_nothing_to_take_apart(model: Any) -> None:
    with taken_apart(model):
        assert not isinstance(model.forward, CapturedDecode)


def test_a_step_that_cannot_be_captured_is_one_sentence(model: Any) -> None:
    def refuse(_forward: Launch) -> Launch:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    model.forward = CapturedDecode(model.forward, refuse)
    with pytest.raises(DeviceError, match=r"cannot be captured .*stream is capturing\): .*use --engine eager"):
        tokens_of(model, 1, static_cache(model.config, TOKENS, NEW))


def test_without_a_gpu_there_is_no_graph() -> None:
    with pytest.raises(UsageError, match="needs a GPU"):
        CpuDevice().check_graphs()
