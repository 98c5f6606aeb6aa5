"""What goes out comes back: the same joules per kernel, times to the nanosecond, in the formats as documented."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from llmkern.attribute.attribution import attribute
from llmkern.errors import RecordingError, UsageError
from llmkern.exchange.exporting import Request, export_run, parse_tokens
from llmkern.exchange.importing import import_capture
from llmkern.exchange.overlay import Overlay, cut, overlay
from llmkern.runfolder import RunFolder
from tests.recorded import DATA, recorded, recorded_run
from tests.test_cli import assert_sentence, llmkern

REAL = DATA / "nsys-export-2025.3.sqlite"


@pytest.fixture(scope="module")
def int8() -> Overlay:
    return overlay(recorded("int8"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(recorded_run("int8").path, "nsys", tmp_path_factory.mktemp("out") / "int8.sqlite")


def test_kernels_in_pass_time_add_up_to_the_account(int8: Overlay) -> None:
    found = recorded("int8")
    own = int8.kernels[int8.kernels["pass"] == "time"]
    for phase, account in found.accounts.items():
        assert account.kernel_j is not None
        spent = own.loc[own["phase"] == phase, "energy_j"].sum() / found.timeline.units(phase)
        assert spent == pytest.approx(account.kernel_j.value, rel=1e-6)


def test_every_recorded_kernel_and_gap_is_there(int8: Overlay) -> None:
    found, run = recorded("int8"), recorded_run("int8")
    for name in ("calls", "time"):
        rows = run.table("kernels", where={"pass": name})
        assert (int8.kernels["pass"] == name).sum() == len(rows)
    gaps = int8.gaps[int8.gaps["pass"] == "calls"]
    assert found.host_trace is not None
    pd.testing.assert_series_equal(
        gaps["cause"].value_counts(), found.host_trace.caused["cause"].astype(str).value_counts(), check_names=False
    )
    floor_w = found.accounts["decode"].floor_w
    assert floor_w is not None
    decode = gaps[gaps["phase"] == "decode"]
    seconds = (decode["end_ns"] - decode["start_ns"]).sum() / 1e9
    assert decode["energy_j"].sum() == pytest.approx(floor_w.value * seconds)


def test_joules_per_kernel_survive_the_way_through_nsys(exported: Path, tmp_path: Path) -> None:
    before = recorded("int8")
    run = import_capture(exported, tmp_path / "run", energy=recorded_run("int8").path)
    after = attribute(run)
    for phase in before.accounts:
        one, two = (found.split(phase, ["kind", "op", "module", "name"]) for found in (before, after))
        for frame in (one, two):
            frame["name"] = frame["name"].astype(str)
        pd.testing.assert_frame_equal(one, two, check_dtype=False, check_categorical=False)
        one, two = (found.split_gaps(phase, ["cause", "op"]) for found in (before, after))
        pd.testing.assert_frame_equal(one, two, check_dtype=False, check_categorical=False)
    for name in ("kernels", "launches", "overheads"):
        old, new = (r.table(name) for r in (recorded_run("int8"), run))
        assert len(old) == len(new)
        assert (old["end_ns"] - old["start_ns"]).sum() == (new["end_ns"] - new["start_ns"]).sum()


def rows_of(path: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def columns_of(path: Path, table: str) -> dict[str, str]:
    return {row[1]: row[2] for row in rows_of(path, f"PRAGMA table_info({table})")}


@pytest.mark.parametrize(
    "table",
    [
        *("StringIds", "META_DATA_EXPORT", "TARGET_INFO_SESSION_START_TIME", "ANALYSIS_DETAILS", "NVTX_EVENTS"),
        *("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME", "TARGET_INFO_CUDA_DEVICE"),
        *("ENUM_NSYS_EVENT_TYPE", "ENUM_NSYS_EVENT_CLASS", "ENUM_CUDA_MEMCPY_OPER", "ENUM_CUDA_MEM_KIND"),
    ],
)
def test_tables_have_the_columns_of_a_real_export(exported: Path, table: str) -> None:
    ours, real = columns_of(exported, table), columns_of(REAL, table)
    assert real.items() <= ours.items()


def test_enumerations_say_what_a_real_export_says(exported: Path) -> None:
    for table in ("ENUM_CUDA_MEMCPY_OPER", "ENUM_NSYS_EVENT_TYPE", "ENUM_NSYS_EVENT_CLASS", "ENUM_CUDA_MEM_KIND"):
        real = set(rows_of(REAL, f"SELECT id, label FROM {table}"))
        assert set(rows_of(exported, f"SELECT id, label FROM {table}")) <= real


def test_kernels_and_calls_belong_to_one_process(exported: Path) -> None:
    joined = rows_of(
        exported,
        "SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN CUPTI_ACTIVITY_KIND_RUNTIME r "
        "ON k.correlationId = r.correlationId AND k.globalPid = (r.globalTid & ~0xFFFFFF)",
    )
    kernels = recorded_run("int8").table("kernels", where={"pass": "calls"})
    assert joined == [(int((kernels["kind"] == "kernel").sum()),)]


def test_queries_find_the_joules(exported: Path, int8: Overlay) -> None:
    ((joule,),) = rows_of(exported, "SELECT sum(energyJ) FROM LLMKERN_KERNELS")
    assert joule == pytest.approx(int8.kernels["energy_j"].sum())
    ranges = "SELECT sum(doubleValue) FROM NVTX_EVENTS WHERE text LIKE 'gap: %'"
    ((joule,),) = rows_of(exported, ranges)
    assert joule == pytest.approx(int8.gaps["energy_j"].sum())


def perfetto(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


def test_perfetto_is_given_the_documented_format(tmp_path: Path, int8: Overlay) -> None:
    """Trace Event Format: X has ts and dur, C has numbers, each s is met by an f of its id, M names what is used."""
    path = export_run(recorded_run("int8").path, "perfetto", tmp_path / "int8.json.gz")
    document = perfetto(path)
    assert document["baseTimeNanoseconds"] == int8.start_ns
    events = document["traceEvents"]
    by_kind = pd.Series([e["ph"] for e in events]).value_counts()
    assert set(by_kind.index) == {"M", "X", "C", "s", "f"}
    used, named = set(), set()
    for event in events:
        if event["ph"] == "M":
            named.add((event["name"], event["pid"], event["tid"]))
            assert event["args"]["name"]
            continue
        assert event["ts"] >= 0
        assert event["name"]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            used.add((event["pid"], event["tid"]))
        if event["ph"] == "C":
            (value,) = event["args"].values()
            assert isinstance(value, int | float)
    assert {("thread_name", *key) for key in used} <= named
    assert {("process_name", pid, 0) for pid, _ in used} <= named
    starts, ends = ({e["id"]: e["ts"] for e in events if e["ph"] == kind} for kind in "sf")
    assert starts.keys() == ends.keys()
    assert len(starts) == by_kind["s"] == by_kind["f"]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    assert len(kernels) == len(int8.kernels)
    row = int8.kernels.iloc[5_000]
    event = kernels[5_000]
    assert round(event["ts"] * 1e3) + int8.start_ns == row["start_ns"]
    assert round(event["dur"] * 1e3) == row["end_ns"] - row["start_ns"]
    assert event["args"]["mJ"] == pytest.approx(row["energy_j"] * 1e3, rel=5e-3)
    assert event["args"]["op"] == row["op"]
    gaps = pd.Series([e["name"] for e in events if e.get("cat") == "gap"]).value_counts()
    assert gaps["sync_stall"] == (int8.gaps["cause"] == "sync_stall").sum()


def test_a_cut_holds_one_token_and_what_launched_it(int8: Overlay) -> None:
    step = cut(int8, "decode", (2, 2))
    assert set(step.kernels["token"]) == {2}
    assert 4_400 < (step.kernels["pass"] == "time").sum() < 4_700
    launched = step.kernels[step.kernels["pass"] == "calls"]["correlation_id"]
    assert set(launched) <= set(step.launches["correlation_id"])
    assert len(step.launches) < len(int8.launches) / 2
    assert "token 2" in set(step.ranges["name"])
    with pytest.raises(UsageError, match=r"no kernel belongs to phase decode and tokens 40:41: .* up to 2"):
        cut(int8, "decode", (40, 41))


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_tables_are_written_whole(tmp_path: Path, int8: Overlay, kind: str) -> None:
    folder = export_run(recorded_run("int8").path, kind, tmp_path / "tables")
    read = pd.read_parquet if kind == "parquet" else pd.read_csv
    for name in ("kernels", "gaps", "launches", "ranges"):
        assert len(read(folder / f"{name}.{kind}")) == len(getattr(int8, name))
    assert set(read(folder / f"counters.{kind}")["counter"]) == {c.name for c in int8.counters}


@pytest.mark.parametrize(("text", "meant"), [("5:6", (5, 6)), ("5", (5, 5)), (":3", (1, 3)), ("4:", (4, 10**9))])
def test_tokens_are_read(text: str, meant: tuple[int, int]) -> None:
    assert parse_tokens(text) == meant


@pytest.mark.parametrize("text", ["b:c", "6:5", "-1:2"])
def test_tokens_that_are_none_are_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="is not A:B"):
        parse_tokens(text)


def test_the_command_writes_beside_the_run_and_overwrites_nothing(tmp_path: Path) -> None:
    run = tmp_path / "int4"
    import_capture(REAL, run)
    done = llmkern("export", str(run), "--to", "perfetto")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "int4-perfetto.json.gz").exists()
    # Without energy there are times, and no joules.
    events = perfetto(tmp_path / "int4-perfetto.json.gz")["traceEvents"]
    assert not any("mJ" in e.get("args", {}) for e in events)
    assert_sentence(llmkern("export", str(run), "--to", "perfetto"), "is not overwritten", "--force")
    assert_sentence(llmkern("export", str(run), "--to", "nsys", "--pass", "calls"), "nothing was traced")
    assert_sentence(llmkern("export", str(tmp_path / "none"), "--to", "nsys"), "is not a run folder")


def test_a_full_disk_is_a_sentence_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export_run(recorded_run("int4").path, "perfetto", tmp_path / "a.json.gz")
    before = out.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RecordingError, match=r"a\.json\.gz cannot be written \(No space left on device\)"):
        export_run(recorded_run("int4").path, "perfetto", out, force=True)
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json.gz"]


@pytest.mark.parametrize("to", ["nsys", "perfetto", "parquet", "csv"])
def test_nothing_is_written_over_an_input_or_over_what_is_not_ours(tmp_path: Path, to: str) -> None:
    """L1: export RUN --to parquet --out RUN --force overwrote the run's own tables."""
    run = tmp_path / "run"
    shutil.copytree(recorded_run("int4").path, run)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    for out in (run, run / "inside"):
        with pytest.raises(UsageError, match=r"(is|lies inside) the input"):
            export_run(run, to, out, force=True)
    with pytest.raises(UsageError, match="holds the input"):
        export_run(run, to, tmp_path, force=True)
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    if to in ("parquet", "csv"):
        precious.unlink()
        precious.mkdir()
        (precious / "kernels.parquet").write_text("an export")
        (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"not written by llmkern|no export of llmkern"):
        export_run(run, to, precious, force=True)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    export_run(run, to, tmp_path / "twice")
    export_run(run, to, tmp_path / "twice", force=True)
    with pytest.raises(UsageError, match="is a device"):
        export_run(run, "perfetto", Path("/dev/full"), force=True)


def test_an_interrupted_run_is_exported_as_far_as_it_goes(tmp_path: Path) -> None:
    found = RunFolder(DATA / "h100-gap-sleeping-host")
    path = export_run(found.path, "nsys", tmp_path / "gap.sqlite", Request(passes=("calls",)))
    assert rows_of(path, "SELECT count(*) FROM LLMKERN_GAPS WHERE cause = 'launch_bound'")[0][0] > 80
