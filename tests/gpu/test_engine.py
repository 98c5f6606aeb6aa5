"""Decode from a CUDA graph on a GPU: the eager model's tokens, one launch a forward, and int8 refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmkern.attribute.attribution import attribute
from llmkern.record.annotate import Annotator
from llmkern.record.generation import Generation
from llmkern.runfolder import RunFolder
from llmkern.workload.engine import use_graph
from llmkern.workload.load import Source, load_model
from llmkern.workload.models import find_model
from tests.test_cli import assert_sentence, llmkern


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_a_graph_gives_the_eager_models_tokens(precision: str) -> None:
    device = torch.device("cuda")
    model = load_model(find_model("qwen-tiny"), Source("random"), precision, device).model
    ids = torch.randint(10, 4000, (2, 12), device=device)
    made: list[list[int]] = []
    generate = model.generate

    def noted(**arguments: object) -> object:
        result = generate(**arguments)
        made.append(result[:, 12:].flatten().tolist())
        return result

    model.generate = noted
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    Generation(model, inputs, Annotator(), torch.cuda.synchronize)(8)
    cache = use_graph(model, 12, 8)
    captured = Generation(model, inputs, Annotator(), torch.cuda.synchronize, cache)
    for _ in range(3):
        captured(8)
    assert made[1:] == made[:1] * 3


def test_a_traced_graph_is_launched_once_a_token(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ("--quick", "--prompt-tokens", "48", "--new-tokens", "6", "--warmup", "2", "--repeats", "2")
    done = llmkern("trace", "--model", "qwen-tiny", "--engine", "graph", "--out", str(out), *small)
    assert done.returncode == 0, done.stderr
    assert "graph engine" in done.stdout
    found = attribute(RunFolder(out))
    trace = found.host_trace
    assert trace is not None
    decode = trace.tally[(trace.tally["phase"] == "decode") & trace.tally["api"].str.contains("GraphLaunch")]
    assert decode["launches"].sum() == pytest.approx(1.0)
    # Its kernels are known by the operators that were captured.
    assert found.identified is not None
    assert found.identified.share > 0.95
    assert set(found.kernels.loc[found.kernels["phase"] == "decode", "layer"].dropna()) == set(range(4))


def test_int8_cannot_be_captured_and_says_so(tmp_path: Path) -> None:
    done = llmkern(
        "trace", "--model", "qwen-tiny", "--precision", "int8", "--engine", "graph", "--out", str(tmp_path / "r")
    )
    assert_sentence(done, "cannot be captured in a CUDA graph", "--engine eager")
