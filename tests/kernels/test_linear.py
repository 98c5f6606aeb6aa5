"""The linear operators on the CPU: reference, Triton in its interpreter, torch.compile, refusals."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from llmkern.kernels import launch, modules, ops, registry
from llmkern.kernels.build import Build
from llmkern.kernels.formats import Int4Weight, Int8Weight, Nf4Weight, Weight
from llmkern.kernels.int8_linear.reference import reference
from llmkern.kernels.linear import linear
from llmkern.kernels.registry import Choice


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm())


def weights(n: int, k: int) -> list[Weight]:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(2)) / k**0.5
    found: list[Weight] = [Int8Weight.quantize(w)]
    if k % 64 == 0:
        # Triton's interpreter multiplies bf16 as integers: its x is fp16, and so are int4's scales.
        found += [Int4Weight.quantize(w, 64, torch.float16), Nf4Weight.quantize(w, 64, nested=True)]
    if n * k % 64 == 0:
        found.append(Nf4Weight.quantize(w))
    return found


@pytest.mark.parametrize(("n", "k", "m"), [(48, 256, 1), (33, 192, 3), (64, 97, 2), (70, 128, 17), (16, 64, 33)])
def test_triton_and_the_reference_agree(n: int, k: int, m: int) -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(m, k, generator=random).half()
    bias = torch.randn(n, generator=random).half()
    for weight in weights(n, k):
        expected = reference(weight, x, bias)  # type: ignore[arg-type]
        assert relative(linear(weight, x, bias, Choice("triton")), expected) < 2e-3, weight.format
        assert relative(linear(weight, x, bias), expected) < 2e-3


def test_operators_are_traced_by_torch_compile_and_pass_opcheck() -> None:
    assert ops is not None
    weight = Int8Weight.quantize(torch.randn(16, 64))
    x = torch.randn(2, 3, 64)
    torch.library.opcheck(torch.ops.llmkern.int8_linear.default, (x, weight.codes, weight.scales))
    compiled = torch.compile(lambda v: torch.ops.llmkern.int8_linear(v, weight.codes, weight.scales), backend="eager")
    assert torch.allclose(compiled(x), linear(weight, x))
    assert compiled(x).shape == (2, 3, 16)


def _refused(**changed: Any) -> str:
    weight = Int4Weight.quantize(torch.randn(16, 64), 64)
    arguments = {"weight": weight, "x": torch.randn(1, 64).bfloat16(), "bias": None} | changed
    with pytest.raises(ValueError, match="int4_linear") as caught:
        linear(**arguments)
    return str(caught.value)


def test_what_does_not_fit_together_is_refused_with_its_values() -> None:
    assert "x is (1, 65), but the weights have K = 64" in _refused(x=torch.randn(1, 65))
    assert "bias is (3,)" in _refused(bias=torch.zeros(3))
    # Scales of another type would be read as if they were x's: garbage, not an error of the GPU.
    assert "scales are torch.bfloat16, x is torch.float16" in _refused(x=torch.randn(1, 64).half())


def test_groups_that_no_kernel_knows_are_refused_or_take_the_general_path() -> None:
    """bitsandbytes has blocks of 32: the fast path would scale 64 codes with the first of two scales."""
    w = torch.randn(16, 192)
    with pytest.raises(ValueError, match="groups of 96 weights share a scale: it must be a power of two"):
        linear(Nf4Weight.quantize(w, 96), torch.randn(1, 192))
    assert not launch.fits(Build("nf4", shift=5), 64, 192, 0)
    assert launch.fits(Build("nf4", shift=6), 64, 192, 0)
    assert not launch.fits(Build("int8"), 64, 192, 8)


def test_a_bitsandbytes_model_keeps_its_weights_when_the_kernels_are_applied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False),
        bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4"),
        nn.Linear(32, 8),
    ).to("cpu")
    x = torch.randn(4, 128)
    before = model(x)
    assert modules.apply(model) == 2
    assert [type(m).__name__ for m in model] == ["FusedLinear", "FusedLinear", "Linear"]
    assert relative(model(x), before) < 5e-3
    assert "nf4, 128 -> 64, packed" in repr(model)
    assert relative(copy.deepcopy(model)(x), before) < 5e-3


def test_the_table_chooses_the_nearest_shape_and_the_next_number_of_tokens() -> None:
    tuning = tuple((name, 1) for name in registry.TUNED)
    entries = tuple(
        registry.Entry("int8", False, n, 4096, m, 1.0, Choice("cuda", ((f"{n} {m}", 1), *tuning)))
        for n in (1024, 16384)
        for m in (1, 8)
    )

    def chosen(n: int, m: int) -> str:
        choice = registry.nearest(entries, registry.Layer("int8", False, n, 4096, m))
        assert choice is not None
        return choice.tuning[0][0]

    assert chosen(1500, 1) == "1024 1"
    assert chosen(1500, 2) == "1024 8"
    assert chosen(9000, 300) == "16384 8"
    assert registry.nearest(entries, registry.Layer("nf4", False, 1024, 4096, 1)) is None


def test_a_choice_is_made_to_fit_older_gpus_and_small_layers() -> None:
    tuning = (("mt", 4), ("wn", 2), ("nt", 2), ("wk", 16), ("splits", 2))
    assert dict(registry.fitting(tuning, 64, (9, 0))) == {"mt": 4, "wn": 1, "nt": 2, "wk": 16, "splits": 2}
    assert dict(registry.fitting(tuning, 4096, (8, 0))) == {"mt": 4, "wn": 2, "nt": 2, "wk": 8, "splits": 1}


def test_the_measured_table_can_be_read_and_covers_every_format() -> None:
    entries = registry.table_of("NVIDIA H100 80GB HBM3")
    assert {(e.format, e.packed, e.m) for e in entries} >= {
        (f, p, m) for f in ("int8", "nf4", "int4") for p in (True, False) for m in (1, 8, 32)
    }
    with pytest.warns(UserWarning, match="no kernels were measured on some other GPU"):
        registry.table_of("some other GPU")
