"""Launches the kernels of a decode step (cuda.cu) on PyTorch's current stream."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from llmkern.kernels.build import FOLDER, inlined
from llmkern.kernels.launch import configured, driver

_THREADS, _TILE = 256, 128
# Blocks that read one sequence's logits.
_READERS = 64
# Blocks that read the rows of its shortlist: two for each multiprocessor of an H100.
_FINDERS = 264
_SMALL_SHARED = 48 * 1024


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the norm of x [B, H], H a multiple of 8 (see the reference)."""
    y = torch.empty_like(x)
    kernel = _kernel("rms_norm", _macros(x, hidden=x.shape[1]), x.device.index)
    _launch(kernel, (x.shape[0], 1, 1), 0, (x, weight, y, ctypes.c_float(eps)))
    return y


def attention(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    start: torch.Tensor,
    turn: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return the attention of one new token (see the reference); heads of 64 or 128, at most 16 queries a key."""
    batch, heads, length, size = keys.shape
    group = qkv.shape[1] // (heads * size) - 2
    splits = splits_for(batch * heads, length) if _is_hopper(qkv.device) else 1
    y = torch.empty((batch, group * heads * size), dtype=qkv.dtype, device=qkv.device)
    macros = _macros(qkv, head=size, group=group, splits=splits)
    kernel = _kernel("attention", macros, qkv.device.index, shared_bytes(group, size))
    numbers = (ctypes.c_float(scaling), ctypes.c_float(size**-0.5))
    arguments = (qkv, keys, values, position, start, turn, *numbers, y, ctypes.c_int(length))
    _launch(kernel, (splits, heads, batch), shared_bytes(group, size), arguments, cluster=(splits, 1, 1))
    return y


def next_token(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    position: torch.Tensor,
    tokens: torch.Tensor,
    best: torch.Tensor,
    embedding: torch.Tensor,
) -> None:
    """Choose the next token (see the reference); best [B] int64 is zero, and is so again afterwards."""
    batch, vocabulary = logits.shape
    macros, device = _macros(hidden, hidden=hidden.shape[1]), logits.device.index
    _launch(_kernel("largest", macros, device), (_READERS, batch, 1), 0, (logits, best, ctypes.c_int(vocabulary)))
    _go_on(hidden, position, tokens, best, None, embedding)


def next_token_of_shortlist(
    x: torch.Tensor,
    rough: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    hidden: torch.Tensor,
    position: torch.Tensor,
    tokens: torch.Tensor,
    best: torch.Tensor,
    low: torch.Tensor,
    sums: torch.Tensor,
    embedding: torch.Tensor,
) -> None:
    """Choose the next token (see the reference); best int64 and low int32 [B] are zero, and are so again afterwards."""
    batch, vocabulary = rough.shape
    macros, device = _macros(x, hidden=x.shape[1]), x.device.index
    size = ctypes.c_int(vocabulary)
    bound = (x, rough, scales, sums, low, size)
    _launch(_kernel("shortlist_bound", macros, device), (_READERS, batch, 1), 0, bound)
    largest = (x, rough, scales, rows, sums, low, best, size)
    _launch(_kernel("shortlist_largest", macros, device), (_FINDERS, batch, 1), 0, largest)
    _go_on(hidden, position, tokens, best, low, embedding)


def _go_on(
    hidden: torch.Tensor,
    position: torch.Tensor,
    tokens: torch.Tensor,
    best: torch.Tensor,
    low: torch.Tensor | None,
    embedding: torch.Tensor,
) -> None:
    kernel = _kernel("next_token", _macros(hidden, hidden=hidden.shape[1]), hidden.device.index)
    begin_anew = ctypes.c_void_p(None) if low is None else low
    arguments = (best, position, tokens, embedding, hidden, begin_anew, ctypes.c_int(tokens.shape[1]))
    _launch(kernel, (len(best), 1, 1), 0, arguments)


def splits_for(contexts: int, length: int) -> int:
    """Return into how many blocks each of *contexts* of at most *length* places is cut: they shall fill the GPU."""
    splits = 8
    while splits > 1 and (contexts * splits > 264 or length < splits * 16):
        splits //= 2
    return splits


def shared_bytes(group: int, size: int) -> int:
    """Return the shared memory of a block of attention, as cuda.cu lays it out."""
    sides = _THREADS // (size // 2)
    floats = group * size + group * _TILE + 3 * group + sides * group * size + group * size
    return 4 * floats + 2 * 2 * size


def _is_hopper(device: torch.device) -> bool:
    """Whether *device* has clusters and programmatic dependent launch."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _macros(x: torch.Tensor, hidden: int = 8, head: int = 128, group: int = 1, splits: int = 1) -> tuple[str, ...]:
    values = {"T_BF16": int(x.dtype == torch.bfloat16), "PDL": 1, "HIDDEN": hidden, "HEAD": head}
    values |= {"GROUP": group, "SPLITS": splits}
    return tuple(f"-D{name}={value}" for name, value in values.items())


@functools.cache
def source() -> str:
    """Return the CUDA C++ in one piece, so that a compiler's cache sees every change of it."""
    return inlined((FOLDER / "decode_layer" / "cuda.cu").read_text(), FOLDER)


@functools.cache
def _kernel(name: str, macros: tuple[str, ...], device: int, shared: int = 0) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=source(), options=("-std=c++17", "-default-device", *macros))
        kernel = module.get_function(name)
        if shared > _SMALL_SHARED:
            kernel.max_dynamic_shared_size_bytes = shared
    # The module lives as long as its function.
    return kernel, driver().CUfunction(kernel.kernel.ptr)


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    shared: int,
    arguments: tuple[Any, ...],
    cluster: tuple[int, int, int] = (1, 1, 1),
) -> None:
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    stream = torch.cuda.current_stream(device).cuda_stream
    config = configured(grid, _THREADS // 32, cluster, _is_hopper(device), shared, stream)
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    (error,) = driver().cuLaunchKernelEx(config, kernel[1], ctypes.addressof(pointers), 0)
    if error != driver().CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the launch of {kernel[0].name} with blocks {grid} was refused: {error.name}")
