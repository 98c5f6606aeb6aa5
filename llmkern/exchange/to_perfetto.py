"""Gzipped Chrome JSON for Perfetto: kernels per stream, gaps by cause, ranges, host calls, flows, power and joules."""

from __future__ import annotations

import gzip
import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.time.timeline import find
from llmkern.exchange.overlay import Overlay
from llmkern.text import short_name

# Perfetto colours a slice by its name, so that each cause has a colour of its own; chrome://tracing takes these.
_COLOURS = {
    "launch_bound": "terrible",
    "sync_stall": "bad",
    "dependency": "yellow",
    "token_boundary": "olive",
    "launch_latency": "grey",
    "profiler": "black",
}
# The devices' process ids in the file; no process of a system has such a number.
_GPU, _GAPS = 1_000_000, 0
_LEVEL = 8
# Batches that wait to be compressed, at most.
_QUEUED = 16


def write_perfetto(overlay: Overlay, path: Path) -> Path:
    """Write *overlay* to *path* (.json.gz) and return it; times are µs since baseTimeNanoseconds, the first event."""
    base_ns = overlay.start_ns
    with gzip.open(path, "wb", compresslevel=_LEVEL) as file, _Compressing(file) as beside:
        head = {
            "displayTimeUnit": "ns",
            "baseTimeNanoseconds": base_ns,
            "otherData": {"written_by": "llmkern", "title": overlay.title},
        }
        beside.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
        _Events(beside, overlay, base_ns).write()
        beside.write("\n]}\n")
    return path


def is_trace(file: Path) -> bool:
    """Whether *file* is a trace that :func:`write_perfetto` wrote."""
    try:
        with gzip.open(file, "rb") as content:
            return b'"llmkern' in content.read(4096)
    except (OSError, EOFError):
        return False


class _Compressing:
    """Compresses on a thread of its own, which takes as long as making the events does; errors come at the end."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file
        self._texts: queue.Queue[str | None] = queue.Queue(_QUEUED)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._loop, name="llmkern-gzip")

    def __enter__(self) -> _Compressing:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._texts.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def write(self, text: str) -> None:
        self._texts.put(text)

    def _loop(self) -> None:
        while (text := self._texts.get()) is not None:
            if self._error is None:
                try:
                    self._file.write(text.encode())
                except Exception as error:
                    # The rest is taken and dropped, so that the writer is not left waiting.
                    self._error = error


class _Events:
    """Writes one event after the other; a million of them are not held at once."""

    def __init__(self, file: _Compressing, overlay: Overlay, base_ns: int) -> None:
        self._file = file
        self._overlay = overlay
        self._base_ns = base_ns
        self._gpu = _GPU + int(overlay.device.get("index", 0))
        self._first = True

    def write(self) -> None:
        for part in (self._names, self._kernels, self._gaps, self._ranges, self._calls, self._counters):
            self._put(part())

    def _put(self, events: Iterator[str]) -> None:
        batch: list[str] = []
        for event in events:
            batch.append(event)
            if len(batch) == 10_000:
                self._flush(batch)
        self._flush(batch)

    def _flush(self, batch: list[str]) -> None:
        if batch:
            self._file.write(("" if self._first else ",\n") + ",\n".join(batch))
            self._first = False
            batch.clear()

    def _names(self) -> Iterator[str]:
        overlay = self._overlay
        yield _name("process_name", self._gpu, 0, f"GPU {overlay.device.get('index', 0)}: {overlay.device['name']}")
        yield _name("thread_name", self._gpu, _GAPS, "idle gaps by cause")
        for stream in sorted(overlay.kernels["stream"].dropna().unique()):
            yield _name("thread_name", self._gpu, int(stream) + 1, f"stream {int(stream)}")
        yield _name("process_name", overlay.process, 0, f"{overlay.title}: host")
        threads = pd.concat([overlay.launches["thread"], overlay.ranges["thread"]]).dropna().unique()
        for thread in threads:
            yield _name("thread_name", overlay.process, int(thread), f"thread {int(thread)}")

    def _kernels(self) -> Iterator[str]:
        """Yield kernels, each with the arrow from the host call that launched it (of a graph: its first kernel)."""
        rows, process = self._overlay.kernels, self._overlay.process
        start, length = self._times(rows)
        # Whole C++ names would be most of the file; --to nsys has them.
        named = _quoted(rows["name"].astype(object), short_name)
        told = _quoted_facts(rows, ("what", "op", "module"))
        launch = self._launch_of(rows["correlation_id"])
        calls = self._overlay.launches
        issued, thread = self._times(calls)[0], calls["thread"].to_list()
        values = (start, length, named, rows["stream"], told, rows["energy_j"] * 1e3, rows["token"], launch)
        for number, (ts, dur, name, stream, facts, joule, token, call) in enumerate(zip(*values, strict=True)):
            energy = f',"mJ":{joule:.3g}' if joule == joule else ""
            step = f',"token":{token:.0f}' if token >= 0 else ""
            tid = int(stream) + 1
            yield (
                f'{{"ph":"X","cat":"kernel","pid":{self._gpu},"tid":{tid},"ts":{ts},"dur":{dur},'
                f'"name":{name},"args":{{{facts}{energy}{step}}}}}'
            )
            if call >= 0:
                # Beside its kernel the same digits cost nothing once they are compressed.
                link = f'"cat":"launch","name":"launch","id":{number}'
                yield f'{{"ph":"f","bp":"e",{link},"pid":{self._gpu},"tid":{tid},"ts":{ts}}}'
                yield f'{{"ph":"s",{link},"pid":{process},"tid":{thread[call]},"ts":{issued[call]}}}'

    def _launch_of(self, correlation: pd.Series) -> list[int]:
        """Return the row of the launch that issued each kernel, -1 where none is known or it issued one before."""
        known = find(self._overlay.launches["correlation_id"].to_numpy(), correlation.to_numpy())
        return np.where(correlation.duplicated(), -1, known).tolist()

    def _gaps(self) -> Iterator[str]:
        """Yield idle gaps; what the host was at in one, the kernel that ends it says."""
        rows = self._overlay.gaps
        start, length = self._times(rows)
        for ts, dur, cause, joule in zip(start, length, rows["cause"], rows["energy_j"] * 1e3, strict=True):
            energy = f'"mJ":{joule:.3g}' if joule == joule else ""
            yield (
                f'{{"ph":"X","cat":"gap","pid":{self._gpu},"tid":{_GAPS},"ts":{ts},"dur":{dur},"name":"{cause}",'
                f'"cname":"{_COLOURS.get(str(cause), "grey")}","args":{{{energy}}}}}'
            )

    def _ranges(self) -> Iterator[str]:
        rows = self._overlay.ranges
        start, length = self._times(rows)
        named = _quoted(rows["name"].astype(object))
        categories = _quoted(rows["category"].astype(object).fillna("range"))
        for ts, dur, name, category, thread in zip(start, length, named, categories, rows["thread"], strict=True):
            yield (
                f'{{"ph":"X","cat":{category},"pid":{self._overlay.process},"tid":{int(thread)},"ts":{ts},"dur":{dur},'
                f'"name":{name}}}'
            )

    def _calls(self) -> Iterator[str]:
        rows = self._overlay.launches
        start, length = self._times(rows)
        named = _quoted(rows["api"].astype(object))
        process = self._overlay.process
        for ts, dur, name, thread in zip(start, length, named, rows["thread"], strict=True):
            yield f'{{"ph":"X","cat":"call","pid":{process},"tid":{int(thread)},"ts":{ts},"dur":{dur},"name":{name}}}'

    def _counters(self) -> Iterator[str]:
        for counter in self._overlay.counters:
            name = json.dumps(f"{counter.name} ({counter.unit})")
            for ts, value in zip(_micro(counter.timestamp_ns - self._base_ns), counter.value, strict=True):
                yield f'{{"ph":"C","pid":{self._gpu},"ts":{ts},"name":{name},"args":{{"{counter.unit}":{value:.6g}}}}}'

    def _times(self, rows: pd.DataFrame) -> tuple[list[str], list[str]]:
        start = rows["start_ns"].to_numpy(np.int64)
        return _micro(start - self._base_ns), _micro(rows["end_ns"].to_numpy(np.int64) - start)


def _micro(nanoseconds: np.ndarray) -> list[str]:
    """Return *nanoseconds* as µs with three decimals: the format's unit, without losing one."""
    return [f"{value // 1000}.{value % 1000:03d}" for value in nanoseconds.tolist()]


def _name(what: str, process: int, thread: int, name: str) -> str:
    event = {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
    return json.dumps(event)


def _quoted(values: pd.Series, named: Callable[[str], str] = str) -> list[str]:
    """Return *values*, as *named* has them, as JSON strings; each distinct one is made once."""
    codes, distinct = pd.factorize(values.astype(str))
    texts = [json.dumps(named(str(text))) for text in distinct]
    return [texts[code] for code in codes]


def _quoted_facts(rows: pd.DataFrame, columns: tuple[str, ...]) -> list[str]:
    """Return *columns* of each row as members of a JSON object, those that are not known left out."""
    parts = [pd.factorize(rows[column].astype(object).fillna("")) for column in columns]
    code = np.zeros(len(rows), np.int64)
    for codes, distinct in parts:
        code = code * (len(distinct) + 1) + codes
    key, first = np.unique(code, return_index=True)
    texts = []
    for at in first:
        known: dict[str, Any] = {c: rows[c].iloc[at] for c in columns}
        texts.append(json.dumps({k: str(v) for k, v in known.items() if v == v and v}, separators=(",", ":"))[1:-1])
    return [texts[i] for i in np.searchsorted(key, code)]
