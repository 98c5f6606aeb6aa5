"""Measures which build of the CUDA kernels is fastest for each format, shape and number of tokens on this GPU.

``python -m bench.tune`` writes llmkern/kernels/measured/GPU.json, the table that the registry chooses from: cold
weights, one CUDA graph over distinct copies with programmatic dependent launch, every kept build right to 5e-3.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.result import commit, gpu_name, slug
from llmkern.evaluate.timing import Turns, copies_for
from llmkern.kernels import registry
from llmkern.kernels.build import CHUNK, Build, compiled
from llmkern.kernels.formats import NF4_VALUES, Bf16Weight, Int4Weight, Int8Weight, Nf4Weight, Weight
from llmkern.kernels.launch import launch

SHAPES = (
    *((3584, 3584), (4096, 4096), (4608, 3584), (6144, 4096), (37888, 3584), (3584, 18944), (28672, 4096)),
    *((14336, 4096), (4096, 14336), (1152, 896), (9728, 896), (896, 4864), (2560, 2048), (2048, 11008), (22016, 2048)),
    *((10240, 8192), (57344, 8192), (8192, 28672)),
)
TOKENS = (1, 8, 16, 32, 64)
SHARED_OF_SM = 227 * 1024
_LIMIT = 5e-3
# (mt, wn, wk, depth, blocks), by the number of token tiles of a block.
_CUTS = {
    1: (
        *((1, 1, 16, 2, 1), (1, 1, 16, 4, 1), (1, 1, 8, 8, 2), (1, 1, 8, 2, 1), (1, 1, 8, 2, 2), (1, 1, 8, 2, 3)),
        *((1, 1, 8, 4, 1), (1, 1, 8, 4, 2), (1, 1, 4, 2, 2), (1, 1, 4, 2, 4), (1, 1, 4, 2, 6), (2, 1, 16, 2, 1)),
        *((2, 1, 8, 2, 1), (2, 1, 8, 2, 2), (2, 1, 8, 4, 1), (2, 1, 4, 2, 2), (2, 1, 4, 2, 4), (4, 1, 4, 2, 2)),
    ),
    2: (
        *((1, 1, 16, 2, 1), (1, 1, 8, 2, 1), (1, 1, 8, 2, 2), (1, 1, 4, 2, 4), (2, 1, 16, 2, 1), (2, 1, 8, 1, 1)),
        *((2, 1, 8, 2, 1), (2, 1, 4, 1, 2), (2, 1, 4, 2, 2), (2, 1, 4, 2, 4), (4, 1, 4, 2, 1), (4, 1, 4, 1, 2)),
    ),
    4: (
        *((2, 1, 4, 1, 1), (2, 1, 4, 1, 2), (2, 1, 4, 2, 1), (2, 1, 8, 1, 1), (2, 1, 8, 2, 1), (1, 2, 8, 1, 1)),
        *((1, 2, 8, 2, 1), (4, 1, 4, 1, 1), (4, 1, 4, 2, 2), (2, 2, 2, 1, 1), (2, 2, 2, 2, 1), (2, 2, 4, 2, 2)),
        *((1, 2, 4, 1, 1), (2, 1, 16, 2, 1)),
    ),
    8: (
        *((2, 1, 8, 1, 1), (2, 1, 8, 2, 1), (2, 2, 4, 1, 1), (2, 2, 4, 2, 1), (2, 4, 2, 1, 1), (1, 2, 4, 1, 1)),
        *((1, 2, 4, 2, 1), (1, 1, 4, 2, 2), (1, 1, 4, 2, 1), (1, 4, 2, 1, 1)),
    ),
}

# (evict_first, persistent)
_SWITCHES = ((False, False), (True, False), (False, True))


def builds(format: str, packed: bool, m: int) -> Iterator[Build]:
    """Yield what is tried for *m* tokens."""
    tiles = -(-m // 8)
    for nt in {1: (1,), 2: (2,), 4: (4,), 8: (4, 8)}[tiles]:
        # Where x fills the registers, one part of it at a time may be better.
        aheads = (2,) if nt <= 2 else (1, 2)
        choices = itertools.product(_CUTS[nt], (1, 2) if nt <= 4 else (1,), _SWITCHES, aheads)
        for (mt, wn, wk, depth, blocks), splits, (evict_first, persistent), ahead in choices:
            if splits == 2 and (evict_first or persistent):
                continue
            yield Build(
                *(format, True, mt, nt, wn, wk, depth, ahead, splits, blocks, evict_first, persistent),
                pdl=True,
                packed=packed,
            )


def fits(build: Build) -> bool:
    """Whether *build* compiles without spills and its shared memory is there."""
    kernel = compiled(build, 0).get_function("linear")
    return kernel.local_size_bytes == 0 and build.shared_bytes * build.blocks <= SHARED_OF_SM


def random_weight(format: str, n: int, k: int) -> Weight:
    """Return an [n, k] matrix of random codes."""
    scale = torch.rand(n, device="cuda") + 0.5
    if format == "int8":
        return Int8Weight.of(torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda"), scale)
    if format == "bf16":
        return Bf16Weight.of(torch.randn(n, k, dtype=torch.bfloat16, device="cuda"))
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    # As of a model that was loaded in bf16.
    scales = (torch.rand(n, k // 64, device="cuda") + 0.5).to(torch.bfloat16).float()
    if format == "int4":
        return Int4Weight.of(codes, scales.to(torch.bfloat16), 64)
    return Nf4Weight(n, k, False, codes.view(-1), torch.tensor(NF4_VALUES, device="cuda"), scales.view(-1), 64)


def us_of(call: Callable[[int], Any], copies: int, replays: int) -> float:
    """Return the median µs per call in one graph over *copies* calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(copies):
            call(index)
    graph.replay()
    samples = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / copies)
    return sorted(samples)[len(samples) // 2]


def tuned(weight: Weight, m: int, usable: list[Build]) -> dict[str, Any] | None:
    """Return the table's entry for *m* tokens of *weight*: the fastest of *usable*."""
    x = torch.randn(m, weight.k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(m, weight.n, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x.float(), weight.dequantized())
    # As many bytes as the evaluator reads between two turns of a copy: with fewer, some of them are found in L2.
    copies = copies_for(weight.stored_bytes, 50 * 2**20)
    calls = Turns(lambda _: None, copies).calls
    held = [weight.moved(torch.clone) for _ in range(copies)]
    structs = [copy.struct() for copy in held]
    rest = {"tail": weight.k % CHUNK[weight.format] != 0, **weight.facts()}

    def calling(build: Build) -> Callable[[int], None]:
        return lambda index: launch(build, structs[index % copies], x, None, y)

    found = []
    for build in usable:
        if build.rows > weight.n:
            continue
        whole = replace(build, **rest)
        found.append((us_of(calling(whole), calls, 4), whole))
    best: tuple[float, Build] | None = None
    for _, build in sorted(found, key=lambda pair: pair[0])[:5]:
        y.fill_(float("nan"))
        launch(build, structs[0], x, None, y)
        error = float((y.float() - expected).norm() / expected.norm())
        if not error <= _LIMIT:
            print(f"wrong: {build} {error}", flush=True)
            continue
        us = us_of(calling(build), calls, 12)
        best = min([(us, build), *([best] if best else [])], key=lambda pair: pair[0])
    row = {"format": weight.format, "packed": weight.packed, "n": weight.n, "k": weight.k, "m": m}
    if best is None:
        return None
    tuning = {name: int(getattr(best[1], name)) for name in registry.TUNED}
    return {**row, "backend": "cuda", "us": round(best[0], 3), "tuning": tuning}


def _entries_of(table: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the entries of *table* by what they are of; what is measured anew takes their place, the rest stays."""
    if not table.exists():
        table = registry.TABLES / table.name
    return {_key(e): e for e in json.loads(table.read_text())["entries"]} if table.exists() else {}


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("n", "k", "format", "packed", "m"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=registry.TABLES, help="folder of the table")
    parser.add_argument("--seconds", type=float, default=480.0, help="stop after so many seconds with what is there")
    parser.add_argument("--shapes", help="NxK,…: measure these alone")
    parser.add_argument("--formats", default="int8,int4,nf4", help="measure these alone")
    parser.add_argument("--tokens", default=TOKENS, type=lambda text: tuple(map(int, text.split(","))), help="the same")
    parser.add_argument("--packed", action="store_true", help="packed weights alone")
    parser.add_argument("--jobs", type=int, default=16, help="compilations at a time")
    arguments = parser.parse_args()
    end_s = time.monotonic() + arguments.seconds
    formats, packings = arguments.formats.split(","), (True,) if arguments.packed else (True, False)
    variants = [(f, p, m) for m in arguments.tokens for f in formats for p in packings]
    wanted = {variant: list(builds(*variant)) for variant in variants}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        every = list(dict.fromkeys(build for several in wanted.values() for build in several))
        good = {build for build, fit in zip(every, pool.map(fits, every), strict=True) if fit}
    print(f"{len(good)} of {len(every)} builds fit, {end_s - time.monotonic():.0f} s left", flush=True)
    target = arguments.results / f"{slug()}.json"
    shapes: list[tuple[int, ...]] = list(SHAPES)
    if arguments.shapes is not None:
        shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    entries = _entries_of(target)
    document = {
        "gpu": gpu_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
    }
    for n, k in shapes:
        for format, packed in itertools.product(formats, packings):
            weight: Any = random_weight(format, n, k)
            weight = weight.to_packed() if packed else weight
            for m in arguments.tokens:
                if time.monotonic() > end_s:
                    break
                entry = tuned(weight, m, [build for build in wanted[format, packed, m] if build in good])
                if entry is not None:
                    entries[_key(entry)] = entry
        torch.cuda.empty_cache()
        lines = [json.dumps(entry) for entry in entries.values()]
        head = json.dumps({**document, "entries": []}, indent=1).replace('"entries": []', '"entries": [\n  ')
        target.write_text(head.removesuffix("\n}") + ",\n  ".join(lines) + "\n ]\n}\n")
        print(f"{n}x{k}: {len(entries)} entries, {end_s - time.monotonic():.0f} s left", flush=True)


if __name__ == "__main__":
    main()
