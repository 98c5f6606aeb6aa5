"""Launches the CUDA kernels on PyTorch's current stream, with the attributes that CuPy cannot give (clusters, PDL)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from llmkern.kernels.build import Build, compiled


def launch(
    build: Build,
    weights: ctypes.Structure,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> None:
    """Fill y [M, N] from x [M, K] with the kernel of *build*; *weights* holds device pointers, bias is [N] or None.

    *residual* [M, N] is added. With pairs y is [M, N / 2]. Nothing is synchronized. Raises RuntimeError with the
    driver's reason where a launch is refused.
    """
    (m, k), n = x.shape, y.shape[1] * (2 if build.pairs else 1)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    if build.packed or build.pairs or fits(build, n, k, x.data_ptr() | (weights.codes or 0)):
        tiles = -(-n // build.rows)
        if build.persistent:
            tiles = min(tiles, _multiprocessors(x.device.index) * build.blocks // build.splits)
        grid = (tiles, build.splits, -(-m // build.tokens))
        function = _function(build, x.device.index, "linear")
        cluster = (1, build.splits, 1)
        config = configured(grid, build.warps, cluster, build.pdl, build.shared_bytes, stream)
    else:
        function = _function(build, x.device.index, "linear_any")
        config = configured((-(-n // build.warps), m, 1), build.warps, (1, 1, 1), build.pdl, 0, stream)
    pointers = (0 if tensor is None else tensor.data_ptr() for tensor in (x, bias, residual, y))
    values = [weights, *map(ctypes.c_void_p, pointers), *map(ctypes.c_int, (m, n, k))]
    arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    (error,) = driver().cuLaunchKernelEx(config, function, ctypes.addressof(arguments), 0)
    if error != driver().CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the launch of {build} for M={m}, N={n}, K={k} was refused: {error.name}")


def fits(build: Build, n: int, k: int, addresses: int) -> bool:
    """Whether rows of *k* weights can be loaded 16 bytes at a time, 64 codes of four bits having one scale.

    *addresses* are those of x and the weights, or-ed.
    """
    whole = k % 16 == 0 if build.format == "int8" else k % 64 == 0 and build.shift >= 6
    return n >= build.rows and whole and addresses % 16 == 0


@functools.cache
def driver() -> Any:
    """Return the CUDA driver's functions."""
    from cuda.bindings import driver

    return driver


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _function(build: Build, device: int, name: str) -> Any:
    kernel = compiled(build, device).get_function(name)
    if name == "linear" and build.shared_bytes > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = build.shared_bytes
    return driver().CUfunction(kernel.kernel.ptr)


@functools.lru_cache(maxsize=4096)
def configured(
    grid: tuple[int, int, int], warps: int, cluster: tuple[int, int, int], pdl: bool, shared_bytes: int, stream: int
) -> Any:
    """Return what a launch needs beside its arguments; made once and never changed, threads may launch together."""
    cuda = driver()
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = 32 * warps, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    attributes = []
    if cluster != (1, 1, 1):
        together = cuda.CUlaunchAttribute()
        together.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        together.value.clusterDim.x, together.value.clusterDim.y, together.value.clusterDim.z = cluster
        attributes.append(together)
    if pdl:
        early = cuda.CUlaunchAttribute()
        early.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        attributes.append(early)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config
