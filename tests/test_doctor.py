"""llmkern doctor: every line has a state, and what is missing has a next step."""

from __future__ import annotations

import io

import pytest
import torch

from llmkern import doctor
from llmkern.doctor import LIMITED, MISSING, OK, Finding, examine, print_findings
from llmkern.report.console import PlainConsole


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return examine()


def test_everything_a_run_needs_is_looked_at(findings: list[Finding]) -> None:
    seen = " ".join(f.what for f in findings)
    for what in ("Python", "torch", "transformers", "bitsandbytes", "GPU", "CUPTI", "NVML", "RAPL"):
        assert what in seen
    assert {f.state for f in findings} <= {OK, LIMITED, MISSING}
    assert all(f.step for f in findings if f.state == MISSING)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_still_works(findings: list[Finding]) -> None:
    by_name = {f.what: f for f in findings}
    assert by_name["GPU"].state == MISSING
    assert "version 1300" in by_name["CUPTI"].found
    assert "no usable NVIDIA GPU" in by_name["CUPTI"].found


@pytest.mark.parametrize("width", [80, 140])
def test_it_fits_the_terminal(findings: list[Finding], width: int) -> None:
    console = PlainConsole(file=io.StringIO(), width=width)
    print_findings(findings, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "missing" in text


def test_a_missing_package_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "bitsandbytes" else "1")
    (finding,) = (f for f in doctor._libraries() if f.what == "bitsandbytes")
    assert finding.state == MISSING
    assert "pip install bitsandbytes" in finding.step
