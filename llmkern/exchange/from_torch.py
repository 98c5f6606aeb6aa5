"""A trace of torch.profiler (Chrome JSON, plain or gzipped) as a capture: kernels, copies, host calls, annotations."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmkern.errors import UsageError
from llmkern.exchange.capture import Capture, rows_of
from llmkern.exchange.identity import distinct, owners
from llmkern.runfolder.facts import CapturedDevice, DeviceFacts, ImportedFacts, device_facts

GZIP = b"\x1f\x8b"
# Kineto wrote "Kernel", "Memcpy", "Memset" and "Runtime" before PyTorch 1.13.
_GPU = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset", "memcpy": "memcpy", "memset": "memset"}
# cuda_runtime, cuda_driver; xpu_, mtia_ and privateuse1_ for other devices.
_CALLS = re.compile(r"(^|_)(runtime|driver)$")
# ROCm before 7.2 calls copies and fills kernels; roctracer names copies by their ends.
_ROCM_WORK = re.compile(r"^__amd_rocclr_(copy|fill)Buffer")
_ROCM_COPY = re.compile(r"^Copy(Host|Device)To(Host|Device)$")
# Bandwidths of copies of no length, as some versions of Kineto write them.
_NO_NUMBER = re.compile(r'("(?:[^"\\]|\\.)*")|[-+]?\b(?:inf|nan)\b', re.IGNORECASE)
# Traces become about 20 times as long.
_MOST_RATIO, _ALWAYS_BYTES = 100, 2**26
# Where no start of the trace is given, so many microseconds are a date after 2001.
_DATED_US = 10**15
# What a process or thread has for a number in the tables.
_MOST = 2**31 - 1
_NOTES = ("user_annotation",)
_COPY = re.compile(r"^Memcpy (\w+) \((\w+) -> (\w+)\)")
_VERSION_SUFFIX = re.compile(r"_v\d+$")
# What Nsight Systems writes with --type json or jsonlines: event objects of its own.
_NSYS_JSON = re.compile(
    r'"(CudaEvent|TraceProcessEvent|NvtxEvent|GlobalId|globalTid|eventClass|StringId|TargetInfo\w*)"'
)
# How XLA calls the devices of a trace.
_XLA = "/device:GPU:"
_NSYS_SENTENCE = (
    "is JSON of Nsight Systems, which has no documented form: run 'nsys export --type sqlite' on its report and import "
    "the result."
)


def read_torch(path: Path) -> Capture:
    """Return what the trace *path* holds; raises UsageError for a file that is torn, foreign or without GPU work."""
    try:
        data = path.read_bytes()
        return _capture(_parsed(_unzipped(data, path) if data.startswith(GZIP) else data, path), path)
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise UsageError(
            f"{path} cannot be read as a trace of torch.profiler ({type(error).__name__}: {error}): write it again "
            "with prof.export_chrome_trace(FILE)."
        ) from error


def _unzipped(data: bytes, path: Path) -> bytes:
    """Return gzipped *data* (one member or several) as it was; UsageError for more than any trace becomes."""
    most = _MOST_RATIO * len(data) + _ALWAYS_BYTES
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise UsageError(
            f"{path} becomes more than {_MOST_RATIO} times as long when it is unpacked ({len(data):,} bytes to over "
            f"{most:,}): no trace does; unpack it yourself and import the .json if it is one."
        )
    return found


def _parsed(data: bytes, path: Path) -> Any:
    """Return the JSON of *data*: in any Unicode, with control characters in names; raises UsageError for nsys' own."""
    text = data.decode(json.detect_encoding(data), "surrogatepass").removeprefix("\ufeff")
    try:
        return _loaded(text)
    except json.JSONDecodeError as error:
        # What is wrong is often one name; which event has it shows in what stands around it.
        if _NSYS_JSON.search(text[:65536]):
            raise UsageError(f"{path} {_NSYS_SENTENCE}") from error
        around = text[max(0, error.pos - 40) : error.pos + 20]
        raise UsageError(
            f"{path} cannot be read as a trace of torch.profiler: no JSON at character {error.pos:,} ({error.msg}), "
            f"behind {around!r}: mend the file there, or capture again (some versions write backslashes in names so)."
        ) from error


def _loaded(text: str) -> Any:
    """Return the JSON *text*, with null for numbers that are none; raises JSONDecodeError."""
    try:
        # Microseconds since 1970 have more digits than a float.
        return json.loads(text, strict=False, parse_float=Decimal)
    except json.JSONDecodeError as error:
        if not re.match(r"[-+]?(inf|nan)\b", text[error.pos : error.pos + 8], re.IGNORECASE):
            raise
        # Names in quotes may hold these words; they stay.
        mended = _NO_NUMBER.sub(lambda found: found[1] or "null", text)
        return json.loads(mended, strict=False, parse_float=Decimal)


def _category(event: dict[str, Any]) -> str:
    return str(event.get("cat", "")).lower()


def _capture(trace: Any, path: Path) -> Capture:
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    about = trace if isinstance(trace, dict) else {}
    base_ns = int(about.get("baseTimeNanoseconds") or 0)
    whole = [e for e in events if isinstance(e, dict) and e.get("ph") == "X"]
    gpu = [e for e in whole if _category(e) in _GPU]
    named = (e for e in events if isinstance(e, dict) and e.get("ph") == "M")
    if not gpu and any(_XLA in str(e.get("args")) for e in named):
        raise UsageError(
            f"{path} is a trace of JAX's profiler, which says of no event whether it is a kernel: run the program "
            "under 'nsys profile --trace cuda,nvtx' and import the SQLite export."
        )
    if not gpu and isinstance(trace, list) and _NSYS_JSON.search(str(events[:20]).replace("'", '"')):
        raise UsageError(f"{path} {_NSYS_SENTENCE}")
    if not gpu:
        raise UsageError(
            f"{path} holds no kernel or copy of a GPU among {len(whole)} events: profile with "
            "activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]."
        )
    kernels = pd.DataFrame([_kernel(e, base_ns) for e in gpu]).sort_values("start_ns", kind="stable")
    calls = [e for e in whole if _CALLS.search(_category(e))]
    notes = [e for e in whole if _category(e) in _NOTES]
    missing = []
    if not calls:
        missing.append("host calls: without them gaps have no cause")
    if not notes:
        missing.append("annotations (torch.profiler.record_function): without them there are no phases")
    if not base_ns and max(_decimal(e.get("ts", 0)) for e in gpu) < _DATED_US:
        missing.append("the start of the trace: times count from 1970")
    launches = pd.DataFrame(
        [
            {
                **_times(e, base_ns),
                "process": _number(e.get("pid")),
                "thread": _number(e.get("tid")),
                "correlation_id": _whole(e.get("args", {}).get("correlation")),
                "api": _VERSION_SUFFIX.sub("", str(e.get("name"))),
            }
            for e in calls
        ]
    )
    ranges = pd.DataFrame(
        [
            {
                **_times(e, base_ns),
                "process": _number(e.get("pid")),
                "thread": _number(e.get("tid")),
                "domain": "",
                "name": str(e.get("name")),
                "depth": 0,
            }
            for e in notes
        ]
    )
    overheads = pd.DataFrame(
        [
            {
                **_times(e, base_ns),
                "process": _number(e.get("pid")),
                "thread": _number(e.get("tid")),
                "kind": str(e.get("name")),
            }
            for e in whole
            if _category(e) == "overhead"
        ]
    )
    launches, ranges = rows_of("launches", launches), rows_of("ranges", ranges)
    kernels = rows_of("kernels", kernels)
    driven = owners(kernels, launches)
    kernels, launches = distinct(kernels, launches, kernels["device"].map(driven).fillna(-1).to_numpy(np.int64))
    first_ns = int(kernels["start_ns"].iloc[0])
    schema = about.get("schemaVersion")
    return Capture(
        kernels,
        launches,
        rows_of("overheads", overheads),
        ranges,
        imported=ImportedFacts(
            file=path.name, format="a trace of torch.profiler", schema=None if schema is None else str(schema)
        ),
        devices=_devices(about.get("deviceProperties") or [], kernels, driven, path.name),
        started=pd.Timestamp(first_ns, unit="ns", tz="UTC").isoformat(timespec="seconds"),
        versions={"trace_schema": str(schema or "")},
        missing=missing,
        rank=_rank(about.get("distributedInfo")),
    )


def _rank(distributed: Any) -> int | None:
    """Return the rank that the job gave the process of this trace, None where it was alone or does not say."""
    rank = distributed.get("rank") if isinstance(distributed, dict) else None
    return rank if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 else None


def _devices(
    properties: list[dict[str, Any]], kernels: pd.DataFrame, driven: dict[int, int], file: str
) -> tuple[CapturedDevice, ...]:
    """Return the devices of *kernels*, the one with most of them first; *driven* has the process of each."""
    several = len(set(driven.values())) > 1
    counts = kernels["device"].value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
    return tuple(
        CapturedDevice(_device(properties, int(index)), file, (driven[index],) if several and index in driven else ())
        for index in counts.index.tolist()
    )


def _times(event: dict[str, Any], base_ns: int) -> dict[str, int]:
    start_us, long_us = _decimal(event["ts"]), _decimal(event.get("dur") or 0)
    if start_us == 0 and long_us == 0:
        # What CUPTI could not time.
        return {"start_ns": 0, "end_ns": 0}
    start_ns = base_ns + round(start_us * 1000)
    return {"start_ns": start_ns, "end_ns": start_ns + round(long_us * 1000)}


def _decimal(value: Any) -> Decimal:
    return value if isinstance(value, Decimal) else Decimal(str(value))


def _kernel(event: dict[str, Any], base_ns: int) -> dict[str, Any]:
    told = event.get("args", {})
    name = str(event.get("name"))
    kind = _GPU[_category(event)]
    copy = _COPY.match(name)
    rocm, ends = _ROCM_WORK.match(name), _ROCM_COPY.match(name)
    if rocm:
        kind = "memcpy" if rocm[1] == "copy" else "memset"
        name = f"memcpy ({name.removeprefix('__amd_rocclr_')})"
    elif ends:
        name = f"memcpy {ends[1][0]}to{ends[2][0]} (unknown)"
    elif copy:
        host = copy[3] if copy[1] == "DtoH" else copy[2]
        name = f"memcpy {copy[1]} ({'device' if copy[1] == 'PtoP' else host.lower()})"
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


def _number(value: Any) -> int:
    """Return *value* as a process or thread of the tables: tools that merge traces shift them beyond what fits."""
    number = _whole(value)
    return number if abs(number) <= _MOST else number % _MOST


def _device(properties: list[dict[str, Any]], index: int) -> DeviceFacts:
    own = next((p for p in properties if p.get("id") == index), None)
    if own is None and len(properties) == 1:
        # ROCm numbers agents in events and devices from 0 here; of one device there is no doubt.
        own = properties[0]
    if own is None:
        return DeviceFacts(kind="cuda", index=index, name="unknown GPU")
    found: dict[str, Any] = {"kind": "cuda", "index": index, "name": str(own.get("name") or "unknown GPU")}
    if "computeMajor" in own and "computeMinor" in own:
        found["compute_capability"] = f"{own['computeMajor']}.{own['computeMinor']}"
    for old, new in (("totalGlobalMem", "memory_bytes"), ("numSms", "multiprocessors")):
        if own.get(old):
            found[new] = _whole(own[old])
    return device_facts(found)
