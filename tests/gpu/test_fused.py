"""The fused decoder on a GPU: its kernels against their references, its tokens against its own, launch by launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkern.kernels import formats
from llmkern.kernels.decode_layer import cuda, reference
from llmkern.kernels.linear import linear
from llmkern.workload.fused import FusedModel, Shortlist
from llmkern.workload.load import Source, load_model
from llmkern.workload.models import find_model

BF16 = torch.bfloat16


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.float() - truth.float()).norm() / truth.float().norm())


@pytest.mark.parametrize("hidden", [896, 3584, 4096])
def test_a_norm_is_that_of_the_reference(hidden: int) -> None:
    x, weight = torch.randn(5, hidden, device="cuda", dtype=BF16), torch.randn(hidden, device="cuda", dtype=BF16)
    assert error(cuda.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)) < 1e-3


@pytest.mark.parametrize(
    ("heads", "group", "size", "places", "positions"),
    [
        (4, 7, 128, 600, [543]),
        (8, 4, 128, 300, [0, 100, 299]),
        (2, 7, 64, 200, [5, 150]),
        (8, 16, 128, 4096, [4000]),
        (1, 1, 64, 70, [63, 64]),
        (8, 4, 128, 700, [650] * 64),
    ],
)
def test_attention_is_that_of_the_reference(
    heads: int, group: int, size: int, places: int, positions: list[int]
) -> None:
    batch = len(positions)
    qkv = torch.randn(batch, (group + 2) * heads * size, device="cuda", dtype=BF16)
    keys, values = torch.randn(2, batch, heads, places, size, device="cuda", dtype=BF16)
    position = torch.tensor(positions, device="cuda", dtype=torch.int32)
    start = (position // 3).clamp(max=40).int()
    turn = 1e6 ** (-torch.arange(size // 2, device="cuda").float() / (size // 2))
    theirs = keys.clone(), values.clone()
    expected = reference.attention(qkv, *theirs, position, start, turn, 1.0)
    assert error(cuda.attention(qkv, keys, values, position, start, turn, 1.0), expected) < 5e-3
    assert error(keys, theirs[0]) < 1e-4
    assert torch.equal(values, theirs[1])


def test_the_first_of_the_largest_is_the_next_token() -> None:
    logits, embedding = (
        torch.randn(3, 50_000, device="cuda", dtype=BF16),
        torch.randn(50_000, 512, device="cuda", dtype=BF16),
    )
    logits[1, 77] = logits[1, 78] = 50
    logits[2] = -logits[2].abs() - 1
    hidden, best = torch.zeros(3, 512, device="cuda", dtype=BF16), torch.zeros(3, device="cuda", dtype=torch.int64)
    position = torch.tensor([4, 5, 9], device="cuda", dtype=torch.int32)
    tokens = torch.zeros(3, 10, device="cuda", dtype=torch.int64)
    first = [int((row == row.max()).nonzero()[0, 0]) for row in logits]
    cuda.next_token(logits, hidden, position, tokens, best, embedding)
    assert position.tolist() == [5, 6, 10]
    # The third has no place left.
    assert [int(tokens[0, 5]), int(tokens[1, 6])] == first[:2]
    assert torch.equal(hidden, embedding[first])
    assert best.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "hidden", "batch"), [(152064, 3584, 1), (128256, 4096, 8), (32000, 896, 3)])
def test_a_shortlist_chooses_the_largest_of_all_rows(
    vocabulary: int, hidden: int, batch: int, dtype: torch.dtype
) -> None:
    rows = (0.02 * torch.randn(vocabulary, hidden, device="cuda")).to(dtype)
    rows[vocabulary // 2] = rows[7]
    shortlist = Shortlist(rows, batch)
    embedding = torch.randn(vocabulary, hidden, device="cuda").to(dtype)
    for turn in range(4):
        x = torch.randn(batch, hidden, device="cuda").to(dtype)
        if turn == 3:
            # Two rows that are the same: the first.
            x[0] = rows[7] * 50
        position = torch.full((batch,), 4, device="cuda", dtype=torch.int32)
        tokens, best = (torch.zeros(batch, n, device="cuda", dtype=torch.int64) for n in (10, 1))
        best, new = best.view(-1), torch.zeros(batch, hidden, device="cuda", dtype=dtype)
        shortlist(x, new, position, tokens, best, embedding)
        exact = (x.double() @ rows.double().T).cpu()
        chosen = tokens[:, 5].cpu()
        # In fp32: what is chosen may lie below the largest by its rounding.
        off = exact.amax(1) - exact.gather(1, chosen[:, None])[:, 0]
        assert float(off.max()) < 1e-5 * float(exact.abs().max())
        assert turn < 3 or int(chosen[0]) == 7
        assert torch.equal(new, embedding[tokens[:, 5]])
        assert best.tolist() == shortlist.low.tolist() == [0] * batch
    x[0, 0] = float("nan")
    shortlist(x, new, position, tokens, best, embedding)
    torch.cuda.synchronize()
    assert 0 <= int(tokens[0, 6]) < vocabulary


@pytest.mark.parametrize("format", ["bf16", "int8", "nf4", "int4"])
@pytest.mark.parametrize("tokens", [1, 16, 70])
def test_residuals_and_pairs_are_those_of_the_reference(format: str, tokens: int) -> None:
    values = 0.05 * torch.randn(1024, 896, device="cuda")
    # Of NF4 the scales of one number of tokens have 16 bits, as in models that were loaded so.
    values = values.to(BF16) if format == "bf16" or tokens == 1 else values
    weight: Any = formats.Bf16Weight.of(values) if format == "bf16" else formats.quantize(format, values)
    x, bias = torch.randn(tokens, 896, device="cuda", dtype=BF16), torch.randn(1024, device="cuda", dtype=BF16)
    residual = torch.randn(tokens, 1024, device="cuda", dtype=BF16)
    whole = torch.nn.functional.linear(x.float(), weight.dequantized(), bias.float())
    gates, opened = whole.view(tokens, -1, 2, 8).unbind(2)
    paired = (torch.nn.functional.silu(gates) * opened).reshape(tokens, -1)
    for one in [weight, *([weight.to_packed()] if weight.can_pack() else [])]:
        assert error(linear(one, x, bias, residual=residual, pdl=True), whole + residual.float()) < 5e-3
        assert error(linear(one, x, bias, pairs=True, pdl=True), paired) < 5e-3


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("shortlist", [False, True])
def test_a_graph_gives_the_tokens_of_its_launches_one_by_one(precision: str, shortlist: bool) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(find_model("qwen-0.5b"), Source("random"), precision, torch.device("cuda:0")).model
    ids = torch.randint(0, 100_000, (2, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    fused = FusedModel(model, 80, 2, shortlist=shortlist)
    by_graph = fused.generate(ids, mask, 32)
    with fused.taken_apart():
        assert torch.equal(fused.generate(ids, mask, 32), by_graph)
    assert torch.equal(fused.generate(ids, mask, 32), by_graph)
