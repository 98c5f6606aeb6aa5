"""Traces of torch.profiler made by hand, event by event; times in µs after BASE_NS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BASE_NS = 1_780_000_000_000_000_000
H100 = {"id": 0, "name": "NVIDIA H100 80GB HBM3", "computeMajor": 9, "computeMinor": 0, "numSms": 132}


def event(
    category: str, name: str, ts: float, dur: float, *, pid: int = 1, tid: int = 1, **args: Any
) -> dict[str, Any]:
    """Return a whole event with *args*."""
    return {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


def kernel(name: str, ts: float, dur: float, correlation: int, **args: Any) -> dict[str, Any]:
    """Return a kernel, or with *category* other work, on stream 7 of device 0 unless *args* say otherwise."""
    category = args.pop("category", "kernel")
    placed = {"device": 0, "context": 1, "stream": 7, "correlation": correlation, **args}
    return event(category, name, ts, dur, pid=placed["device"], tid=placed["stream"], **placed)


def launch(ts: float, correlation: int, *, name: str = "cudaLaunchKernel", pid: int = 1, **more: Any) -> dict[str, Any]:
    """Return the host call of 5 µs that launched *correlation*."""
    return event(more.pop("category", "cuda_runtime"), name, ts, 5, pid=pid, tid=pid, correlation=correlation)


def work(count: int, begin: float = 0.0) -> list[dict[str, Any]]:
    """Return *count* kernels of 40 µs, 60 µs apart, each launched 10 µs before it begins."""
    found = []
    for number in range(1, count + 1):
        ts = begin + 100.0 * number
        found += [launch(ts - 10, number), kernel("gemm", ts, 40, number)]
    return found


def written(path: Path, events: list[Any], **head: Any) -> Path:
    """Write *events* as a trace with *head* and return its *path*."""
    about = {"schemaVersion": 1, "baseTimeNanoseconds": BASE_NS, "deviceProperties": [H100], **head}
    path.write_text(json.dumps({**about, "traceEvents": events}))
    return path
