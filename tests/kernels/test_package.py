"""The kernels travel with the package, and their folder's name hides nobody else's."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from bench.stages import STAGES, without
from bench.variants import VARIANTS, build_of, written
from llmkern.kernels.build import Build

ROOT = Path(__file__).parents[2]


def test_the_pipeline_runs_from_the_root_beside_the_package_called_kernels(tmp_path: Path) -> None:
    """With an __init__.py in our folder, Transformers imported ours in the place of the Hugging Face package."""
    program = "import kernels, sys; print(kernels.__file__); import llmkern.kernels.formats as f; print(f.__file__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    theirs, ours = done.stdout.splitlines()
    assert "site-packages" in theirs
    assert "site-packages" not in ours
    out = str(tmp_path / "run")
    command = [sys.executable, "-m", "llmkern.trace", "--model", "qwen-tiny", "--device", "cpu", "--out", out]
    command += ["--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1", "--warmup", "1", "--precision", "fp32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=200)
    assert done.returncode == 0, done.stderr


def test_an_installation_carries_the_kernels() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_namespace_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    assert {"llmkern.kernels", "llmkern.kernels.int8_linear", "llmkern.evaluate"} <= set(packages)
    carried = {
        f"llmkern/{file.relative_to(ROOT / 'llmkern')}"
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    sources = [f for f in (ROOT / "kernels").rglob("*") if f.suffix in (".cu", ".cuh", ".json")]
    assert {f"llmkern/kernels/{f.relative_to(ROOT / 'kernels')}" for f in sources} <= carried


@pytest.mark.parametrize("format", ["int8", "nf4", "int4"])
def test_every_stage_that_the_bench_takes_out_is_in_the_source(format: str) -> None:
    whole = without(format, "whole")
    changed = {stage: without(format, stage) for stage in STAGES if not stage.startswith("whole")}
    assert all(text != whole for text in changed.values())
    assert "mma.sync" not in changed["no MMAs"]


@pytest.mark.parametrize("format", ["int8", "nf4", "int4", "bf16"])
def test_every_variant_that_the_bench_tries_is_another_kernel(format: str) -> None:
    own = {name: variant for name, variant in VARIANTS.items() if format in variant.formats and "again" not in name}
    kernels = {(written(format, variant), build_of(Build(format), variant)) for variant in own.values()}
    assert len(kernels) == len(own) > 3
