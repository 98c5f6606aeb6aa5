"""The CUDA C++ kernels compiled for three generations of GPUs: nothing spills, and only what is there is used."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from llmkern.kernels import registry
from llmkern.kernels.build import Build, source, without_spills
from llmkern.kernels.decode_layer import cuda as decode_layer

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
    return compiled_of(source(build.format), [*build.options(), f"--gpu-architecture={architecture}"])


def compiled_of(text: str, options: list[str]) -> bytes:
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], [])
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
    some = {(b.format, b.packed, b.nt): b for b in sorted(found, key=str)}
    for build in some.values():
        found.add(replace(build, bf16=False))
        if not build.packed:
            found.add(replace(build, tail=True))
    rows = next(b for b in some.values() if b.format == "nf4" and not b.packed and b.nt == 1)
    found |= {replace(rows, nested=True), replace(rows, shift=8), replace(rows, nested=True, shift=7)}
    return sorted(found, key=str)


# Builds of the table that need some registers more than there are: on another GPU, with a tail, in fp16.
HEAVY = {
    "sm_80": [Build("int4", mt=2, nt=2, wk=4, depth=2, blocks=4, evict_first=True, pdl=True, tail=True)],
    "sm_90": [
        Build("int4", mt=2, nt=2, wk=16, depth=2, blocks=1, evict_first=True, pdl=True, tail=True),
        Build("int4", bf16=False, mt=4, nt=2, wk=4, depth=1, evict_first=True, pdl=True, packed=True),
        Build("nf4", mt=4, nt=2, wk=4, depth=2, splits=2, blocks=1, pdl=True, tail=True),
    ],
    "sm_100": [],
}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_build_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    tool = cuobjdump()
    number = int(architecture[3:])
    every = builds((number // 10, number % 10)) + HEAVY[architecture]
    assert len(every) > 30

    def compile(build: Build) -> tuple[int, int]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        spilled = max(local_bytes(compiled(build, architecture), folder, tool).values())
        return spilled, spilled

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda build: without_spills(build, compile), every))
    assert [str(build) for build, spilled in zip(every, found, strict=True) if spilled] == []


def test_a_build_that_spills_gives_way_to_a_lighter_one_until_none_is_left() -> None:
    asked = []

    def compile(build: Build) -> tuple[tuple[int, int], int]:
        asked.append((build.ahead, build.blocks))
        return asked[-1], 8 * (build.blocks > least)

    build = Build("int8", ahead=2, blocks=3)
    least = 3
    assert without_spills(build, compile) == (2, 3)
    least = 1
    assert without_spills(build, compile) == (1, 1)
    assert asked == [(2, 3), (2, 3), (1, 3), (1, 2), (1, 1)]
    least = 0
    assert without_spills(build, compile) == (2, 3)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("group", "head"), [(7, 128), (4, 128), (7, 64), (16, 128)])
def test_the_kernels_of_a_decode_step_compile_without_spills(
    architecture: str, group: int, head: int, tmp_path: Path
) -> None:
    tool = cuobjdump()
    splits = 8 if architecture == "sm_90" else 1
    macros = {"T_BF16": 1, "PDL": 1, "HIDDEN": 3584, "HEAD": head, "GROUP": group, "SPLITS": splits}
    options = [*(f"-D{name}={value}" for name, value in macros.items()), "-std=c++17", "-default-device"]
    cubin = compiled_of(decode_layer.source(), [*options, f"--gpu-architecture={architecture}"])
    found = local_bytes(cubin, tmp_path, tool)
    names = {"rms_norm", "attention", "largest", "next_token", "shortlist_bound", "shortlist_largest"}
    assert set(found) == names
    assert not any(found.values())


@pytest.mark.parametrize(
    "build", [Build("bf16", pdl=True, evict_first=True, nt=nt, depth=d) for nt, d in ((1, 4), (2, 2))]
)
@pytest.mark.parametrize("change", [{}, {"pairs": True}, {"residual": True}])
def test_what_comes_after_a_product_costs_no_spill(build: Build, change: dict[str, bool], tmp_path: Path) -> None:
    cubin = compiled(replace(build, **change), "sm_90")
    assert not any(local_bytes(cubin, tmp_path, cuobjdump()).values())
