"""A trace of torch.profiler (Chrome JSON, plain or gzipped) as a capture: kernels, copies, host calls, annotations."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pandas as pd

from llmkern.errors import UsageError
from llmkern.exchange.capture import Capture, rows_of
from llmkern.runfolder.facts import DeviceFacts, ImportedFacts, device_facts

GZIP = b"\x1f\x8b"
_GPU = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}
_CALLS = ("cuda_runtime", "cuda_driver")
_NOTES = ("user_annotation",)
_COPY = re.compile(r"^Memcpy (\w+) \((\w+) -> (\w+)\)")
_VERSION_SUFFIX = re.compile(r"_v\d+$")


def read_torch(path: Path) -> Capture:
    """Return what the trace *path* holds; raises UsageError for a file that is torn, foreign or without GPU work."""
    try:
        data = path.read_bytes()
        return _capture(json.loads(gzip.decompress(data) if data.startswith(GZIP) else data), path)
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UsageError(
            f"{path} cannot be read as a trace of torch.profiler ({type(error).__name__}: {error}): write it again "
            "with prof.export_chrome_trace(FILE)."
        ) from error


def _capture(trace: Any, path: Path) -> Capture:
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    about = trace if isinstance(trace, dict) else {}
    base_ns = int(about.get("baseTimeNanoseconds") or 0)
    whole = [e for e in events if isinstance(e, dict) and e.get("ph") == "X"]
    gpu = [e for e in whole if e.get("cat") in _GPU]
    if not gpu:
        raise UsageError(
            f"{path} holds no kernel or copy of a GPU among {len(whole)} events: profile with "
            "activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]."
        )
    kernels = pd.DataFrame([_kernel(e, base_ns) for e in gpu]).sort_values("start_ns", kind="stable")
    calls = [e for e in whole if e.get("cat") in _CALLS]
    notes = [e for e in whole if e.get("cat") in _NOTES]
    missing = []
    if not calls:
        missing.append("host calls: without them gaps have no cause")
    if not notes:
        missing.append("annotations (torch.profiler.record_function): without them there are no phases")
    if not base_ns:
        missing.append("the start of the trace: times count from 1970")
    launches = pd.DataFrame(
        [
            {
                **_times(e, base_ns),
                "process": _whole(e.get("pid")),
                "thread": _whole(e.get("tid")),
                "correlation_id": _whole(e.get("args", {}).get("correlation")),
                "api": _VERSION_SUFFIX.sub("", str(e.get("name"))),
            }
            for e in calls
        ]
    )
    ranges = pd.DataFrame(
        [
            {**_times(e, base_ns), "thread": _whole(e.get("tid")), "domain": "", "name": str(e.get("name")), "depth": 0}
            for e in notes
        ]
    )
    first_ns = int(kernels["start_ns"].iloc[0])
    schema = about.get("schemaVersion")
    tables = {"kernels": kernels, "launches": launches, "overheads": pd.DataFrame(), "ranges": ranges}
    return Capture(
        **{name: rows_of(name, rows) for name, rows in tables.items()},
        imported=ImportedFacts(
            file=path.name, format="a trace of torch.profiler", schema=None if schema is None else str(schema)
        ),
        device=_device(about.get("deviceProperties") or [], int(kernels["device"].value_counts().index[0])),
        started=pd.Timestamp(first_ns, unit="ns", tz="UTC").isoformat(timespec="seconds"),
        versions={"trace_schema": str(schema or "")},
        missing=missing,
    )


def _times(event: dict[str, Any], base_ns: int) -> dict[str, int]:
    # Microseconds with three decimals: whole nanoseconds, once rounded.
    start_ns = base_ns + round(float(event["ts"]) * 1e3)
    return {"start_ns": start_ns, "end_ns": start_ns + max(0, round(float(event.get("dur", 0)) * 1e3))}


def _kernel(event: dict[str, Any], base_ns: int) -> dict[str, Any]:
    told = event.get("args", {})
    name = str(event.get("name"))
    copy = _COPY.match(name)
    if copy:
        host = copy[3] if copy[1] == "DtoH" else copy[2]
        name = f"memcpy {copy[1]} ({'device' if copy[1] == 'PtoP' else host.lower()})"
    kind = _GPU[event["cat"]]
    found = {
        **_times(event, base_ns),
        "device": _whole(told.get("device")),
        "context": _whole(told.get("context")),
        "stream": _whole(told.get("stream")),
        "correlation_id": _whole(told.get("correlation")),
        "graph_id": _whole(told.get("graph id")),
        "graph_node_id": _whole(told.get("graph node id")),
        "name": "memset" if kind == "memset" else name,
        "kind": kind,
        "registers": _whole(told.get("registers per thread")),
        "shared_bytes": _whole(told.get("shared memory")),
        "copied_bytes": _whole(told.get("bytes")),
    }
    for part in ("grid", "block"):
        shape = told.get(part) or [0, 0, 0]
        found |= {f"{part}_{axis}": _whole(value) for axis, value in zip("xyz", shape, strict=True)}
    return found


def _whole(value: Any) -> int:
    """Return *value* as an integer, 0 for what is none: threads and processes may have names instead of numbers."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0


def _device(properties: list[dict[str, Any]], index: int) -> DeviceFacts:
    own = next((p for p in properties if p.get("id") == index), None)
    if own is None:
        return DeviceFacts(kind="cuda", index=index, name="unknown GPU")
    found: dict[str, Any] = {"kind": "cuda", "index": index, "name": str(own.get("name", "unknown GPU"))}
    if "computeMajor" in own and "computeMinor" in own:
        found["compute_capability"] = f"{own['computeMajor']}.{own['computeMinor']}"
    for old, new in (("totalGlobalMem", "memory_bytes"), ("numSms", "multiprocessors")):
        if own.get(old):
            found[new] = _whole(own[old])
    return device_facts(found)
