"""Chooses how a linear layer is computed: from a table measured on a GPU (measured/*.json), not by a rule of thumb.

``python -m bench.tune`` measures a table; a GPU without one takes the one that is there, and says so.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmkern.kernels.build import CHUNK, Build
from llmkern.kernels.formats import Weight

TABLES = Path(__file__).resolve().parent / "measured"
# A build's parameters that a table holds; all else follows from weights and activations.
TUNED = ("mt", "nt", "wn", "wk", "depth", "ahead", "splits", "blocks", "evict_first", "persistent")
# Above so many tokens weights that need no conversion are cuBLAS'.
MOST_TOKENS = 64
# Above so many tokens any weights are dequantized for cuBLAS: that takes 28 ms for all of a 7B model, the tiles of 64
# tokens take 14 ms more than cuBLAS for every 512 of them (H100).
MOST_CONVERTED_TOKENS = 1024
SWITCHES = ("evict_first", "persistent")


@dataclass(frozen=True)
class Choice:
    """What computes a layer: *backend* "cuda" with its *tuning*, "triton" or "reference" (dequantize, then
    multiply).
    """

    backend: str
    tuning: tuple[tuple[str, int], ...] = ()

    def build(
        self, weight: Weight, dtype: torch.dtype, pdl: bool, pairs: bool = False, residual: bool = False
    ) -> Build:
        """Return the build of this choice for *weight* and activations of *dtype*."""
        layer = Layer(weight.format, weight.packed, weight.n, weight.k, 0)
        return replace(self.build_of(layer, weight.facts(), dtype, pdl), pairs=pairs, residual=residual)

    def build_of(self, layer: Layer, facts: dict[str, Any], dtype: torch.dtype, pdl: bool) -> Build:
        """Return the build for *layer* whose weights say *facts* of themselves."""
        tuning: dict[str, Any] = {n: bool(value) if n in SWITCHES else value for n, value in self.tuning}
        tail = layer.k % CHUNK[layer.format] != 0
        return Build(format=layer.format, bf16=dtype == torch.bfloat16, pdl=pdl, tail=tail, **facts, **tuning)


@dataclass(frozen=True)
class Entry:
    """One measured row: the fastest choice for *m* tokens of an [n, k] layer, and its time."""

    format: str
    packed: bool
    n: int
    k: int
    m: int
    us: float
    choice: Choice


@functools.cache
def table_of(gpu: str) -> tuple[Entry, ...]:
    """Return the table measured on *gpu*, or, with a warning, the first there is; empty if there is none."""
    paths = sorted(TABLES.glob("*.json"))
    own = [path for path in paths if json.loads(path.read_text())["gpu"] == gpu]
    if not own and paths:
        warnings.warn(
            f"no kernels were measured on {gpu}: those of {paths[0].stem} are taken; "
            "'python -m bench.tune' measures yours.",
            stacklevel=2,
        )
    return tuple(map(_entry, json.loads((own or paths)[0].read_text())["entries"])) if paths else ()


def _entry(row: dict[str, Any]) -> Entry:
    tuning = tuple((name, int(row["tuning"].get(name, 0))) for name in TUNED) if row["backend"] == "cuda" else ()
    choice = Choice(row["backend"], tuning)
    return Entry(row["format"], row["packed"], row["n"], row["k"], row["m"], row["us"], choice)


@dataclass(frozen=True)
class Layer:
    """What a choice depends on: an [n, k] layer in *format*, *packed* or not, for *m* tokens."""

    format: str
    packed: bool
    n: int
    k: int
    m: int


def nearest(entries: tuple[Entry, ...], layer: Layer) -> Choice | None:
    """Return the choice of the entry that is nearest to *layer*, None where its format has none.

    The number of tokens is rounded up to one that was measured (above the largest: that one), then the shape nearest in
    the logarithms of N and K is taken.
    """
    mine = [e for e in entries if e.format == layer.format and e.packed == layer.packed]
    if not mine:
        return None
    measured = sorted({e.m for e in mine})
    tokens = next((t for t in measured if t >= layer.m), measured[-1])

    def distance(entry: Entry) -> float:
        return abs(math.log(entry.n / layer.n)) + abs(math.log(entry.k / layer.k))

    return min((e for e in mine if e.m == tokens), key=distance).choice


@functools.cache
def have_cuda_kernels() -> bool:
    """Whether what compiles and launches the CUDA C++ kernels is installed."""
    return all(_installed(name) for name in ("cupy", "cuda.bindings"))


@functools.cache
def have_triton() -> bool:
    return _installed("triton")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@functools.lru_cache(maxsize=4096)
def chosen(layer: Layer, device: int) -> Choice:
    """Return what the table of CUDA device number *device* chooses for *layer*, made to fit both."""
    if layer.m > (MOST_TOKENS if layer.format == "bf16" else MOST_CONVERTED_TOKENS):
        # What cuBLAS was made for.
        return Choice("reference")
    choice = nearest(table_of(torch.cuda.get_device_name(device)), layer) or untuned(layer)
    if choice.backend == "cuda":
        choice = replace(choice, tuning=fitting(choice.tuning, layer.n, torch.cuda.get_device_capability(device)))
    return choice


def untuned(layer: Layer) -> Choice:
    """Return what is taken for *layer* where its format was not measured: bf16 as what was best for others."""
    if layer.format != "bf16":
        return Choice("reference")
    nt = 1 if layer.m <= 8 else 2 if layer.m <= 16 else 4 if layer.m <= 32 else 8
    depth, ahead = {1: (4, 2), 2: (2, 2), 4: (2, 1), 8: (1, 1)}[nt]
    values = {"mt": 1, "nt": nt, "wn": 1, "wk": 8, "depth": depth, "ahead": ahead, "splits": 1, "blocks": 2}
    return Choice("cuda", tuple((name, {**values, "evict_first": 1, "persistent": 0}[name]) for name in TUNED))


def fitting(tuning: tuple[tuple[str, int], ...], n: int, capability: tuple[int, int]) -> tuple[tuple[str, int], ...]:
    """Return *tuning* for a layer of *n* rows on a GPU of *capability*: clusters came with 9.0, a block's rows must
    fit.
    """
    values = dict(tuning)
    if capability < (9, 0):
        values["splits"] = 1
    if capability != (9, 0) and values["nt"] > 1:
        # Elsewhere the compiler needs more than the 128 registers that 16 warps leave each thread.
        values["wk"] = min(values["wk"], 8)
    while 16 * values["mt"] * values["wn"] > max(n, 16):
        values["wn" if values["wn"] > 1 else "mt"] //= 2
    return tuple(values.items())


def choose(weight: Weight, m: int, device: torch.device) -> Choice:
    """Return what computes *m* tokens of *weight* on *device*."""
    if device.type != "cuda":
        return Choice("reference")
    choice = chosen(Layer(weight.format, weight.packed, weight.n, weight.k, m), device.index or 0)
    if choice.backend == "cuda" and not have_cuda_kernels():
        return Choice("triton" if have_triton() and not weight.packed else "reference")
    return choice
