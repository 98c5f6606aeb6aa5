"""Compiles the CUDA C++ kernels at run time with NVRTC, through CuPy, for the GPU that is there."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).resolve().parent
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
# Weights of a row per warp and step.
CHUNK = {"int8": 64, "nf4": 128, "int4": 128, "bf16": 64}


@dataclass(frozen=True)
class Build:
    """One build of ``linear.cuh``: what is computed, and how it is cut up.

    A block has *wn* x *wk* warps. Each has 16 x *mt* rows, 8 x *nt* tokens and *depth* chunks of weights in flight;
    *wn* of them stand beside one another, *wk* take turns along K, as do the *splits* blocks (1, 2, 4, 8) of a
    cluster (compute capability 9.0 and up). A thread holds *ahead* (1 or 2) parts of x. Registers are limited so
    that *blocks* of them fit a multiprocessor. With *persistent* there are no more blocks than fit, and each goes on to
    further rows. With *evict_first* weights leave L2 before all else; with
    *pdl* they are asked for before the preceding kernel of the stream has ended, which must therefore not have
    written them. *packed* weights are tiles (pack.py), those of NF4 with *scales* in fp32 (0), bf16 (1) or fp16 (2);
    a group has 2^*shift* weights; *tail* says that K is no multiple of a chunk. With *pairs* the first eight of every
    16 rows are gates of the others, and y has half as many; with *residual* something of y's shape is added to it.
    """

    format: str
    bf16: bool = True
    mt: int = 1
    nt: int = 1
    wn: int = 1
    wk: int = 8
    depth: int = 4
    ahead: int = 2
    splits: int = 1
    blocks: int = 2
    evict_first: bool = False
    persistent: bool = False
    pdl: bool = False
    packed: bool = False
    nested: bool = False
    scales: int = 0
    tail: bool = False
    shift: int = 6
    pairs: bool = False
    residual: bool = False

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return 16 * self.mt * self.wn

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return 8 * self.nt

    @property
    def warps(self) -> int:
        return self.wn * self.wk

    @property
    def wide(self) -> bool:
        """Whether NF4's table takes 64 KB instead of 32 KB: for few tokens, where instructions cost more than room."""
        return self.format == "nf4" and self.nt == 1

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, as ``linear.cuh`` lays it out."""
        table = 256 * (64 if self.wide else 32) * 4 + 256 * 4 * self.nested if self.format == "nf4" else 0
        sums = self.warps * 16 * (self.tokens + 1) * 4
        of_block = self.rows * self.tokens * 4 if self.splits > 1 else 0
        return table + sums + of_block

    def macros(self) -> dict[str, int]:
        """Return the macros that ``linear.cuh`` is compiled with."""
        return {
            "T_BF16": int(self.bf16),
            "MT": self.mt,
            "NT": self.nt,
            "WN": self.wn,
            "WK": self.wk,
            "DEPTH": self.depth,
            "AHEAD": self.ahead,
            "EVICT_FIRST": int(self.evict_first),
            "SPLITS": self.splits,
            "BLOCKS": self.blocks,
            "PDL": int(self.pdl),
            "PACKED": int(self.packed),
            "NESTED": int(self.nested),
            "SCALES": self.scales,
            "WIDE": int(self.wide),
            "TAIL": int(self.tail),
            "SHIFT": self.shift,
            "PAIRS": int(self.pairs),
            "RESIDUAL": int(self.residual),
        }

    def lighter(self) -> Build | None:
        """Return a build that computes the same with more registers to itself, None where there is none."""
        if self.ahead > 1:
            return replace(self, ahead=1)
        return replace(self, blocks=self.blocks - 1) if self.blocks > 1 else None

    def options(self) -> tuple[str, ...]:
        return ("-std=c++17", "-default-device", *(f"-D{name}={value}" for name, value in self.macros().items()))


@functools.cache
def source(format: str) -> str:
    """Return the CUDA C++ of *format* in one piece, so that a compiler's cache sees every change of it."""
    text = (FOLDER / "linear.cuh").read_text()
    return inlined(text.replace("#include FORMAT", f'#include "{format}_linear/cuda.cu"'), FOLDER)


def inlined(text: str, folder: Path) -> str:
    """Return *text* with the files of *folder* that it includes in the place of ``#include "NAME"``."""
    while match := _INCLUDE.search(text):
        text = text[: match.start()] + (folder / match[1]).read_text() + text[match.end() :]
    return text


_Compiled = TypeVar("_Compiled")


def without_spills(build: Build, compile: Callable[[Build], tuple[_Compiled, int]]) -> _Compiled:
    """Return what *compile* makes of *build*, or of the next lighter build that needs no local memory.

    *compile* returns the bytes of that too. A build is tuned on one GPU, for bf16 and K without a tail: what else is
    asked of it, or another compiler, may need some registers more. Where even the lightest spills, it is *build*.
    """
    first, spilled = compile(build)
    found, other = first, build.lighter() if spilled else None
    while spilled and other is not None:
        found, spilled = compile(other)
        other = other.lighter()
    return first if spilled else found


_lock = threading.Lock()
_modules: dict[tuple[Build, int], Any] = {}


def compiled(build: Build, device: int) -> Any:
    """Return the CuPy module of *build* on CUDA device *device*; compiles it at the first call.

    Raises ImportError where CuPy is not installed.
    """
    key = (build, device)
    if key not in _modules:
        import cupy

        def compile(build: Build) -> tuple[Any, int]:
            module = cupy.RawModule(code=source(build.format), options=build.options())
            module.compile()
            return module, int(module.get_function("linear").local_size_bytes)

        with cupy.cuda.Device(device):
            module = without_spills(build, compile)
        with _lock:
            _modules.setdefault(key, module)
    return _modules[key]


def spilled_bytes() -> int | None:
    """Return the most bytes per thread that any build of this process spilled, None before the first."""
    kernels = [module.get_function("linear") for module in list(_modules.values())]
    return max((int(kernel.local_size_bytes) for kernel in kernels), default=None)
