"""The CUDA C++ kernels compiled for three generations of GPUs: nothing spills, and only what is there is used."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from llmkern.kernels import registry
from llmkern.kernels.build import Build, source

ROOT = Path(__file__).parents[2]

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings and nvidia-cuda-nvrtc compile the kernels")
GPU = "NVIDIA H100 80GB HBM3"
SHAPES = ((37888, 3584), (4096, 4096), (3584, 18944))


def cuobjdump() -> str:
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        pytest.skip("cuobjdump, which comes with Triton, is not here")
    return found


def compiled(build: Build, architecture: str) -> bytes:
    options = [*build.options(), f"--gpu-architecture={architecture}"]
    _, program = nvrtc.nvrtcCreateProgram(source(build.format).encode(), b"linear.cu", 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise AssertionError(log.decode())
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = b" " * size
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin


def local_bytes(cubin: bytes, folder: Path, tool: str) -> dict[str, int]:
    """Return the bytes of local memory (spills, arrays) of each kernel."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([tool, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True).stdout
    lines = text.splitlines()
    found = {}
    for name, usage in itertools.pairwise(lines):
        if "Function" in name:
            values = dict(part.split(":", 1) for part in usage.split() if part.count(":") == 1)
            found[name.split()[1].rstrip(":")] = int(values["STACK"]) + int(values["LOCAL"])
    return found


def builds(capability: tuple[int, int]) -> list[Build]:
    """Return the builds that the table chooses for SHAPES, those for tails, nested scales, fp16 and wide groups too."""
    found = set()
    for entry in registry.table_of(GPU):
        if (entry.n, entry.k) in SHAPES and entry.choice.backend == "cuda":
            choice = replace(entry.choice, tuning=registry.fitting(entry.choice.tuning, entry.n, capability))
            layer = registry.Layer(entry.format, entry.packed, entry.n, entry.k, entry.m)
            build = choice.build_of(layer, {"packed": entry.packed}, registry.torch.bfloat16, True)
            found.add(build)
    some = {(b.format, b.packed, b.nt): b for b in found}
    for build in some.values():
        found.add(replace(build, bf16=False))
        if not build.packed:
            found.add(replace(build, tail=True))
    rows = next(b for b in some.values() if b.format == "nf4" and not b.packed and b.nt == 1)
    found |= {replace(rows, nested=True), replace(rows, shift=8), replace(rows, nested=True, shift=7)}
    return sorted(found, key=str)


def spilled_alone(build: Build, architecture: str, tool: str) -> int:
    """Return what *build* spills when it is the only one that a process compiles."""
    program = "import tempfile; from pathlib import Path; from tests.kernels.test_cuda import *; "
    program += f"cubin = compiled({build!r}, {architecture!r}); folder = Path(tempfile.mkdtemp()); "
    program += f"print(max(local_bytes(cubin, folder, {tool!r}).values()))"
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_build_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    tool = cuobjdump()
    number = int(architecture[3:])
    every = builds((number // 10, number % 10))
    assert len(every) > 30

    def spilled(build: Build) -> tuple[Build, int]:
        folder = tmp_path / str(abs(hash(build)))
        folder.mkdir()
        return build, max(local_bytes(compiled(build, architecture), folder, tool).values())

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(spilled, every))
    # After a hundred compilations in one process NVRTC has spilled where it does not in a fresh one, which counts.
    doubtful = [build for build, count in found if count]
    assert [str(build) for build in doubtful if spilled_alone(build, architecture, tool)] == []
