"""An SQLite export of Nsight Systems (schema 3.x) as a capture: kernels, copies, launches and NVTX ranges.

Only these tables are read. The environment, command line and host names that such a file carries are never touched.
"""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmkern.errors import UsageError
from llmkern.exchange.capture import Capture, rows_of
from llmkern.exchange.identity import distinct
from llmkern.runfolder.facts import CapturedDevice, DeviceFacts, ImportedFacts, device_facts

MAGIC = b"SQLite format 3\0"
SCHEMA_MAJOR = 3
# Kinds of NVTX events: ranges of one thread and of a process, plain and by time stamp; names of categories and domains.
RANGES, CATEGORY, DOMAIN_NAME = (59, 60, 70, 71), 33, 75
# CUPTI's names of copies and kinds of memory; the export counts memory from 0, CUPTI from 1.
COPIES = {1: "HtoD", 2: "DtoH", 3: "HtoA", 4: "AtoH", 5: "AtoA", 6: "AtoD", 7: "DtoA", 8: "DtoD", 9: "HtoH", 10: "PtoP"}
# Pages of unified memory that move.
UNIFIED = {11: "UVM HtoD", 12: "UVM DtoH", 13: "UVM DtoD"}
MEMORIES = {0: "pageable", 1: "pinned", 2: "device", 3: "array", 4: "managed"}
_VERSION_SUFFIX = re.compile(r"_v\d+$|_ptsz$|_ptds$")
_VERSION = re.compile(r"_V(\d+)$")
LONGEST_BYTES = 16 * 2**20
_NOT_ONE = "export a capture with 'nsys export --type sqlite' and import that"


def read_nsys(path: Path) -> Capture:
    """Return what the export *path* holds of the process with most kernels on each device.

    Raises UsageError for a file that is torn, foreign, of another schema or without GPU activity.
    """
    try:
        # Read-only: nsys files are evidence, and a missing one is not to be created.
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            # No name and no note of an export is longer; a file may say that one of a few bytes is.
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_BYTES)
            return _Export(connection, path).capture()
    except (
        sqlite3.Error,
        pd.errors.DatabaseError,
        UnicodeDecodeError,
        ValueError,
        TypeError,
        OverflowError,
        KeyError,
        MemoryError,
    ) as error:
        raise UsageError(f"{path} cannot be read as an Nsight Systems export ({error}): {_NOT_ONE}.") from error


class _Export:
    """One open export: tables by their plain name, whatever version suffix they carry."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        # An export holds tables. A view may compute what it likes, for as long as it likes.
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        # Of several versions of a table the plain one is meant, else the latest: V10 is later than V3.
        by_version = sorted(map(str, names), key=lambda name: (_version(name) is None, _version(name) or 0))
        self._tables = {_VERSION.sub("", name): name for name in by_version}
        self.missing: list[str] = []
        self.told: list[str] = []

    def capture(self) -> Capture:
        about = self._meta()
        self._check(about)
        strings = self._read("StringIds", ["id", "value"]).drop_duplicates("id").set_index("id")["value"]
        kernels = self._kernels(strings)
        if kernels.empty:
            raise UsageError(
                f"{self._path} holds no kernel, copy or graph launch of a GPU: capture with 'nsys profile --trace "
                "cuda,nvtx' and export again."
            )
        kernels = kernels.assign(device=self._numbered(kernels))
        drivers = self._drivers(kernels)
        process = _process(kernels["globalPid"])
        kernels = kernels[process == kernels["device"].map(drivers)].sort_values("start_ns", kind="stable")
        others = set(process.tolist()) - set(drivers.values())
        if others:
            self.missing.append(f"the GPU work of {len(others)} other processes, which was left out")
        begin_ns = self._begin_ns()
        processes = tuple(dict.fromkeys(drivers.values()))
        launches = self._launches(strings, processes)
        ranges = self._ranges(strings, processes, int(max(kernels["end_ns"].max(), launches["end_ns"].max(), 0)))
        overheads = self._overheads(strings, processes)
        if len(processes) > 1:
            kernels, launches = distinct(kernels, launches, _process(kernels["globalPid"]).to_numpy())
        unfinished = (kernels["end_ns"] == 0).to_numpy()
        untimed = unfinished & (kernels["start_ns"] == 0).to_numpy()
        for frame in (kernels, launches, overheads, ranges):
            frame["start_ns"] = frame["start_ns"].astype(np.int64) + begin_ns
            frame["end_ns"] = frame["end_ns"].astype(np.int64) + begin_ns
        # What has no time has none since 1970 either.
        kernels.loc[unfinished, "end_ns"] = 0
        kernels.loc[untimed, "start_ns"] = 0
        source = ImportedFacts(
            file=self._path.name, format="an Nsight Systems export", schema=about.get("EXPORT_SCHEMA_VERSION")
        )
        tables = {"kernels": kernels, "launches": launches, "overheads": overheads, "ranges": ranges}
        found: dict[str, Any] = {name: rows_of(name, rows) for name, rows in tables.items()}
        return Capture(
            **found,
            imported=source,
            devices=tuple(
                CapturedDevice(self._device(index), self._path.name, (driver,) if len(processes) > 1 else ())
                for index, driver in drivers.items()
            ),
            started=pd.Timestamp(begin_ns, unit="ns", tz="UTC").isoformat(timespec="seconds"),
            versions={"nsys": about.get("EXPORT_PRODUCT_VERSION")},
            missing=self.missing,
            told=self.told,
        )

    def _numbered(self, kernels: pd.DataFrame) -> pd.Series:
        """Return the GPU of each of *kernels*: a process counts those that it sees, each its first as 0."""
        rows = self._read("TARGET_INFO_CUDA_DEVICE", ["gpuId", "cudaId", "pid"]).dropna()
        known = {(int(pid), int(cuda)): int(gpu) for gpu, cuda, pid in rows.itertuples(index=False, name=None)}
        codes, seen = pd.factorize(pd.MultiIndex.from_arrays([_process(kernels["globalPid"]), kernels["device"]]))
        numbers = np.array([known.get((int(p), int(d)), int(d)) for p, d in seen], np.int64)
        return pd.Series(numbers[codes] if len(codes) else numbers, index=kernels.index)

    @staticmethod
    def _drivers(kernels: pd.DataFrame) -> dict[int, int]:
        """Return by device, the one with most *kernels* first, the process that has most of them on it."""
        counts = pd.DataFrame({"device": kernels["device"], "process": _process(kernels["globalPid"])}).value_counts()
        found: dict[int, int] = {}
        for device, process in counts.index.tolist():
            found.setdefault(int(device), int(process))
        return found

    def _meta(self) -> dict[str, str]:
        rows = self._read("META_DATA_EXPORT", ["name", "value"])
        return {str(name): str(value) for name, value in zip(rows["name"], rows["value"], strict=True)}

    def _check(self, about: dict[str, str]) -> None:
        if "StringIds" not in self._tables:
            found = f"{len(self._tables)} tables, none of them StringIds" if self._tables else "no table at all"
            raise UsageError(f"{self._path} holds {found}: it is no export of Nsight Systems; {_NOT_ONE}.")
        version = about.get("EXPORT_SCHEMA_VERSION", "")
        major = re.match(r"\d+", version)
        if major and int(major[0]) != SCHEMA_MAJOR:
            newer = int(major[0]) > SCHEMA_MAJOR
            raise UsageError(
                f"{self._path} has export schema {version}, this llmkern reads {SCHEMA_MAJOR}.x: "
                f"{'update llmkern' if newer else 'export the .nsys-rep again with a newer nsys'}."
            )

    def _read(self, table: str, wanted: list[str], where: str = "") -> pd.DataFrame:
        """Return *wanted* columns of *table*, empty where the file has no such column or table."""
        name = self._tables.get(table)
        if name is None:
            return pd.DataFrame(columns=wanted)
        there = {row[1] for row in self._connection.execute(f'PRAGMA table_info("{name}")')}
        chosen = [column for column in wanted if column in there]
        if not chosen:
            return pd.DataFrame(columns=wanted)
        listed = ", ".join(f'"{column}"' for column in chosen)
        rows = pd.read_sql_query(f'SELECT {listed} FROM "{name}" {where}', self._connection)
        return rows.reindex(columns=wanted)

    def _begin_ns(self) -> int:
        rows = self._read("TARGET_INFO_SESSION_START_TIME", ["utcEpochNs"]).dropna()
        if rows.empty:
            self.missing.append("the start of the session: times count from 1970")
            return 0
        return int(rows["utcEpochNs"].iloc[0])

    def _device(self, index: int) -> DeviceFacts:
        columns = {
            "name": "name",
            "totalMemory": "memory_bytes",
            "l2CacheSize": "l2_bytes",
            "memoryBandwidth": "memory_bytes_per_s",
            "smCount": "multiprocessors",
            "clockRate": "clock_hz",
            "computeMajor": "major",
            "computeMinor": "minor",
        }
        rows = self._read("TARGET_INFO_GPU", ["id", *columns])
        rows = rows[rows["id"] == index]
        if rows.empty:
            self.missing.append("what the GPU is")
            return DeviceFacts(kind="cuda", index=index, name="unknown GPU")
        found = {new: rows.iloc[0][old] for old, new in columns.items() if rows.iloc[0][old] is not None}
        whole = {key: int(value) for key, value in found.items() if key != "name" and value == value}
        device = {"kind": "cuda", "index": index, "name": str(found.get("name", "unknown GPU"))}
        if "clock_hz" in whole:
            device["sm_clock_max_mhz"] = whole.pop("clock_hz") // 1_000_000
        if {"major", "minor"} <= set(whole):
            device["compute_capability"] = f"{whole.pop('major')}.{whole.pop('minor')}"
        return device_facts({**device, **whole})

    def _kernels(self, strings: pd.Series) -> pd.DataFrame:
        common = ["start", "end", "deviceId", "contextId", "streamId", "correlationId", "globalPid", "graphNodeId"]
        shape = ["gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ"]
        resources = ["registersPerThread", "staticSharedMemory", "dynamicSharedMemory"]
        rows = self._read("CUPTI_ACTIVITY_KIND_KERNEL", [*common, "graphId", "demangledName", *shape, *resources])
        parts = [
            rows.assign(
                name=rows["demangledName"].map(strings).fillna("unknown kernel"),
                kind="kernel",
                registers=rows["registersPerThread"],
                shared_bytes=rows["staticSharedMemory"].fillna(0) + rows["dynamicSharedMemory"].fillna(0),
                copied_bytes=0,
            )
        ]
        rows = self._read("CUPTI_ACTIVITY_KIND_MEMCPY", [*common, "bytes", "copyKind", "srcKind", "dstKind"])
        host = np.where(rows["copyKind"] == 2, rows["dstKind"], rows["srcKind"])
        names = [
            f"memcpy {UNIFIED[copy]}"
            if copy in UNIFIED
            else f"memcpy {COPIES.get(copy, 'unknown')} ({'device' if copy == 10 else MEMORIES.get(memory, 'unknown')})"
            for copy, memory in zip(rows["copyKind"], host, strict=True)
        ]
        parts.append(rows.assign(name=names, kind="memcpy", copied_bytes=rows["bytes"]))
        rows = self._read("CUPTI_ACTIVITY_KIND_MEMSET", [*common, "bytes"])
        parts.append(rows.assign(name="memset", kind="memset", copied_bytes=rows["bytes"]))
        rows = self._read("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", [*common, "graphId"])
        if len(rows):
            self.missing.append("the kernels inside CUDA graphs (each launch is one; --cuda-graph-trace=node has them)")
        parts.append(rows.assign(name=[f"CUDA graph {number}" for number in rows["graphId"]], kind="kernel"))
        found = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
        found = found.rename(
            columns={
                "start": "start_ns",
                "end": "end_ns",
                "deviceId": "device",
                "contextId": "context",
                "streamId": "stream",
                "correlationId": "correlation_id",
                "graphId": "graph_id",
                "graphNodeId": "graph_node_id",
                **{f"{part}{axis}": f"{part}_{axis.lower()}" for part in ("grid", "block") for axis in "XYZ"},
            }
        )
        numbers = [c for c in found.columns if c not in ("name", "kind", "globalPid")]
        return found.assign(**{c: pd.to_numeric(found[c]).fillna(0).astype(np.int64) for c in numbers})

    def _launches(self, strings: pd.Series, processes: tuple[int, ...]) -> pd.DataFrame:
        rows = self._read("CUPTI_ACTIVITY_KIND_RUNTIME", ["start", "end", "globalTid", "correlationId", "nameId"])
        if rows.empty:
            self.missing.append("host calls: without them gaps have no cause")
        rows = _of_processes(rows, processes)
        thread = rows["globalTid"].to_numpy(np.int64)
        api = rows["nameId"].map(strings).fillna("unknown call").astype(str)
        return pd.DataFrame(
            {
                "start_ns": rows["start"],
                "end_ns": rows["end"],
                "process": (thread >> 24) & 0xFFFFFF,
                "thread": thread & 0xFFFFFF,
                "correlation_id": rows["correlationId"].fillna(0).astype(np.int64),
                "api": api.map({name: _VERSION_SUFFIX.sub("", name) for name in api.unique()}),
            }
        )

    def _overheads(self, strings: pd.Series, processes: tuple[int, ...]) -> pd.DataFrame:
        rows = self._read("CUPTI_ACTIVITY_KIND_OVERHEAD", ["start", "end", "globalTid", "nameId"])
        rows = _of_processes(rows, processes)
        return pd.DataFrame(
            {
                "start_ns": rows["start"],
                "end_ns": rows["end"],
                "thread": rows["globalTid"].to_numpy(np.int64) & 0xFFFFFF,
                "kind": rows["nameId"].map(strings).fillna("overhead").astype(str),
                "process": _process(rows["globalTid"]),
            }
        )

    def _ranges(self, strings: pd.Series, processes: tuple[int, ...], last_ns: int) -> pd.DataFrame:
        columns = ["start", "end", "eventType", "category", "text", "textId", "globalTid", "domainId", "jsonText"]
        rows = self._read("NVTX_EVENTS", columns)
        if rows.empty:
            self.missing.append("NVTX ranges: without them there are no phases")
        text = rows["text"].where(rows["text"].notna(), rows["textId"].map(strings)).astype(object)
        domains = rows["eventType"] == DOMAIN_NAME
        domain_names = dict(zip(rows["domainId"][domains], text[domains], strict=True))
        named = rows["eventType"] == CATEGORY
        categories = {
            (domain, number): name
            for domain, number, name in zip(rows["domainId"][named], rows["category"][named], text[named], strict=True)
        }
        open_ = rows["eventType"].isin(RANGES) & rows["end"].isna() & text.notna()
        if open_.any():
            names = ", ".join(map(str, text[open_].value_counts().index[:5]))
            self.told.append(
                f"{int(open_.sum()):,} NVTX range(s) have no end ({names}): taken to go on to the end of the capture."
            )
            rows = rows.assign(end=rows["end"].where(~open_, last_ns))
        keep = rows["eventType"].isin(RANGES) & rows["end"].notna() & text.notna()
        rows, text = _of_processes(rows[keep], processes), text[keep]
        rows = rows[rows["end"] >= rows["start"]]
        text = text[rows.index].astype(str)
        found = pd.DataFrame(
            {
                "start_ns": rows["start"],
                "end_ns": rows["end"],
                "process": _process(rows["globalTid"]),
                "thread": rows["globalTid"].to_numpy(np.int64) & 0xFFFFFF,
                "domain": rows["domainId"].map(domain_names).fillna("").astype(str),
                "name": text,
                "category": [
                    categories.get((domain, number))
                    for domain, number in zip(rows["domainId"], rows["category"], strict=True)
                ],
            },
            index=rows.index,
        )
        told = [_payload(value) for value in rows["jsonText"]]
        for name in ("phase", "token", "round", "repeat", "new_tokens"):
            found[name] = pd.Series([one.get(name) for one in told], index=rows.index, dtype=object)
        found = found.sort_values(["start_ns", "end_ns"], ascending=[True, False], kind="stable")
        return found.assign(depth=_depth(found)).reset_index(drop=True)


def _version(table: str) -> int | None:
    """Return the version in the name of *table*, None for one without."""
    found = _VERSION.search(table)
    return int(found[1]) if found else None


def _process(global_id: pd.Series) -> pd.Series:
    """Return the process in a globalPid or globalTid, 0 for none: between 24 bits of virtual machine and of thread."""
    number = pd.to_numeric(global_id).fillna(0).to_numpy(np.int64)
    return pd.Series((number >> 24) & 0xFFFFFF, index=global_id.index)


def _of_processes(rows: pd.DataFrame, processes: tuple[int, ...]) -> pd.DataFrame:
    """Return the *rows* (with globalTid) of *processes*, all where one is not known.

    Those that name none belong to the first.
    """
    thread = pd.to_numeric(rows["globalTid"])
    number = thread.fillna(processes[0] << 24).astype(np.int64)
    same = thread.isna() | _process(number).isin(processes) | (0 in processes)
    return rows.assign(globalTid=number)[same]


def _payload(value: Any) -> dict[str, Any]:
    """Return what llmkern wrote beside one of its ranges, nothing for any other."""
    if not isinstance(value, str):
        return {}
    try:
        found = json.loads(value)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _depth(ranges: pd.DataFrame) -> list[int]:
    """Return how many ranges of the same thread each range lies in; they come by their start, longer ones first."""
    open_until: dict[int, list[int]] = {}
    depths = []
    for start, end, thread in zip(ranges["start_ns"], ranges["end_ns"], ranges["thread"], strict=True):
        stack = open_until.setdefault(int(thread), [])
        while stack and stack[-1] <= start:
            stack.pop()
        depths.append(len(stack))
        stack.append(int(end))
    return depths
