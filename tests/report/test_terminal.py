"""The terminal report: what it says, at which width, and about which doubts."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmkern.attribute.attribution import attribute
from llmkern.estimate import Estimate
from llmkern.explain import Explanation
from llmkern.explain.statement import answer, state
from llmkern.report.console import PlainConsole
from llmkern.report.terminal import print_report
from llmkern.runfolder import RunFolder
from llmkern.text import count, quantity, short_name, with_interval
from tests.synthetic import Builder, Truth, synthetic_run


def printed(run: RunFolder, width: int = 100) -> str:
    console = PlainConsole(file=io.StringIO(), width=width)
    attribution = attribute(run)
    print_report(state(Explanation(attribution)), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_report_says_where_the_joules_went(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    text = printed(run)
    for words in ("prefill, per call", "decode, per token", "energy in kernels", "energy in gaps", "idle floor"):
        assert words in text
    # 120 W for 24 ms of gaps and 400 W for 6 ms of kernels in a token
    assert "2.88" in text
    assert "2.40" in text
    assert "kernel_0 → kernel_1" in text


@pytest.mark.parametrize("width", [80, 140])
def test_the_report_fits_the_terminal(tmp_path: Path, width: int) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    lines = printed(run, width).splitlines()
    assert max(len(line) for line in lines if "Run folder" not in line) <= width


def test_time_only_is_said(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run", energy=False)
    text = printed(run)
    assert "There is no energy" in text
    assert "energy in kernels" not in text
    assert "0.00 J" not in text


def test_an_interrupted_run_says_so_first(tmp_path: Path) -> None:
    builder = Builder(Truth())
    builder.play()
    run = builder.write(tmp_path / "run", status="interrupted")
    text = printed(run)
    assert text.index("This run is incomplete") < text.index("Per phase")
    # What was weighed before the interruption is what was played: 30 ms and 5.28 J per token.
    decode = state(Explanation(attribute(run))).phase("decode")
    assert decode.latency_s.value == pytest.approx(Truth().token_s, rel=0.01)
    assert decode.energy_j is not None
    assert decode.energy_j.value == pytest.approx(Truth().token_j, rel=0.02)


def test_a_run_killed_while_weighing_has_a_report(tmp_path: Path) -> None:
    builder = Builder(Truth())
    builder.rest(1)
    builder.range(builder.now_ns, "idle", "idle", "weigh")
    builder.busy.append((builder.now_ns, builder.now_ns + 1))
    run = builder.write(tmp_path / "run", status="interrupted")
    text = printed(run)
    assert "incomplete" in text
    assert "No complete weigh window" in text


def test_dropped_records_are_doubted(tmp_path: Path) -> None:
    synthetic_run(tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    facts["recorders"]["time"]["dropped_records"] = 17
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    assert "CUPTI dropped 17 records" in " ".join(printed(RunFolder(tmp_path / "run"), 400).split())


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0291, "s", "29.1 ms"),
        (1.5e-6, "s", "1.50 µs"),
        (6.1, "J", "6.10 J"),
        (0.0, "J", "0 J"),
        (None, "J", "–"),
        (float("nan"), "J", "–"),
        (-0.002, "J", "-2.00 mJ"),
        (215.4, "W", "215 W"),
        (2**30 * 1.5, "B", "1.50 GiB"),
    ],
)
def test_quantities(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_intervals() -> None:
    assert with_interval(Estimate(6.1, 6.0, 6.2, 5), "J") == "6.10 [6.00, 6.20] J"
    assert with_interval(Estimate(0.156, 0.150, 0.162, 5), "s") == "156 [150, 162] ms"
    assert with_interval(Estimate(6.1), "J") == "6.10 J"
    assert with_interval(None, "J") == "–"
    # R3: lopsided, of several sizes, on both sides of zero
    assert with_interval(Estimate(19.5, 13.97, 20.36, 6), "J") == "19.5 [14.0, 20.4] J"
    assert with_interval(Estimate(0.0, -0.42322906, 0.42322906, 6), "s") == "0 [-423, 423] ms"
    assert with_interval(Estimate(0.183, 0.1535, 0.2495, 6), "s") == "183 [154, 250] ms"
    assert with_interval(Estimate(0.8e-3, -0.1, 1.3, 6), "J") == "0.00 [-0.10, 1.30] J"


def test_counts() -> None:
    assert count(2760.0) == "2,760"
    assert count(0.9333) == "0.93"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void kernel_1<float>(int)", "kernel_1"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, "
            "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)",
            "vectorized_elementwise_kernel<CUDAFunctor_add fp32>",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::BinaryFunctor<c10::BFloat16, c10::BFloat16, "
            "c10::BFloat16, at::native::binary_internal::MulFunctor<float> >, std::array<char*, 3ul> >(int)",
            "vectorized_elementwise_kernel<MulFunctor fp32>",
        ),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
            "at::native::neg_kernel_cuda(at::TensorIteratorBase&)::{lambda()#2}::operator()() const::"
            "{lambda(c10::BFloat16)#1}>(int)>(int)",
            "elementwise_kernel<neg_kernel_cuda bf16>",
        ),
        (
            "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_nn_align1>(cutlass_80_simt::Params)",
            "cutlass_80_simt_sgemm_128x32_8x5_nn_align1",
        ),
        (
            "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, float, float>(int)",
            "gemvx::kernel",
        ),
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNT", "nvjet_tst_128x64_64x8_1x2_h_bz_TNT"),
        ("aten.mm.default", "aten.mm.default"),
        ("memcpy DtoH (pageable)", "memcpy DtoH (pageable)"),
        ("void (anonymous namespace)::elementwise_kernel_with_index<int>(int)", "elementwise_kernel_with_index"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_the_report_begins_with_the_answer(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    text = " ".join(printed(run, 400).split())
    first = (
        "A decoded token takes 30.0 ms and 5.28 J: 55% of the energy is spent while no kernel runs; the device is busy"
    )
    assert text.index(first) < text.index("Per phase")


def test_the_answer_of_a_run_that_cannot_be_split_claims_no_split(tmp_path: Path) -> None:
    """R5: a traced run that is longer than the weighed one carries no headline."""
    run, _ = synthetic_run(tmp_path / "run")
    found = attribute(run)
    slow = {name: replace(account, traced_busy_s=1.0) for name, account in found.accounts.items()}
    (first, *_) = answer(Explanation(replace(found, accounts=slow, memo={})))
    assert "how that splits is not known" in first
    assert "%" not in first
