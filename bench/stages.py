"""What limits the kernels: the same kernel with stages taken out (conversion, MMAs, activations), time and joules each.

``python -m bench.stages`` says what a call costs without each of them; what they compute then is of no use. The read
and the copy of a gigabyte stand beside them, in joules per gigabyte moved.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import result
from bench.tune import random_weight
from llmkern.estimate import Estimate
from llmkern.evaluate.energy import Scale, scale_of
from llmkern.evaluate.job import Energy
from llmkern.evaluate.roof import roof_of
from llmkern.evaluate.timing import Turns, copies_for
from llmkern.kernels import build as builds
from llmkern.kernels import launch
from llmkern.kernels.build import Build
from llmkern.kernels.registry import choose
from llmkern.record.device.choose import choose_device
from llmkern.record.device.interface import Device

# What is found in the source, and what stands there without it.
_FOUR = "INLINE void operator()(u32 q, u32 (&pairs)[4]) const { for (int i = 0; i < 4; ++i) pairs[i] = q >> i; }\n};"
_CONVERSION = {
    "int8": (
        r"INLINE void convert\(u32 q, u32& first, u32& second\) \{.*?\n\}",
        "INLINE void convert(u32 q, u32& first, u32& second) { first = q; second = q >> 1; }",
    ),
    "int4": (r"struct Convert \{.*?\n\};", f"struct Convert {{ {_FOUR}".replace("\n", r"\n")),
    "nf4": (
        r"struct Convert \{.*?\n\};",
        f"struct Convert {{ const u32* table; u32 lane_bytes; {_FOUR}".replace("\n", r"\n"),
    ),
}
_MMA = (
    r"(INLINE void mma\(float \(&c\)\[4\][^)]*\) \{).*?\n\}",
    r"\1 const u32 v[4] = {a0 ^ b0, a1 ^ b1, a2, a3};"
    r" for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(__float_as_uint(c[i]) ^ v[i]); }",
)
_X = (r"(INLINE Words load_x\(const u16\* p\) \{).*?\n\}", r"\1 return Words{{u32(u64(p)), 1, 2, 3}}; }")
STAGES = ("whole", "no conversion", "no MMAs", "no activations", "loads alone", "whole again")


def without(format: str, stage: str) -> str:
    """Return the source of *format* without *stage*. Raises ValueError where the source has no such stage."""
    conversion = _CONVERSION[format]
    changes = {
        "no conversion": [conversion],
        "no MMAs": [_MMA],
        "no activations": [_X],
        "loads alone": [conversion, _MMA, _X],
    }.get(stage, [])
    text = builds.source(format)
    for found, instead in changes:
        text, count = re.subn(found, instead, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{format} has {count} places of the stage of '{stage}', not 1: mend its pattern.")
    return text


def put(build: Build, text: str) -> None:
    """Let *build* be compiled from *text* from now on."""
    import cupy

    module = cupy.RawModule(code=text, options=build.options())
    module.compile()
    builds._modules[build, 0] = module
    launch._function.cache_clear()


def microseconds(device: Device, turns: Turns) -> list[float]:
    """Return the µs per call of replays of one graph."""
    graph = device.captured(turns.in_turn)
    assert graph is not None
    graph.replay()
    samples = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / turns.calls)
    graph.reset()
    return sorted(samples)


def estimate(energy: Energy, per_mj: float) -> Estimate:
    """Return the energy of a call with its interval, *per_mj* for each mJ."""
    value, low, high = energy.total_mj
    return Estimate(value * per_mj, low * per_mj, high * per_mj, energy.windows)


@dataclass(frozen=True)
class Calls:
    """A layer of *stored_bytes*, its *plain* build as chosen, its results *y*, and calls of any build that do not meet
    in L2.
    """

    plain: Build
    stored_bytes: int
    y: torch.Tensor
    of: Callable[[Build], Turns]


def calls_of(format: str, shape: tuple[int, int], m: int) -> Calls:
    """Return calls of *format*'s packed kernel for random weights [n, k] and *m* tokens."""
    n, k = shape
    weight: Any = random_weight(format, n, k)
    weight = weight.to_packed() if weight.can_pack() else weight
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    copies = [weight.moved(torch.clone) for _ in range(copies_for(weight.stored_bytes, 50 * 2**20))]
    structs = [copy.struct() for copy in copies]

    def turns(build: Build) -> Turns:
        # The structs point into the copies, which must live as long.
        return Turns(lambda index: launch.launch(build, structs[index], x, None, y), len(copies))

    return Calls(choose(weight, m, x.device).build(weight, x.dtype, True), weight.stored_bytes, y, turns)


def arguments_of(about: str | None, formats: str) -> argparse.Namespace:
    """Return what the command line asks for: shape as (n, k), batches, formats, results."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="37888x3584", type=lambda text: tuple(map(int, text.split("x"))))
    parser.add_argument("--batch", default="1", type=lambda text: list(map(int, text.split(","))))
    parser.add_argument("--formats", default=formats, type=lambda text: text.split(","))
    parser.add_argument("--results", type=Path, default=None, help="folder of the result file")
    return parser.parse_args()


def weighed(device: Device, scale: Scale, turns: Turns, stored_bytes: int, name: str) -> dict[str, Any]:
    """Return the metrics of a call of *turns*: µs, mJ and J per GB of weights where there is a counter; print them."""
    us = microseconds(device, turns)
    median = us[len(us) // 2]
    spans = scale.weigh(turns, median)
    scale.rest()
    energy = scale.joules(spans, median, stored_bytes)
    metrics = {"cold": result.metric(median, "us", us)}
    if energy is not None:
        metrics["energy"] = result.metric(estimate(energy, 1.0), "mJ")
        per_gb = estimate(energy, 1e-3 / (stored_bytes / 1e9))
        metrics["joules_per_gb"] = result.metric(per_gb, "J/GB")
        print(f"{name}: {median:.2f} us, {per_gb.value:.4f} J/GB", flush=True)
    return metrics


def cases(device: Device, scale: Scale, format: str, shape: tuple[int, int], m: int) -> list[dict[str, Any]]:
    """Return a case per stage that is taken out of *format*'s packed kernel."""
    n, k = shape
    calls = calls_of(format, shape, m)
    turns = calls.of(calls.plain)
    found = []
    for stage in STAGES:
        put(calls.plain, without(format, stage))
        turns.in_turn()
        metrics = weighed(device, scale, turns, calls.stored_bytes, f"{format} {n}x{k} M={m} {stage}")
        parameters = {"format": format, "n": n, "k": k, "m": m, "stage": stage}
        found.append(result.case(f"{format} {n}x{k}, M={m}: {stage}", parameters, metrics, None))
    return found


def main() -> None:
    arguments = arguments_of(__doc__, "int8,nf4,int4")
    device = choose_device("auto")
    found = []
    with scale_of(device) as scale:
        if scale is None:
            raise SystemExit("this GPU has no energy counter: there is nothing to weigh the stages with.")
        roof = roof_of(device, scale)
        for name, energy, moved in (
            ("copy", roof.copy_energy, roof.copied_bytes),
            ("read", roof.read_energy, roof.read_bytes),
        ):
            if energy is not None:
                per_gb = estimate(energy, 1e-3 / (moved / 1e9))
                print(f"{name}: {per_gb.value:.4f} [{per_gb.low:.4f}, {per_gb.high:.4f}] J/GB", flush=True)
                metrics = {"joules_per_gb": result.metric(per_gb, "J/GB")}
                found.append(result.case(name, {"bytes": moved}, metrics, None))
        for format in arguments.formats:
            for m in arguments.batch:
                found += cases(device, scale, format, arguments.shape, m)
                result.write("stages", found, arguments.results)


if __name__ == "__main__":
    main()
