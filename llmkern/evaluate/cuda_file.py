"""A CUDA source file as a candidate. One comment line declares its kernel:

    // llmkern: kernel=NAME format=int8|nf4|int4 rows=R tokens=T threads=B [shared=BYTES]

The kernel is ``extern "C" __global__ void NAME(weights..., const T* x, const T* bias, T* y, int M, int N, int K)``
with bias nullptr where there is none, T __nv_bfloat16 or __half (macro T), launched with grid (ceil(N / R), ceil(M
/ T)) and B threads. Weights are: int8: const signed char* codes, const float* scales; int4: const unsigned char*
codes, const T* scales (macro GROUP); nf4: const unsigned char* codes, const float* code, const float* absmax (macro
BLOCK).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from llmkern.errors import UsageError
from llmkern.evaluate.candidate import Candidate
from llmkern.kernels.build import inlined

_DECLARED = re.compile(r"^\s*//\s*llmkern:(.*)$", re.MULTILINE)
_NEEDED = ("kernel", "format", "rows", "tokens", "threads")


def declaration(path: Path) -> dict[str, str]:
    """Return what the file declares. Raises UsageError for a file that is missing or declares no kernel."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"candidate file {path} cannot be read ({error}): check its path.") from error
    line = _DECLARED.search(text)
    found = dict(part.partition("=")[::2] for part in line[1].split()) if line else {}
    missing = [name for name in _NEEDED if not found.get(name)]
    if missing:
        raise UsageError(
            f"{path} declares no {', '.join(missing)}: it needs a line '// llmkern: kernel=NAME format=int8 rows=16 "
            "tokens=1 threads=128' (docs/write-a-kernel.md)."
        )
    if found["format"] not in Candidate.formats:
        raise UsageError(f"{path} declares format={found['format']}: it must be one of {', '.join(Candidate.formats)}.")
    for name in ("rows", "tokens", "threads", "shared"):
        value = found.get(name, "0")
        if not value.isdigit() or (name in _NEEDED and value == "0"):
            raise UsageError(f"{path} declares {name}={value}: it must be a whole number, at least 1.")
    return found


def load_cuda(path: Path) -> Candidate:
    """Return the candidate in CUDA file *path*; it is compiled at the first call. Raises UsageError."""
    declared = declaration(path)
    try:
        import cupy
    except ImportError as error:
        raise UsageError(f"{path} needs CuPy to be compiled: 'pip install \"llmkern[cuda]\"'.") from error
    text = inlined(path.read_text(), path.parent)
    kernels: dict[tuple[Any, ...], Any] = {}

    def kernel(dtype: torch.dtype, group: int) -> Any:
        key = (dtype, group)
        if key not in kernels:
            half = dtype == torch.float16
            header = f"#include <{'cuda_fp16.h' if half else 'cuda_bf16.h'}>\n"
            options = (
                "-std=c++17",
                f"-DT={'__half' if half else '__nv_bfloat16'}",
                f"-DGROUP={group}",
                f"-DBLOCK={group}",
            )
            try:
                module = cupy.RawModule(code=header + text, options=options)
                kernels[key] = module.get_function(declared["kernel"])
            except cupy.cuda.compiler.CompileException as error:
                raise UsageError(f"{path} does not compile: {first_error(str(error))}") from error
        return kernels[key]

    def call(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        group = getattr(weight, "group", getattr(weight, "blocksize", 0))
        y = torch.empty((x.shape[0], weight.n), dtype=x.dtype, device=x.device)
        tensors = (
            [weight.codes, weight.scales] if weight.format != "nf4" else [weight.codes, weight.code, weight.absmax]
        )
        tensors += [x, bias, y]
        pointers = [cupy.uintp(0 if t is None else t.data_ptr()) for t in tensors]
        sizes = [cupy.int32(v) for v in (x.shape[0], weight.n, weight.k)]
        grid = (-(-weight.n // int(declared["rows"])), -(-x.shape[0] // int(declared["tokens"])))
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        function = kernel(x.dtype, group)
        with stream:
            function(grid, (int(declared["threads"]),), (*pointers, *sizes), shared_mem=int(declared.get("shared", 0)))
        return y

    def spilled() -> int | None:
        return max((int(k.local_size_bytes) for k in kernels.values()), default=None)

    return Candidate(call, formats=(declared["format"],), spilled_bytes=spilled)


def first_error(text: str) -> str:
    """Return the first line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    return (lines or text.strip().splitlines() or ["the compiler said nothing"])[0][:300]
