"""Every kernel on small shapes, to be run under NVIDIA's compute-sanitizer.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1: ``compute-sanitizer --report-api-errors no --error-exitcode 1 python -m
bench.sanitize``, also with --tool racecheck. (cuda-bindings asks the driver for functions that it does not have.)
"""

from __future__ import annotations

import itertools

import torch

from llmkern.evaluate.job import LIMIT_L2
from llmkern.kernels import pack
from llmkern.kernels.formats import Int4Weight, Int8Weight, Nf4Weight, Weight
from llmkern.kernels.linear import linear

SHAPES = ((64, 128), (96, 256), (112, 896), (80, 192), (70, 1024), (33, 97))


def weights(n: int, k: int) -> list[Weight]:
    """Return the formats that an [n, k] matrix has, in rows and packed."""
    w = torch.randn(n, k, device="cuda")
    found: list[Weight] = [Int8Weight.quantize(w)]
    if k % 64 == 0:
        found += [Int4Weight.quantize(w, 64), Nf4Weight.quantize(w, 64), Nf4Weight.quantize(w, 64, nested=True)]
    packed = [x.to_packed() for x in found if pack.can_pack(x.format, n, k)]  # type: ignore[attr-defined]
    return [*found, *packed]


def main() -> None:
    count = 0
    for (n, k), m in itertools.product(SHAPES, (1, 3, 9, 17, 33)):
        x, bias = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, device="cuda").bfloat16()
        for weight in weights(n, k):
            expected = torch.nn.functional.linear(x.float(), weight.dequantized(), bias.float())
            for pdl in (False, True):
                y = linear(weight, x, bias, pdl=pdl)
                error = float((y.float() - expected).norm() / expected.norm())
                assert error <= LIMIT_L2, (weight.format, weight.packed, n, k, m, error)
                count += 1
    print(f"{count} launches right")


if __name__ == "__main__":
    main()
