"""An SQLite file in the schema of Nsight Systems' own exports (3.20), for ``nsys stats`` and other readers of it.

Times are ns since the start of the session. What llmkern knows beyond that schema is there twice: as NVTX ranges of the
domain llmkern (gaps by cause, on a thread of their own) with joules as payload and power as GPU metrics, which other
readers show, and in tables LLMKERN_* with a row per kernel and gap, for queries.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from llmkern import __version__
from llmkern.errors import RecordingError
from llmkern.exchange.from_nsys import CATEGORY, COPIES, DOMAIN_NAME, MEMORIES, RANGES, UNIFIED
from llmkern.exchange.overlay import Overlay
from llmkern.runfolder.vocabulary import DOMAIN
from llmkern.text import short_name

SCHEMA = (3, 20, 3)
# Gaps lie on a thread that launches nothing, so that no kernel is counted as work of a gap.
GAP_THREAD = 0xFFFFFF
_PUSH_POP, _START_END = RANGES[:2]
_DOMAIN_ID = 1
_VM = 1 << 48
_COPY = re.compile(r"^memcpy ((?:UVM )?\w+)(?: \((\w+)\))?$")

_COMMON = (
    "start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL, "
    "greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, "
)
_TABLES = {
    "StringIds": "id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL",
    "META_DATA_EXPORT": "name TEXT NOT NULL, value TEXT",
    "META_DATA_CAPTURE": "name TEXT NOT NULL, value TEXT",
    "TARGET_INFO_SESSION_START_TIME": "utcEpochNs INTEGER, utcTime TEXT, localTime TEXT",
    "ANALYSIS_DETAILS": "globalVid INTEGER NOT NULL, duration INTEGER NOT NULL, startTime INTEGER NOT NULL, "
    "stopTime INTEGER NOT NULL",
    "TARGET_INFO_GPU": "vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT, busLocation TEXT, isDiscrete INTEGER, "
    "l2CacheSize INTEGER, totalMemory INTEGER, memoryBandwidth INTEGER, clockRate INTEGER, smCount INTEGER, "
    "pwGpuId INTEGER, uuid TEXT, luid INTEGER, chipName TEXT, cuDevice INTEGER, computeMajor INTEGER, "
    "computeMinor INTEGER",
    "TARGET_INFO_CUDA_DEVICE": "gpuId INTEGER, cudaId INTEGER NOT NULL, pid INTEGER NOT NULL",
    "CUPTI_ACTIVITY_KIND_KERNEL": _COMMON
    + "demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, launchType INTEGER, "
    "cacheConfig INTEGER, registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL, gridY INTEGER NOT NULL, "
    "gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL, blockZ INTEGER NOT NULL, "
    "staticSharedMemory INTEGER NOT NULL, dynamicSharedMemory INTEGER NOT NULL, "
    "localMemoryPerThread INTEGER NOT NULL, localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL, "
    "sharedMemoryExecuted INTEGER, graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER, graphId INTEGER",
    "CUPTI_ACTIVITY_KIND_MEMCPY": _COMMON
    + "bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, deprecatedSrcId INTEGER, srcKind INTEGER, dstKind INTEGER, "
    "srcDeviceId INTEGER, srcContextId INTEGER, dstDeviceId INTEGER, dstContextId INTEGER, migrationCause INTEGER, "
    "graphNodeId INTEGER, virtualAddress INTEGER, copyCount INTEGER",
    "CUPTI_ACTIVITY_KIND_MEMSET": _COMMON
    + "value INTEGER NOT NULL, bytes INTEGER NOT NULL, graphNodeId INTEGER, memKind INTEGER",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, "
    "globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, "
    "callchainId INTEGER",
    "CUPTI_ACTIVITY_KIND_OVERHEAD": "start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL, "
    "globalTid INTEGER, correlationId INTEGER, nameId INTEGER, overheadType INTEGER NOT NULL",
    "NVTX_EVENTS": "start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER, "
    "category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, "
    "domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, "
    "int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT, binaryData TEXT",
    "ThreadNames": "nameId INTEGER NOT NULL, priority INTEGER, globalTid INTEGER",
    "PROCESSES": "globalPid INTEGER, pid INTEGER, name TEXT",
    "GPU_METRICS": "rawTimestamp INTEGER NOT NULL, timestamp INTEGER NOT NULL, typeId INTEGER NOT NULL, "
    "metricId INTEGER NOT NULL, value INTEGER NOT NULL",
    "TARGET_INFO_GPU_METRICS": "typeId INTEGER NOT NULL, sourceId INTEGER NOT NULL, typeName TEXT NOT NULL, "
    "metricId INTEGER NOT NULL, metricName TEXT NOT NULL",
    "ENUM_NSYS_EVENT_TYPE": "id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT",
    "ENUM_NSYS_EVENT_CLASS": "id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT",
    "ENUM_CUDA_MEMCPY_OPER": "id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT",
    "ENUM_CUDA_MEM_KIND": "id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT",
    "ENUM_CUDA_KERNEL_LAUNCH_TYPE": "id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT",
    "LLMKERN_KERNELS": "start INTEGER NOT NULL, end INTEGER NOT NULL, correlationId INTEGER, pass TEXT, phase TEXT, "
    "token INTEGER, kind TEXT, op TEXT, module TEXT, layer INTEGER, energyJ REAL",
    "LLMKERN_GAPS": "start INTEGER NOT NULL, end INTEGER NOT NULL, pass TEXT, phase TEXT, token INTEGER, cause TEXT, "
    "op TEXT, module TEXT, energyJ REAL",
}
_WAYS = {"H": "Host", "D": "Device", "A": "Array", "P": "Peer"}
_ENUMS: dict[str, dict[int, tuple[str, str]]] = {
    "ENUM_NSYS_EVENT_TYPE": {
        CATEGORY: ("NvtxCategory",) * 2,
        34: ("NvtxMark",) * 2,
        _PUSH_POP: ("NvtxPushPopRange",) * 2,
        _START_END: ("NvtxStartEndRange",) * 2,
        DOMAIN_NAME: ("NvtxDomainCreate",) * 2,
    },
    "ENUM_NSYS_EVENT_CLASS": {
        0: ("TRACE_PROCESS_EVENT_CUDA_RUNTIME", "CUDA runtime"),
        1: ("TRACE_PROCESS_EVENT_CUDA_DRIVER", "CUDA driver"),
    },
    "ENUM_CUDA_MEMCPY_OPER": {0: ("CUDA_MEMCPY_KIND_UNKNOWN", "Unknown")}
    | {n: (f"CUDA_MEMCPY_KIND_{w.upper()}", f"{_WAYS[w[0]]}-to-{_WAYS[w[-1]]}") for n, w in COPIES.items()}
    | {
        n: (f"CUDA_MEMCPY_KIND_UVM_{w[4:].upper()}", f"Unified {_WAYS[w[4]]}-to-{_WAYS[w[7]]}")
        for n, w in UNIFIED.items()
    },
    "ENUM_CUDA_MEM_KIND": {
        number: (f"CUDA_MEMOPR_MEMORY_KIND_{name.upper()}", name.capitalize()) for number, name in MEMORIES.items()
    },
    "ENUM_CUDA_KERNEL_LAUNCH_TYPE": {1: ("CUDA_KERNEL_LAUNCH_TYPE_REGULAR", "Regular")},
}


def write_nsys(overlay: Overlay, path: Path) -> Path:
    """Write *overlay* to the new SQLite file *path* and return it; raises RecordingError where that fails."""
    path.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(path)) as connection:
            # A file that is cut off is written again; it needs no journal.
            connection.execute("PRAGMA journal_mode=OFF")
            connection.execute("PRAGMA synchronous=OFF")
            with connection:
                _Export(connection, overlay).write()
    except sqlite3.Error as error:
        path.unlink(missing_ok=True)
        raise RecordingError(f"writing {path} failed ({error}): free some space or choose another file.") from error
    return path


def is_export(file: Path) -> bool:
    """Whether *file* is an SQLite file that :func:`write_nsys` wrote."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as connection:
            query = "SELECT count(*) FROM sqlite_master WHERE name = 'LLMKERN_KERNELS'"
            return bool(connection.execute(query).fetchone()[0])
    except sqlite3.Error:
        return False


class _Export:
    """Fills one file; names become numbers in StringIds once."""

    def __init__(self, connection: sqlite3.Connection, overlay: Overlay) -> None:
        self._connection = connection
        self._overlay = overlay
        self._begin_ns = overlay.start_ns
        self._process = _VM | overlay.process << 24
        self._strings: dict[str, int] = {}

    def write(self) -> None:
        for name, columns in _TABLES.items():
            self._connection.execute(f"CREATE TABLE {name} ({columns})")
        for name, values in _ENUMS.items():
            self._insert(name, ((number, *texts) for number, texts in values.items()))
        self._about()
        self._kernels()
        self._calls()
        self._overheads()
        self._ranges()
        self._metrics()
        self._own()
        self._insert("StringIds", ((number, text) for text, number in self._strings.items()))

    def _insert(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        count = _TABLES[table].count(",") + 1
        self._connection.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * count)})", rows)

    def _put(self, table: str, **columns: Any) -> None:
        """Insert rows given by column (arrays, or one value for all); columns that are not given are NULL."""
        rows = max(len(v) for v in columns.values() if hasattr(v, "__len__") and not isinstance(v, str))
        named = list(columns)
        values = [v.tolist() if hasattr(v, "tolist") else v for v in columns.values()]
        lists = [v if isinstance(v, list) else [v] * rows for v in values]
        marks = ",".join("?" * len(named))
        self._connection.executemany(
            f"INSERT INTO {table} ({', '.join(named)}) VALUES ({marks})", zip(*lists, strict=True)
        )

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings) + 1)

    def _ids(self, values: pd.Series, named: Any = str) -> np.ndarray:
        codes, distinct = pd.factorize(values.astype(object))
        return np.array([self._string(named(str(text))) for text in distinct], np.int64)[codes]

    def _at(self, times_ns: pd.Series) -> np.ndarray:
        return times_ns.to_numpy(np.int64) - self._begin_ns

    def _about(self) -> None:
        overlay, device = self._overlay, self._overlay.device
        version = ".".join(map(str, SCHEMA))
        about = {
            "EXPORT_PRODUCT_NAME": "llmkern",
            "EXPORT_PRODUCT_VERSION": __version__,
            "EXPORT_SCHEMA_VERSION": version,
            **{
                f"EXPORT_SCHEMA_VERSION_{part}": str(n)
                for part, n in zip(("MAJOR", "MINOR", "MICRO"), SCHEMA, strict=True)
            },
        }
        self._insert("META_DATA_EXPORT", about.items())
        begun = pd.Timestamp(self._begin_ns, unit="ns", tz="UTC").strftime("%Y-%m-%dT%H:%M:%S")
        self._insert("TARGET_INFO_SESSION_START_TIME", [(self._begin_ns, begun, begun)])
        stop_ns = overlay.end_ns - self._begin_ns
        self._insert("ANALYSIS_DETAILS", [(_VM, stop_ns, 0, stop_ns)])
        index = int(device.get("index", 0))
        capability = str(device.get("compute_capability", "0.0")).split(".")
        self._put(
            "TARGET_INFO_GPU",
            vmId=[_VM],
            id=index,
            name=str(device["name"]),
            isDiscrete=1,
            l2CacheSize=device.get("l2_bytes"),
            totalMemory=device.get("memory_bytes"),
            memoryBandwidth=int(device.get("memory_bytes_per_s") or 0),
            clockRate=int(device.get("sm_clock_max_mhz") or 0) * 1_000_000,
            smCount=device.get("multiprocessors"),
            uuid=str(device.get("uuid", "")),
            cuDevice=index,
            computeMajor=int(capability[0]),
            computeMinor=int(capability[1]),
        )
        self._insert("TARGET_INFO_CUDA_DEVICE", [(index, index, overlay.process)])
        self._insert("PROCESSES", [(self._process, overlay.process, overlay.title)])

    def _kernels(self) -> None:
        every = self._overlay.kernels
        for kind, own in every.groupby(every["kind"].astype(str)):
            common = {
                "start": self._at(own["start_ns"]),
                "end": self._at(own["end_ns"]),
                "deviceId": own["device"],
                "contextId": own["context"],
                "greenContextId": 0,
                "streamId": own["stream"],
                "correlationId": own["correlation_id"],
                "globalPid": self._process,
                # nsys writes NULL for what no graph launched.
                "graphNodeId": [int(node) or None for node in own["graph_node_id"]],
            }
            if kind == "memcpy":
                named = own["name"].astype(object).map({n: _COPY.match(str(n)) for n in own["name"].unique()})
                ways, kinds = {v: k for k, v in (COPIES | UNIFIED).items()}, {v: k for k, v in MEMORIES.items()}
                way = [m[1] if m else "" for m in named]
                host = [kinds.get(m[2], 7) if m else 7 for m in named]
                self._put(
                    "CUPTI_ACTIVITY_KIND_MEMCPY",
                    **common,
                    bytes=own["copied_bytes"],
                    copyKind=[ways.get(w, 0) for w in way],
                    srcKind=[h if w[:1] == "H" else 2 for w, h in zip(way, host, strict=True)],
                    dstKind=[h if w[-1:] == "H" else 2 for w, h in zip(way, host, strict=True)],
                )
            elif kind == "memset":
                self._put("CUPTI_ACTIVITY_KIND_MEMSET", **common, value=0, bytes=own["copied_bytes"], memKind=2)
            else:
                names = self._ids(own["name"])
                self._put(
                    "CUPTI_ACTIVITY_KIND_KERNEL",
                    **common,
                    demangledName=names,
                    shortName=self._ids(own["name"], _plain),
                    mangledName=names,
                    launchType=1,
                    cacheConfig=0,
                    registersPerThread=own["registers"],
                    **{f"{part}{axis}": own[f"{part}_{axis.lower()}"] for part in ("grid", "block") for axis in "XYZ"},
                    staticSharedMemory=0,
                    dynamicSharedMemory=own["shared_bytes"],
                    localMemoryPerThread=0,
                    localMemoryTotal=0,
                    gridId=np.arange(1, len(own) + 1),
                    graphId=own["graph_id"],
                )

    def _calls(self) -> None:
        own = self._overlay.launches
        if own.empty:
            return
        api = own["api"].astype(str)
        self._put(
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            start=self._at(own["start_ns"]),
            end=self._at(own["end_ns"]),
            eventClass=(~api.str.startswith("cuda")).astype(int),
            globalTid=own["thread"].to_numpy(np.int64) | self._process,
            correlationId=own["correlation_id"],
            nameId=self._ids(api),
            returnValue=0,
        )

    def _overheads(self) -> None:
        own = self._overlay.overheads
        if len(own):
            self._put(
                "CUPTI_ACTIVITY_KIND_OVERHEAD",
                start=self._at(own["start_ns"]),
                end=self._at(own["end_ns"]),
                eventClass=0,
                globalTid=(own["thread"].fillna(0).to_numpy(np.int64) & 0xFFFFFF) | self._process,
                nameId=self._ids(own["kind"]),
                overheadType=0,
            )

    def _ranges(self) -> None:
        overlay = self._overlay
        self._put("NVTX_EVENTS", start=[0], eventType=DOMAIN_NAME, text=DOMAIN, domainId=_DOMAIN_ID)
        own = overlay.ranges.sort_values("start_ns", kind="stable")
        names, categories = pd.factorize(own["category"].astype(object))
        gap = len(categories) + 1
        for number, name in [*enumerate(categories, 1), (gap, "gap")]:
            self._put(
                "NVTX_EVENTS", start=[0], eventType=CATEGORY, category=number, text=str(name), domainId=_DOMAIN_ID
            )
        facts = own[["phase", "token", "round", "repeat", "new_tokens"]].astype(object)
        told = [
            json.dumps({k: _json(v) for k, v in row.items() if v is not None and v == v})
            for row in facts.to_dict("records")
        ]
        self._put(
            "NVTX_EVENTS",
            start=self._at(own["start_ns"]),
            end=self._at(own["end_ns"]),
            eventType=_PUSH_POP,
            category=[int(code) + 1 if code >= 0 else None for code in names],
            text=own["name"].astype(str),
            globalTid=own["thread"].fillna(0).to_numpy(np.int64) | self._process,
            domainId=_DOMAIN_ID,
            jsonText=told,
        )
        gaps = overlay.gaps
        if len(gaps):
            self._put(
                "NVTX_EVENTS",
                start=self._at(gaps["start_ns"]),
                end=self._at(gaps["end_ns"]),
                eventType=_START_END,
                rangeId=np.arange(1, len(gaps) + 1),
                category=gap,
                text=[f"gap: {cause}" for cause in gaps["cause"]],
                globalTid=self._process | GAP_THREAD,
                domainId=_DOMAIN_ID,
                doubleValue=[_known(value) for value in gaps["energy_j"]],
            )
        self._insert("ThreadNames", [(self._string("llmkern: idle gaps"), 0, self._process | GAP_THREAD)])

    def _metrics(self) -> None:
        """Write counters as GPU metrics: whole numbers, so that watts and joules become thousandths."""
        for number, counter in enumerate(self._overlay.counters):
            name = f"{counter.name} [m{counter.unit}]"
            self._insert("TARGET_INFO_GPU_METRICS", [(1, 1, "llmkern", number, name)])
            times = counter.timestamp_ns - self._begin_ns
            self._put(
                "GPU_METRICS",
                rawTimestamp=times,
                timestamp=times,
                typeId=1,
                metricId=number,
                value=np.round(counter.value * 1e3).astype(np.int64),
            )

    def _own(self) -> None:
        kernels, gaps = self._overlay.kernels, self._overlay.gaps
        shared = {"phase": "phase", "op": "op", "module": "module", "pass": "pass"}
        for table, rows, more in (
            ("LLMKERN_KERNELS", kernels, {"kind": "what", "correlationId": "correlation_id"}),
            ("LLMKERN_GAPS", gaps, {"cause": "cause"}),
        ):
            if rows.empty:
                continue
            texts = {new: [_known(v) for v in rows[old].astype(object)] for new, old in {**shared, **more}.items()}
            numbers: dict[str, Any] = {"token": [None if t != t or t < 0 else int(t) for t in rows["token"]]}
            if "layer" in rows:
                numbers["layer"] = [None if v != v else int(v) for v in rows["layer"]]
            self._put(
                table,
                start=self._at(rows["start_ns"]),
                end=self._at(rows["end_ns"]),
                energyJ=[_known(value) for value in rows["energy_j"]],
                **texts,
                **numbers,
            )


def _plain(name: str) -> str:
    """Return the name without its arguments' types, which is what nsys calls short."""
    return short_name(name).partition("<")[0]


def _known(value: Any) -> Any:
    return None if value is None or value != value else value


def _json(value: Any) -> Any:
    return int(value) if isinstance(value, float | np.integer) else value
