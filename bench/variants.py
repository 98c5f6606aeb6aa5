"""Other ways to write the kernels that compute the same: time and joules of each beside the kernel as it is.

``python -m bench.variants`` says what each would save; what does is then written into the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import result
from bench.stages import arguments_of, calls_of, put, weighed
from llmkern.evaluate.energy import Scale, scale_of
from llmkern.kernels import build as builds
from llmkern.kernels.build import Build
from llmkern.record.device.choose import choose_device
from llmkern.record.device.interface import Device


@dataclass(frozen=True)
class Variant:
    """What is written in the place of what, and in which formats; *persistent* turned round or as it is."""

    changes: tuple[tuple[str, str], ...] = ()
    formats: tuple[str, ...] = ("int8", "nf4", "int4", "bf16")
    # No more blocks than fit, each with many tiles: what a block prepares is prepared less often.
    turned: bool = False


def _switch(name: str, formats: tuple[str, ...], on: bool) -> Variant:
    """Return the variant that turns the format's macro *name* off (*on*: what it is now), or on."""
    was, will = ("(NT == 1)", "0") if on else ("0", "(NT == 1)")
    return Variant(((f"#define {name} {was}\n", f"#define {name} {will}\n"),), formats)


AS_IT_IS = Variant()
VARIANTS = {
    "as it is": AS_IT_IS,
    # Columns of the MMAs beyond the last token are that token once more, not zero: their products are computed for
    # nobody, and switch as many transistors.
    "columns of the last token": _switch("ZERO_COLUMNS", ("int8", "nf4", "int4"), True),
    "zero columns": _switch("ZERO_COLUMNS", ("bf16",), False),
    # The compiler puts loads behind a branch just before their use, those with a predicate where it likes.
    "zero columns by a predicate": Variant(
        (("#define ZERO_COLUMNS (NT == 1)\n", "#define ZERO_COLUMNS (2 * (NT == 1))\n"),), ("int8", "nf4", "int4")
    ),
    "number of the warp unknown": _switch("UNIFORM_WARP", ("nf4", "int4"), True),
    "uniform warp": _switch("UNIFORM_WARP", ("int8", "bf16"), False),
    # A shift, a mask and an or make the address of a byte's pair, not one permutation of bytes.
    "narrow table": Variant(
        (("#define ROW_WORDS (WIDE ? 64 : 32)", "#define ROW_WORDS 32"), ("#if WIDE", "#if 0")), ("nf4",)
    ),
    "persistent or not": Variant(turned=True),
    "as it is, again": AS_IT_IS,
}


def written(format: str, variant: Variant) -> str:
    """Return the source of *format* as *variant* writes it; raises ValueError where what it changes is not there."""
    text = builds.source(format)
    for found, instead in variant.changes:
        if text.count(found) != 1:
            raise ValueError(f"{format} has {text.count(found)} places of {found[:60]!r}, not 1: mend the variant.")
        text = text.replace(found, instead)
    return text


def build_of(plain: Build, variant: Variant) -> Build:
    """Return *plain* as *variant* wants it."""
    return replace(plain, persistent=plain.persistent != variant.turned)


def cases(device: Device, scale: Scale, format: str, shape: tuple[int, int], m: int) -> list[dict[str, Any]]:
    """Return a case per variant of *format*'s kernel; raises SystemExit where one computes something else."""
    n, k = shape
    calls = calls_of(format, shape, m)
    found, right = [], None
    for name, variant in VARIANTS.items():
        if format not in variant.formats:
            continue
        build = build_of(calls.plain, variant)
        put(build, written(format, variant))
        turns = calls.of(build)
        calls.y.zero_()
        turns.in_turn()
        torch.cuda.synchronize()
        if right is None:
            right = calls.y.clone()
        elif not torch.equal(calls.y, right):
            raise SystemExit(f"{format}, {name}: another result than the kernel as it is.")
        metrics = weighed(device, scale, turns, calls.stored_bytes, f"{format} {n}x{k} M={m} {name}")
        parameters = {"format": format, "n": n, "k": k, "m": m, "variant": name}
        found.append(result.case(f"{format} {n}x{k}, M={m}: {name}", parameters, metrics, None))
    return found


def main() -> None:
    arguments = arguments_of(__doc__, "nf4,int8,int4,bf16")
    device = choose_device("auto")
    found: list[dict[str, Any]] = []
    with scale_of(device) as scale:
        if scale is None:
            raise SystemExit("this GPU has no energy counter: there is nothing to weigh the variants with.")
        for format in arguments.formats:
            for m in arguments.batch:
                found += cases(device, scale, format, arguments.shape, m)
                result.write("variants", found, arguments.results)


if __name__ == "__main__":
    main()
