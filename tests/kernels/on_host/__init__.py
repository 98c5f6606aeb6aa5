"""Builds the CUDA C++ kernels for the host, so that their arithmetic is tested without a GPU (see cuda.hpp)."""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# Functions that are inline PTX, and what stands there on the host.
_PTX = {
    "fp16_to_float": "return host::widened(bits, false);",
    "from_float": "return host::rounded(f, T_BF16);",
    "load_x": "return *reinterpret_cast<const Words*>(p);",
    "load_x_where": "if (there) w = *reinterpret_cast<const Words*>(p);",
    "load_streamed": "return *static_cast<const Words*>(p);",
    "fma2": "return host::fma2(a, b, c, T_BF16);",
    "mma": "host::mma(c, {a0, a1, a2, a3}, {b0, b1}, T_BF16);",
}
_LOP3 = re.compile(r'asm\("lop3\.b32[^;]*0xea;" : "=r"\((\w+)\) : "r"\(([^:]*)\), "n"\((\w+)\), "r"\((\w+)\)\);')


def on_host(text: str) -> str:
    """Return CUDA C++ *text* with its PTX replaced; what is left is of clusters and of programmatic launches."""
    for name, instead in _PTX.items():
        text = re.sub(rf"(INLINE [\w&]+ {name}\([^{{]*\{{).*?\n\}}", rf"\1 {instead} }}", text, flags=re.DOTALL)
    text = _LOP3.sub(r"\1 = ((\2) & \3) | \4;", text)
    return text.replace("extern __shared__", "extern")


@functools.cache
def library(text: str, macros: tuple[str, ...], kernels: tuple[str, ...]) -> Any:
    """Return the shared library of CUDA C++ *text* compiled with *macros* (-DNAME=VALUE): run_NAME for each kernel.

    run_NAME takes the grid's x, y, z, the threads of a block and the arguments as cuLaunchKernel does.
    """
    entries = "".join(
        f'extern "C" void run_{name}(unsigned x, unsigned y, unsigned z, unsigned threads, void** arguments) '
        f"{{ host::call({name}, {{x, y, z}}, threads, arguments); }}\n"
        for name in kernels
    )
    command = ["g++", "-std=c++20", "-O0", "-ffp-contract=off", "-fPIC", "-shared", "-w", f"-I{FOLDER}", *macros]
    # What is loaded needs its file no more.
    with tempfile.TemporaryDirectory() as folder:
        code, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        code.write_text(f'#include "cuda.hpp"\n{on_host(text)}\n{entries}')
        done = subprocess.run([*command, "-o", built, code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        return ctypes.CDLL(str(built))


def run(loaded: Any, name: str, grid: tuple[int, int, int], threads: int, arguments: Any) -> None:
    """Run kernel *name* of a library; *arguments* is an array of pointers to each argument."""
    getattr(loaded, f"run_{name}")(*grid, threads, arguments)
