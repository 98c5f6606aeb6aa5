"""What a candidate does wrong is found and named, in the worker's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmkern.errors import UsageError
from llmkern.evaluate import candidate, cuda_file
from llmkern.evaluate.correctness import compare
from llmkern.evaluate.job import Case, Job, Row
from llmkern.evaluate.verdict import judgement_of
from llmkern.evaluate.worker import Evaluator
from llmkern.kernels.build import inlined
from llmkern.record.device.cpu import CpuDevice

FILE = Path(__file__).parent / "candidates.py"


def row_of(name: str, format: str = "int8", m: int = 2) -> Row:
    case = Case(format, 128, 256, m)
    job = Job(name, f"{FILE}:{name}", (case,), "fp16", energy=False, interpret=True)
    return Evaluator(job, CpuDevice(), lambda _line: None).run(case, None)


def judged(name: str, format: str = "int8") -> str:
    return judgement_of(row_of(name, format), own=True)


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_a_good_candidate_is_right_on_all_inputs(format: str) -> None:
    row = row_of("good", format)
    assert judgement_of(row, own=True) == ""
    names = [check.name for check in row.checks]
    assert names == ["random", "outliers", "large weights", "small weights", "small x", "odd tail"]
    assert all(check.right and check.values for check in row.checks)
    # Nothing is timed or weighed without a GPU.
    assert row.latency is None
    assert row.energy is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        # One column of 128 doubled: matched shares and relative L2 both say so.
        ("wrong_scale", "wrong on random inputs: relative L2"),
        ("half_written", "leaves 50% of its output unwritten (or NaN) on random inputs"),
        ("nan", "leaves 0% of its output unwritten (or NaN)"),
        ("infinite", "returns 1 infinite values on random inputs"),
        ("wrong_shape", "it returned a tensor of shape [2, 127] where [2, 128] is asked for (random)."),
        ("wrong_dtype", "it returned torch.float32 where torch.float16, the type of x, is asked for (random)."),
        ("nothing", "it returned NoneType instead of a tensor [2, 128]."),
        ("changes_x", "it changed its input x (random): a linear layer must leave it as it is."),
        ("forgets_bias", "wrong on random inputs: relative L2"),
        ("raises", "it failed with RuntimeError: the kernel cannot do that"),
    ],
)
def test_what_a_candidate_does_wrong_is_named(name: str, told: str) -> None:
    assert told in judged(name)


def test_a_candidate_may_refuse_odd_tails_and_formats() -> None:
    row = row_of("no_tails")
    assert judgement_of(row, own=True) == ""
    assert [check.name for check in row.checks if not check.values] == ["odd tail"]
    assert judged("only_int8", "nf4") == "it takes int8, not nf4."
    assert judged("only_int8") == ""


def test_what_a_candidate_prepares_is_what_it_is_given() -> None:
    assert judged("prepared") == ""


def test_comparison_of_nothing_with_nothing_is_right_and_of_zeros_wrong() -> None:
    assert compare("x", torch.zeros(2, 2), torch.zeros(2, 2)).right
    assert not compare("x", torch.zeros(2, 2), torch.ones(2, 2)).right


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nowhere.py:f", "candidate file nowhere.py does not exist"),
        (f"{FILE}:absent", "there is no absent in"),
        (f"{FILE}:number", "number is a int and cannot be called"),
        ("just_a_name", "names no function: give MODULE:FUNCTION, FILE.py:FUNCTION or FILE.cu"),
        ("no_such_module:f", "candidate module 'no_such_module' cannot be imported"),
        ("peer:nobody", "there is no peer 'peer:nobody'"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_a_sentence(spec: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        candidate.load(spec)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("__global__ void f() {}", "declares no kernel, format, rows, tokens, threads"),
        (
            "// llmkern: kernel=f format=int9 rows=1 tokens=1 threads=32",
            "format=int9: it must be one of int8, nf4, int4",
        ),
        (
            "// llmkern: kernel=f format=int8 rows=0 tokens=1 threads=32",
            "rows=0: it must be a whole number, at least 1",
        ),
        ("// llmkern: kernel=f format=int8 rows=1 tokens=1 threads=many", "threads=many"),
    ],
)
def test_a_cuda_file_must_declare_its_kernel(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "kernel.cu"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        cuda_file.declaration(file)
    assert told in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        cuda_file.declaration(tmp_path / "absent.cu")


def test_the_examples_declare_what_they_must_and_what_they_include_is_in_them() -> None:
    for file in sorted((Path(__file__).parents[2] / "bench/candidates").glob("*.cu")):
        assert cuda_file.declaration(file)["format"] == "int8"
        text = inlined(file.read_text(), file.parent)
        assert "__global__ void gemv" in text
        assert '#include "' not in text


def test_names_come_from_the_spec_or_before_the_equals_sign() -> None:
    cases: dict[str, Any] = {
        "mine=a/b.py:f": ("mine", "a/b.py:f"),
        "a/b.py:f": ("f", "a/b.py:f"),
        "a/kernel.cu": ("kernel", "a/kernel.cu"),
        "package.module:f": ("f", "package.module:f"),
    }
    assert {text: candidate.split_spec(text) for text in cases} == cases
