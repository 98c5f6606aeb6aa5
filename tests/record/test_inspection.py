"""Pass inspect: operators with their module, shapes, bytes and FLOPs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules import module as module_hooks

from llmkern import session
from llmkern.attribute.attribution import attribute
from llmkern.progress import Stages
from llmkern.record.operators import signature_of
from llmkern.record.options import TraceOptions
from llmkern.record.passes.inspection import Inspector, OpCall
from llmkern.runfolder import RunFolder
from llmkern.workload.load import Source, load_model
from llmkern.workload.models import find_model

TOKENS = 8


def inspected(precision: str = "fp32") -> list[OpCall]:
    loaded = load_model(find_model("qwen-tiny"), Source("random"), precision, torch.device("cpu"))
    inspector = Inspector(loaded.model, lambda: ("prefill", 0))
    with torch.inference_mode(), inspector.watching():
        loaded.model(input_ids=torch.arange(10, 10 + TOKENS)[None])
    return inspector.calls


@pytest.fixture(scope="module")
def calls() -> list[OpCall]:
    return inspected()


def of(calls: list[OpCall], op: str, module: str) -> OpCall:
    return next(c for c in calls if c.op.startswith(op) and c.module.endswith(module))


def test_products_know_their_module_layer_shapes_bytes_and_flops(calls: list[OpCall]) -> None:
    call = of(calls, "aten.linear", "layers.2.mlp.down_proj")
    assert call.layer == 2
    assert call.shapes == f"1x{TOKENS}x768 256x768"
    assert call.dtypes == "fp32 fp32"
    assert call.flops == 2 * TOKENS * 768 * 256
    assert call.moved_bytes == 4 * (TOKENS * 768 + 256 * 768 + TOKENS * 256)


def test_attention_counts_two_products(calls: list[OpCall]) -> None:
    call = of(calls, "aten.scaled_dot_product_attention", "layers.0.self_attn")
    # 4 heads of 64, all keys
    assert call.flops == 4 * 4 * TOKENS * TOKENS * 64


def test_an_embedding_reads_only_what_it_gives_back(calls: list[OpCall]) -> None:
    call = of(calls, "aten.embedding", "embed_tokens")
    assert call.moved_bytes == 2 * TOKENS * 256 * 4 + TOKENS * 8
    assert call.layer is None


def test_each_layer_does_the_same_and_nothing_is_a_view(calls: list[OpCall]) -> None:
    per_layer = Counter(c.layer for c in calls)
    assert len({per_layer[i] for i in range(4)}) == 1
    assert not [c for c in calls if c.op.startswith(("aten.view", "aten.transpose", "aten.slice"))]
    assert all(c.start_ns <= c.end_ns for c in calls)


@pytest.mark.parametrize(("precision", "word"), [("int8", "int8"), ("int4", "4bit")])
def test_bitsandbytes_goes_through_the_dispatcher_like_any_other(precision: str, word: str) -> None:
    found = [c for c in inspected(precision) if c.op.startswith("bitsandbytes") and word in c.op]
    assert {c.layer for c in found} == {0, 1, 2, 3}
    if precision == "int8":
        product = of(found, "bitsandbytes.int8_mixed_scaled_mm", "layers.0.mlp.down_proj")
        assert product.flops == 2 * TOKENS * 768 * 256


def test_nothing_of_ours_stays_behind(calls: list[OpCall]) -> None:
    assert calls
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_run_knows_the_operator_of_every_kernel(tmp_path: Path, precision: str) -> None:
    options = TraceOptions(
        "qwen-tiny",
        precision=precision,
        device="cpu",
        prompt_tokens=16,
        new_tokens=6,
        warmup=1,
        repeats=2,
        unweighed_window_s=0.2,
        out=tmp_path / "run",
    )
    run = RunFolder(session.trace(options, Stages(quiet=True)))
    attribution = attribute(run)
    found = attribution.identified
    assert found is not None
    assert found.share > 0.999
    assert found.mismatches == []
    rows: Any = attribution.split("decode", ["op", "module"])
    products = rows[rows["module"] == "model.layers.*.mlp.down_proj"]
    assert products["launches"].sum() >= 4
    assert rows["launches"].sum() == pytest.approx(attribution.accounts["decode"].launches)
    assert "inspect" in set(run.table("kernels")["pass"])


def test_a_few_indices_more_or_less_are_the_same_work() -> None:
    def of_indices(count: int) -> str:
        return signature_of("op", [torch.ones(4, 8), torch.arange(count), torch.float16])

    assert of_indices(4) == of_indices(6) == "op[4x8 few; fp32 int64 to fp16]"
    assert of_indices(0) != of_indices(4) != of_indices(100)
