"""The CUDA C++ kernels run on the host (on_host/), launched by their own Python, against their references."""

from __future__ import annotations

import ctypes
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.variants import VARIANTS, build_of, written
from llmkern.kernels import formats, launch
from llmkern.kernels.build import Build, source
from llmkern.kernels.decode_layer import cuda, reference
from llmkern.kernels.linear import finished
from tests.kernels.on_host import library, run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the kernels for the host")
BF16 = torch.bfloat16
OF_A_STEP = ("rms_norm", "attention", "largest", "next_token", "shortlist_bound", "shortlist_largest")


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let launches run on the host instead: what the driver is given goes to a library of the same kernel.

    The text of a format's kernel is what *source* of the returned says.
    """
    state = SimpleNamespace(source=source)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(cuda, "_is_hopper", lambda device: False)
    monkeypatch.setattr(cuda, "_kernel", lambda name, macros, device, shared=0: (name, (macros, name)))
    monkeypatch.setattr(launch, "_function", lambda build, device, name: (build, name))
    result = SimpleNamespace(CUDA_SUCCESS=0)

    def configured(grid: Any, warps: int, *_: Any) -> Any:
        return SimpleNamespace(grid=grid, threads=32 * warps)

    def launched(config: Any, function: Any, arguments: int, extra: int) -> tuple[int]:
        what, name = function
        if isinstance(what, Build):
            names = ("linear",) if what.packed or what.pairs else ("linear", "linear_any")
            loaded = library(state.source(what.format), tuple(o for o in what.options() if o.startswith("-D")), names)
        else:
            loaded = library(cuda.source(), what, OF_A_STEP)
        run(loaded, name, config.grid, config.threads, ctypes.c_void_p(arguments))
        return (0,)

    driver = SimpleNamespace(CUresult=result, cuLaunchKernelEx=launched)
    for module in (cuda, launch):
        monkeypatch.setattr(module, "configured", configured)
        monkeypatch.setattr(module, "driver", lambda: driver)
    torch.manual_seed(11)
    return state


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.float() - truth.float()).norm() / truth.float().norm())


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_norm_is_that_of_the_reference(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 200, dtype=dtype), torch.randn(200, dtype=dtype)
    assert error(cuda.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)) < 1e-3


def test_attention_is_that_of_the_reference() -> None:
    heads, group, size, places = 2, 3, 64, 200
    position = torch.tensor([5, 150, 199], dtype=torch.int32)
    start = torch.tensor([0, 40, 3], dtype=torch.int32)
    qkv = torch.randn(3, (group + 2) * heads * size, dtype=BF16)
    keys, values = torch.randn(2, 3, heads, places, size, dtype=BF16)
    turn = 1e6 ** (-torch.arange(size // 2).float() / (size // 2))
    theirs = keys.clone(), values.clone()
    expected = reference.attention(qkv, *theirs, position, start, turn, 1.0)
    assert error(cuda.attention(qkv, keys, values, position, start, turn, 1.0), expected) < 5e-3
    assert error(keys, theirs[0]) < 1e-4
    assert torch.equal(values, theirs[1])


def state_of(batch: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    position = torch.arange(batch, dtype=torch.int32)
    tokens, best = torch.zeros(batch, 4, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    return torch.zeros(batch, hidden, dtype=dtype), position, tokens, best


def test_the_first_of_the_largest_is_the_next_token() -> None:
    logits, embedding = torch.randn(5, 3000, dtype=BF16), torch.randn(3000, 64, dtype=BF16)
    logits[1, 77] = logits[1, 2078] = 50
    logits[2] = -logits[2].abs() - 1
    hidden, position, tokens, best = state_of(5, 64, BF16)
    cuda.next_token(logits, hidden, position, tokens, best, embedding)
    first = logits.argmax(1)
    first[1] = 77
    # The last two have no place left.
    assert [int(tokens[b, b + 1]) for b in range(3)] == first[:3].tolist()
    assert position.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(hidden, embedding[first])
    assert best.tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("vocabulary", "hidden"), [(3000, 200), (1025, 64)])
def test_a_shortlist_chooses_the_largest_of_all_rows(vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
    rows, embedding = (0.02 * torch.randn(vocabulary, hidden)).to(dtype), torch.randn(vocabulary, hidden).to(dtype)
    rows[500] = rows[7]
    x = torch.randn(4, hidden).to(dtype)
    # Two rows that are the same: the first is taken.
    x[1] = rows[7] * 50
    weight = formats.Int8Weight.quantize(rows)
    rough = (x.float() @ weight.dequantized().T).to(dtype)
    state = state_of(4, hidden, dtype)
    low, sums = torch.zeros(4, dtype=torch.int32), torch.zeros(4)
    cuda.next_token_of_shortlist(x, rough, weight.scales, rows, *state, low, sums, embedding)
    exact = x.double() @ rows.double().T
    _, position, tokens, best = state
    chosen = [int(tokens[b, b + 1]) for b in range(3)]
    assert chosen == exact.argmax(1)[:3].tolist()
    assert chosen[1] == 7
    assert torch.equal(state[0][:3], embedding[chosen])
    assert low.tolist() == best.tolist() == [0] * 4
    torch.testing.assert_close(sums, x.float().abs().sum(1), rtol=1e-4, atol=0)
    # Rows that are ruled out are not read: what they hold then does not matter.
    on = reference.allowed(x, rough, weight.scales)
    assert float(on.float().mean()) < 0.5
    hidden_too, position, tokens, best = state_of(1, hidden, dtype)
    lost = rows.masked_fill(~on[0][:, None], float("nan"))
    cuda.next_token_of_shortlist(
        x[:1], rough[:1], weight.scales, lost, hidden_too, position, tokens, best, low, sums, embedding
    )
    assert int(tokens[0, 1]) == chosen[0]


def test_where_nothing_is_a_number_some_token_is_chosen() -> None:
    x, rows = torch.full((1, 64), float("nan"), dtype=BF16), torch.randn(300, 64, dtype=BF16)
    hidden, position, tokens, best = state_of(1, 64, BF16)
    low, sums = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    rough = torch.full((1, 300), float("nan"), dtype=BF16)
    cuda.next_token_of_shortlist(x, rough, torch.ones(300), rows, hidden, position, tokens, best, low, sums, rows)
    assert 0 <= int(tokens[0, 1]) < 300
    assert low.tolist() == [0]


WEIGHTS = {
    "int8": lambda w: formats.Int8Weight.quantize(w),
    "nf4": lambda w: formats.Nf4Weight.quantize(w, 64),
    "nf4 of bf16": lambda w: formats.Nf4Weight.quantize(w.to(BF16), 64),
    "nf4 of fp16": lambda w: formats.Nf4Weight.quantize(w.half(), 64),
    "nf4 nested": lambda w: formats.Nf4Weight.quantize(w, 64, nested=True),
    "int4": lambda w: formats.Int4Weight.quantize(w, 64),
    "bf16": lambda w: formats.Bf16Weight.of(w.to(BF16)),
}


@pytest.mark.parametrize("name", list(WEIGHTS))
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("packed", [True, False])
def test_products_are_those_of_dequantized_weights(name: str, tokens: int, packed: bool) -> None:
    weight: Any = WEIGHTS[name](0.05 * torch.randn(64, 256))
    if packed and not weight.can_pack():
        pytest.skip("not packed in this format")
    weight = weight.to_packed() if packed else weight
    x, bias = torch.randn(tokens, 256, dtype=BF16), torch.randn(64, dtype=BF16)
    # Elements of very different size.
    x[:, ::7] *= 300
    whole = torch.nn.functional.linear(x.float(), weight.dequantized(), bias.float())
    y = torch.empty(tokens, 64, dtype=BF16)
    facts = weight.facts()
    if tokens == 1:
        launch.launch(Build(weight.format, wk=2, depth=2, **facts), weight.struct(), x, bias, y)
        assert error(y, whole) < 4e-3
        paired = torch.empty(tokens, 32, dtype=BF16)
        launch.launch(Build(weight.format, wk=2, pairs=True, **facts), weight.struct(), x, bias, paired)
        assert error(paired, finished(whole, None, True)) < 6e-3
    else:
        residual = torch.randn(tokens, 64, dtype=BF16)
        build = Build(weight.format, nt=2, wn=2, wk=1, depth=2, residual=True, **facts)
        launch.launch(build, weight.struct(), x, bias, y, residual)
        assert error(y, whole + residual.float()) < 4e-3


@pytest.mark.parametrize("format", ["int8", "nf4", "int4", "bf16"])
def test_every_variant_of_the_bench_computes_the_same(format: str, host: SimpleNamespace) -> None:
    weight: Any = WEIGHTS[format](0.05 * torch.randn(32, 256))
    weight = weight.to_packed() if weight.can_pack() else weight
    x = torch.randn(3, 256, dtype=BF16)
    plain = Build(format, wk=2, depth=2, **weight.facts())
    found = []
    for variant in VARIANTS.values():
        if format in variant.formats and not variant.turned:
            host.source = lambda format, variant=variant: written(format, variant)
            y = torch.empty(3, 32, dtype=BF16)
            launch.launch(build_of(plain, variant), weight.struct(), x, None, y)
            found.append(y)
    assert len(found) >= 3
    assert error(found[0], x.float() @ weight.dequantized().T) < 4e-3
    assert all(torch.equal(y, found[0]) for y in found)
