"""Every capture against an independent reading, exact decimals and unions of intervals, and out and in again."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import pytest

from llmkern.attribute.attribution import attribute
from llmkern.exchange.exporting import export_run
from llmkern.exchange.importing import import_capture
from llmkern.runfolder import RunFolder
from tests.recorded import DATA

NSYS = DATA / "nsys-export-2025.3.sqlite"
# Of these records are left out, cut or refused: tests of their own say which.
_OTHERWISE = ("04", "19", "21", "23", "32")
CAPTURES = [
    *(p for p in sorted((DATA / "captures").glob("*/*")) if p.suffix in (".json", ".sqlite")),
    NSYS,
]
SOUND = [p for p in CAPTURES if not p.parent.name.startswith(_OTHERWISE)]
_IDS = [f"{p.parent.name[:2]}-{p.name}" for p in SOUND]
# These hold no kernel to begin with: another tool's JSON, and a name that is no JSON.
_WITH_KERNELS = [p for p in CAPTURES if p.name not in ("cap.json", "backslash.json")]


def _by_json(path: Path) -> list[tuple[int, int]]:
    trace = json.loads(path.read_text(), parse_float=Decimal)
    base_ns = int(trace.get("baseTimeNanoseconds") or 0)
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and str(event.get("cat")).lower() in ("kernel", "gpu_memcpy", "gpu_memset", "memcpy"):
            start = Decimal(event["ts"]) * 1000
            begin_ns = base_ns + round(start)
            found.append((begin_ns, begin_ns + round(event["dur"] * 1000)))
    return found


def _by_sql(path: Path) -> list[tuple[int, int]]:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        (base_ns,) = connection.execute("SELECT utcEpochNs FROM TARGET_INFO_SESSION_START_TIME").fetchone()
        found = []
        for kind in ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE"):
            table = f"CUPTI_ACTIVITY_KIND_{kind}"
            if table in tables:
                found += connection.execute(f"SELECT start + {base_ns}, end + {base_ns} FROM {table}").fetchall()
    return found


def _union_ns(spans: list[tuple[int, int]]) -> int:
    busy, until = 0, -1
    for start, end in sorted(spans):
        busy += max(0, end - max(start, until))
        until = max(until, end)
    return busy


def _spans(run: RunFolder) -> list[tuple[int, int]]:
    kernels = run.table("kernels")
    return list(zip(kernels["start_ns"].tolist(), kernels["end_ns"].tolist(), strict=True))


@pytest.mark.parametrize("path", SOUND, ids=_IDS)
def test_counts_and_busy_time_are_those_of_an_independent_reading(path: Path, tmp_path: Path) -> None:
    phases = ["generate"] if path.parent.name.startswith(("10", "15")) else []
    run = import_capture(path, tmp_path / "run", phases=phases)
    known = _by_json(path) if path.suffix == ".json" else _by_sql(path)
    assert sorted(_spans(run)) == sorted(known)
    assert _union_ns(_spans(run)) == _union_ns(known)
    timeline = attribute(run).timeline
    if timeline.phases["phase"].tolist() == ["capture"]:
        idle_ns = max(end for _, end in known) - min(start for start, _ in known) - _union_ns(known)
        assert timeline.phases[["kernels", "busy_ns", "gap_ns"]].to_numpy().tolist() == [
            [len(known), _union_ns(known), idle_ns]
        ]


@pytest.mark.parametrize("path", _WITH_KERNELS, ids=lambda p: f"{p.parent.name[:2]}-{p.name}")
def test_what_goes_out_comes_in_again(path: Path, tmp_path: Path) -> None:
    first = import_capture(path, tmp_path / "first")
    again = import_capture(export_run(first.path, "nsys", tmp_path / "out.sqlite"), tmp_path / "again")
    columns = ["start_ns", "end_ns", "name", "kind", "stream", "correlation_id"]
    one, two = (
        run.table("kernels")[columns].astype({"name": str, "kind": str}).sort_values(columns).reset_index(drop=True)
        for run in (first, again)
    )
    assert one.to_dict("list") == two.to_dict("list")
    assert len(first.table("launches")) == len(again.table("launches"))
