"""The kernels beside their peers on this GPU: latency with cold weights, bandwidth, energy, and whether they are right.

``python -m bench.kernels speed`` measures latency, ``energy`` joules per call too, ``right`` holds every kernel
against the reference on every layer of the registry's models and 1 to 64 tokens.
"""

from __future__ import annotations

import argparse
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import result
from bench.tune import random_weight
from llmkern.estimate import Estimate
from llmkern.evaluate.document import document
from llmkern.evaluate.job import LIMIT_L2
from llmkern.evaluate.request import evaluated
from llmkern.evaluate.shapes import layers_of
from llmkern.evaluate.verdict import Line, Statement, state
from llmkern.kernels import pack
from llmkern.kernels.build import compiled
from llmkern.kernels.linear import linear
from llmkern.kernels.registry import Choice, Layer, choose, chosen
from llmkern.workload.models import REGISTRY

FORMATS = ("int8", "nf4", "int4")
SHAPES = "37888x3584,14336x4096,3584x18944,4096x4096,3584x3584"
TOKENS = (1, 2, 3, 4, 7, 8, 16, 31, 32, 64)
# Least share of the data sheet by weight bytes: (N, K, M, format).
BARS = {
    **{(37888, 3584, m, "int8"): bar for m, bar in ((1, 0.80), (8, 0.70), (32, 0.60))},
    **{(37888, 3584, m, "int4"): bar for m, bar in ((1, 0.65), (8, 0.50), (32, 0.40))},
    (37888, 3584, 1, "nf4"): 0.65,
    **{(n, k, 1, "int8"): 0.72 for n, k in ((14336, 4096), (3584, 18944))},
    **{(n, k, 1, "int4"): 0.55 for n, k in ((14336, 4096), (3584, 18944))},
    **{(n, n, 1, "int8"): 0.55 for n in (4096, 3584)},
    **{(n, n, 1, "int4"): 0.40 for n in (4096, 3584)},
}


def cases(statement: Statement) -> list[dict[str, Any]]:
    """Return a case per contender, shape and number of tokens."""
    return [_case(line, statement) for line in statement.lines]


def _case(line: Line, statement: Statement) -> dict[str, Any]:
    row = line.row
    metrics: dict[str, Any] = {}
    worst = [c.rel_l2 for c in (*row.checks, row.after) if c is not None and c.rel_l2 is not None]
    if worst:
        metrics["relative_l2"] = result.metric(max(worst), "1")
    if line.cold_us is not None and row.latency is not None:
        metrics["cold"] = result.metric(line.cold_us.value, "us", row.latency.cold_us)
        metrics["warm"] = result.metric(line.warm_us or 0.0, "us", row.latency.warm_us)
        metrics["kernels_by_cupti"] = result.metric(row.latency.kernels_us, "us")
        metrics["launches"] = result.metric(sum(k.launches for k in row.latency.kernels), "1")
    for name, share in (("share_of_data_sheet", line.share_of_sheet), ("share_of_read", line.share_of_read)):
        if share is not None:
            metrics[name] = result.metric(share, "1")
    if row.energy is not None:
        for name, (value, low, high) in (("energy", row.energy.total_mj), ("dynamic_energy", row.energy.dynamic_mj)):
            metrics[name] = result.metric(Estimate(value, low, high, row.energy.windows), "mJ")
        metrics["joules_per_gb"] = result.metric(line.joules_per_gb or 0.0, "J/GB")
    case = row.case
    bar = BARS.get((case.n, case.k, case.m, case.format)) if row.candidate.startswith("llmkern") else None
    if row.candidate == "llmkern Triton":
        bar = None
    passed = None if bar is None or line.share_of_sheet is None else line.right and line.share_of_sheet >= bar
    parameters = {"kernel": row.candidate, "format": case.format, "n": case.n, "k": case.k, "m": case.m}
    note = "" if line.right else line.judgement
    if bar is not None:
        note = f"{note} bar {bar:.0%} of the data sheet".strip()
    return result.case(f"{row.candidate}, {case.key}", parameters, metrics, passed, note)


def _compiled(shapes: list[tuple[int, int]]) -> None:
    """Compile, many at a time, what the registry will choose."""
    builds = set()
    for (n, k), format, packed, m in itertools.product(shapes, FORMATS, (False, True), TOKENS):
        layer = Layer(format, packed, n, k, m)
        choice = chosen(layer, 0)
        for dtype in (torch.bfloat16, torch.float16):
            facts = {"packed": packed, **({} if format == "int8" else {"shift": 6})}
            builds.add(choice.build_of(layer, facts, dtype, False))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda build: compiled(build, 0), builds))


def _as_half(weight: Any) -> Any:
    # int4 has its scales in the type of x.
    return weight.moved(lambda t: t.half() if t.dtype == torch.bfloat16 else t)


def right(results: Path | None) -> None:
    """Hold our kernels against fp32 on every layer of the registry's models."""
    shapes = sorted({(s.n, s.k) for name in REGISTRY for s in layers_of(name)})
    found: list[dict[str, Any]] = []
    _compiled(shapes)
    for (n, k), format in itertools.product(shapes, FORMATS):
        weight: Any = random_weight(format, n, k)
        expected = weight.dequantized()
        versions = {"CUDA": (weight, None), "Triton": (weight, Choice("triton"))}
        if pack.can_pack(format, n, k):
            versions["CUDA, packed"] = (weight.to_packed(), None)
        errors: dict[str, dict[int, float]] = {name: {} for name in versions}
        halves = {name: (_as_half(own), choice) for name, (own, choice) in versions.items()}
        for m, dtype in [*((m, torch.bfloat16) for m in TOKENS), (5, torch.float16)]:
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            bias = torch.randn(n, device="cuda", dtype=dtype)
            reference = torch.nn.functional.linear(x.float(), expected, bias.float())
            for name, (own, choice) in (halves if dtype == torch.float16 else versions).items():
                y = linear(own, x, bias, choice or choose(own, m, x.device))
                error = float((y.float() - reference).norm() / reference.norm())
                errors[name][m] = max(errors[name].get(m, 0.0), error) if error == error else float("nan")
        for name, by_tokens in errors.items():
            worst = max(by_tokens.values())
            passed = all(error <= LIMIT_L2 for error in by_tokens.values())
            metrics = {"relative_l2": result.metric(worst, "1"), "comparisons": result.metric(len(by_tokens), "1")}
            parameters = {"kernel": name, "format": format, "n": n, "k": k, "tokens": list(by_tokens)}
            found.append(result.case(f"{name}, {format} {n}x{k}", parameters, metrics, passed))
        result.write("kernels-right", found, results)
        print(f"{n}x{k} {format}: {max(max(e.values()) for e in errors.values()):.2e}", flush=True)
    wrong = [case["name"] for case in found if not case["passed"]]
    print(f"{len(found)} kernels and layers, {len(wrong)} wrong {wrong[:3]}")


def measured(arguments: argparse.Namespace, energy: bool) -> None:
    """Measure latency, and with *energy* joules, of our kernels and their peers."""
    statement = state(
        evaluated(
            (),
            formats=tuple(arguments.formats.split(",")),
            shapes=arguments.shapes,
            batch=tuple(map(int, arguments.batch.split(","))),
            dtype="bf16",
            group="64",
            energy=energy,
            peers=True,
            in_model=None,
            seed=0,
            timeout=arguments.timeout,
        )
    )
    found = cases(statement)
    told = document(statement)
    name = ("kernels-energy" if energy else "kernels") + arguments.suffix
    path = result.write(name, found, arguments.results, roof=told["roof"], fits=told["fits"], doubts=told["doubts"])
    missed = [case["name"] for case in found if case["passed"] is False]
    print(f"{path}: {len(found)} cases; below their bar: {missed}")
    for doubt in statement.doubts:
        print(f"* {doubt}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "energy", "right"])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one contender")
    parser.add_argument("--suffix", default="", help="of the result file's name, such as -small")
    parser.add_argument("--results", type=Path, default=None, help="folder of the result file")
    arguments = parser.parse_args()
    if arguments.what == "right":
        right(arguments.results)
    else:
        measured(arguments, arguments.what == "energy")


if __name__ == "__main__":
    main()
