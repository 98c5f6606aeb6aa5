"""Other ways to write the kernels that compute the same: time and joules of each beside the kernel as it is.

``python -m bench.variants`` says what each would save; what does is then written into the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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
    """What is written in the place of what, in which formats, and the bytes of shared memory that it takes more."""

    changes: tuple[tuple[str, str], ...]
    formats: tuple[str, ...] = ("int8", "nf4", "int4")
    more_shared_bytes: int = 0
    # No more blocks than fit, each with many tiles: what a block prepares is prepared less often.
    persistent: bool = False

    def __add__(self, other: Variant) -> Variant:
        return Variant(
            self.changes + other.changes,
            tuple(name for name in self.formats if name in other.formats),
            self.more_shared_bytes + other.more_shared_bytes,
            self.persistent or other.persistent,
        )


# Columns of the MMAs beyond the last token are that token once more: their products are computed for nobody, and
# switch as many transistors. With zeros there they switch none.
ZERO_COLUMNS = Variant(
    (
        ("  int left;  // k before the end of x, from where the rows point\n", "  int left, tokens;\n"),
        ("int lane) : left(K - k) {", "int lane) : left(K - k), tokens(M - token0 - lane / 4) {"),
        (
            """        Words w = {{0, 0, 0, 0}};
        if (!TAIL || offset + k_of_lane(t) < left) w = load_x(rows[n] + offset);
        put(a, n, half, w);
""",
            """        if (!TAIL) {
          // What was zero stays so.
          if (8 * n < tokens) put(a, n, half, load_x(rows[n] + offset));
        } else {
          Words w = {{0, 0, 0, 0}};
          if (8 * n < tokens && offset + k_of_lane(t) < left) w = load_x(rows[n] + offset);
          put(a, n, half, w);
        }
""",
        ),
        ("    Activations ahead[kAhead];\n", "    Activations ahead[kAhead] = {};\n"),
    )
)
# A byte's pair 256 bytes from the next, so that one permutation of bytes makes its address: no shift, no mask.
WIDE_TABLE = Variant(
    (
        (
            "#define TABLE_BYTES (256 * 32 * 4 + 256 * 4 * NESTED)",
            "#define TABLE_BYTES (256 * 64 * 4 + 256 * 4 * NESTED)",
        ),
        ("constexpr int kNested = 256 * 32;", "constexpr int kNested = 256 * 64;"),
        (
            "reinterpret_cast<uint4*>(table)[8 * byte + ((i + byte) & 7)]",
            "reinterpret_cast<uint4*>(table)[16 * byte + ((i + byte) & 7)]",
        ),
        (
            """      // 128 bytes for each byte of codes: its place is the byte times 128.
      const u32 shifted = i == 0 ? q << 7 : q >> (8 * i - 7);
      pairs[i] = *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(table) + ((shifted & 0x7f80u) | lane_bytes));
""",
            """      const u32 place = __byte_perm(q, lane_bytes, 0x5504u | u32(i) << 4);
      pairs[i] = *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(table) + place);
""",
        ),
    ),
    ("nf4",),
    256 * 32 * 4,
)
# That all lanes of a warp have the same number of it the compiler cannot know of threadIdx.x / 32: with it addresses
# and loop ends stay in the registers of the warp, and the table's address costs no addition for each look-up.
UNIFORM_WARP = Variant(
    (
        (
            "warp = threadIdx.x >> 5, g = lane >> 2",
            "warp = __shfl_sync(0xffffffffu, int(threadIdx.x >> 5), 0), g = lane >> 2",
        ),
    )
)
PERSISTENT = Variant((), persistent=True)
AS_IT_IS = Variant(())
VARIANTS = {
    "as it is": AS_IT_IS,
    "uniform warp": UNIFORM_WARP,
    "zero columns": ZERO_COLUMNS,
    "uniform warp, zero columns": UNIFORM_WARP + ZERO_COLUMNS,
    "uniform warp, wide table": UNIFORM_WARP + WIDE_TABLE,
    "uniform warp, wide table, zero columns": UNIFORM_WARP + WIDE_TABLE + ZERO_COLUMNS,
    "persistent": PERSISTENT,
    "uniform warp, wide table, persistent": UNIFORM_WARP + WIDE_TABLE + PERSISTENT,
    "all": UNIFORM_WARP + WIDE_TABLE + ZERO_COLUMNS + PERSISTENT,
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


@dataclass(frozen=True)
class Larger(Build):
    """A build that needs more shared memory than its source says."""

    more_shared_bytes: int = 0

    @property
    def shared_bytes(self) -> int:
        return super().shared_bytes + self.more_shared_bytes


def build_of(plain: Build, variant: Variant) -> Larger:
    """Return *plain* as *variant* wants it."""
    own = {f.name: getattr(plain, f.name) for f in fields(plain)}
    own["persistent"] = plain.persistent or variant.persistent
    return Larger(**own, more_shared_bytes=variant.more_shared_bytes)


def cases(device: Device, scale: Scale, format: str, shape: tuple[int, int], m: int) -> list[dict[str, Any]]:
    """Return a case per variant of *format*'s packed kernel; raises SystemExit where one computes something else."""
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
    arguments = arguments_of(__doc__, "nf4,int8,int4")
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
