"""Captures of other tools become run folders: nsys's own figures to the nanosecond, a sentence for everything torn."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkern.attribute.attribution import attribute
from llmkern.attribute.time.timeline import read_timeline
from llmkern.errors import LlmkernError, UsageError
from llmkern.exchange.importing import import_capture
from llmkern.runfolder import RunFolder
from tests.recorded import DATA, recorded_run
from tests.test_cli import assert_sentence, llmkern

NSYS = DATA / "nsys-export-2025.3.sqlite"
GEMM = "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize128x64x8_stage3_warpsize2x2x1_ffma_aligna4_alignc4_execute_kernel"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return import_capture(NSYS, tmp_path_factory.mktemp("nsys") / "run")


def test_kernels_are_what_nsys_says_of_them(imported: RunFolder) -> None:
    """cuda_gpu_kern_sum: 100 instances, 5,556,843 ns, average 55,568.4, from 55,361 to 56,865; one more of 5,280."""
    kernels = imported.table("kernels")
    length = kernels["end_ns"] - kernels["start_ns"]
    own = length[kernels["name"].astype(str).str.startswith(GEMM)]
    assert (len(own), own.sum(), own.min(), own.max()) == (100, 5_556_843, 55_361, 56_865)
    assert own.mean() == pytest.approx(55_568.4, abs=0.05)
    assert length.drop(own.index).to_list() == [5_280]


def test_ranges_are_what_nsys_says_of_them(imported: RunFolder) -> None:
    """nvtx_gpu_proj_sum: 5 ranges of 220,041,278 ns, projected 5,911,763 ns, 100 operations of the GPU."""
    ranges = imported.table("ranges")
    assert (ranges["name"] == "decode").sum() == 5
    assert (ranges["end_ns"] - ranges["start_ns"]).sum() == 220_041_278
    timeline = read_timeline(imported, 0)
    assert len(timeline.kernels) == 100
    spans = timeline.kernels.groupby("instance").agg(start_ns=("start_ns", "min"), end_ns=("end_ns", "max"))
    assert (spans["end_ns"] - spans["start_ns"]).sum() == 5_911_763
    assert len(imported.table("launches")) == 1_088


def test_what_the_file_says_of_its_machine_is_kept_and_nothing_else(imported: RunFolder) -> None:
    device = imported.facts.device
    assert (device.name, device.multiprocessors) == ("NVIDIA H100 80GB HBM3", 132)
    assert imported.facts.started == "2026-11-23T05:46:33+00:00"
    assert imported.facts.imported.schema == "3.20.3"
    # Absolute times: the session's start and the ns since.
    assert imported.table("ranges")["start_ns"].min() == 1795412793667253248 + 8_228_734_221


def test_without_energy_it_is_reported_in_time(tmp_path: Path) -> None:
    done = llmkern("import", str(NSYS), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    for words in ("an Nsight Systems export, schema 3.20.3", "decode, per range", "1.11 ms", "holds no energy"):
        assert words in done.stdout
    assert "recorder's effect" not in done.stdout
    assert attribute(RunFolder(tmp_path / "run")).accounts["decode"].launches == 20


def test_a_phase_may_be_any_range(tmp_path: Path) -> None:
    run = import_capture(NSYS, tmp_path / "run", phases=["decode=prefill"])
    assert set(attribute(run).accounts) == {"prefill"}
    with pytest.raises(UsageError, match=r"no range 'step' \(it has decode\)"):
        import_capture(NSYS, tmp_path / "other", phases=["step=decode"])


def edited(tmp_path: Path, *statements: str) -> Path:
    path = tmp_path / "edited.sqlite"
    shutil.copy(NSYS, path)
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    return path


def test_missing_tables_are_told_and_tolerated(tmp_path: Path) -> None:
    path = edited(
        tmp_path, "DROP TABLE NVTX_EVENTS", "DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME", "DROP TABLE TARGET_INFO_GPU"
    )
    run = import_capture(path, tmp_path / "run")
    assert len(run.facts.imported.missing) == 3
    (phase,) = attribute(run).accounts
    assert phase == "capture"
    assert attribute(run).accounts[phase].launches == 101


def test_tables_may_carry_a_version_and_lack_columns(tmp_path: Path) -> None:
    path = edited(
        tmp_path,
        "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL RENAME TO CUPTI_ACTIVITY_KIND_KERNEL_V2",
        "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL_V2 DROP COLUMN gridZ",
    )
    assert len(import_capture(path, tmp_path / "run").table("kernels")) == 101


def test_a_graph_traced_as_a_whole_is_one_kernel(tmp_path: Path) -> None:
    path = edited(
        tmp_path,
        "CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER, end INTEGER, deviceId INTEGER, contextId "
        "INTEGER, streamId INTEGER, correlationId INTEGER, globalPid INTEGER, graphId INTEGER, graphExecId INTEGER)",
        "INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE SELECT 8443000000, 8443100000, 0, 1, 7, 99, globalPid, 3, 4 "
        "FROM CUPTI_ACTIVITY_KIND_KERNEL LIMIT 1",
    )
    run = import_capture(path, tmp_path / "run")
    kernels = run.table("kernels")
    own = kernels[kernels["name"] == "CUDA graph 3"]
    assert (own["end_ns"] - own["start_ns"]).to_list() == [100_000]
    assert "inside CUDA graphs" in run.facts.imported.missing[0]


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "UPDATE META_DATA_EXPORT SET value = '4.1.0' WHERE name = 'EXPORT_SCHEMA_VERSION'",
            "schema 4.1.0, this llmkern reads 3.x: update llmkern",
        ),
        ("DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL", "holds no kernel, copy or graph launch"),
        ("DROP TABLE StringIds", "none of them StringIds"),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 'soon'", "cannot be read as an Nsight Systems export"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, statement: str, said: str) -> None:
    assert_sentence(llmkern("import", str(edited(tmp_path, statement)), "--out", str(tmp_path / "run")), said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.sqlite", b"", "is empty"),
        ("foreign.txt", b"hello", "neither an SQLite export"),
        ("report.nsys-rep", b"\x00\x01binary", "nsys export --type sqlite report.nsys-rep"),
        ("cut.sqlite", NSYS.read_bytes()[:5000], "cannot be read as an Nsight Systems export"),
        ("bad.json", b'{"traceEvents": [', "cannot be read as a trace of torch.profiler"),
        (
            "cut.json.gz",
            gzip.compress(b'{"traceEvents": []}', mtime=0)[:12],
            "cannot be read as a trace of torch.profiler",
        ),
        ("none.json", b'{"traceEvents": []}', "holds no kernel or copy"),
    ],
)
def test_a_file_that_is_none_is_a_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        import_capture(path, tmp_path / "run")
    assert said in str(raised.value)


def test_a_run_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    import_capture(NSYS, tmp_path / "run")
    with pytest.raises(UsageError, match="is not overwritten"):
        import_capture(NSYS, tmp_path / "run")


def test_joules_of_another_board_are_refused(tmp_path: Path) -> None:
    path = edited(tmp_path, "UPDATE TARGET_INFO_GPU SET name = 'NVIDIA L4'")
    with pytest.raises(UsageError, match="joules of one board say nothing of another"):
        import_capture(path, tmp_path / "run", energy=recorded_run("int8").path)


def torch_trace() -> dict[str, Any]:
    """A trace as torch.profiler writes it: a prefill and a decode of two kernels each, and a copy."""
    base_us = 5_000.0
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "python"}}]
    for phase, at in (("prefill", 0.0), ("decode", 100.0)):
        note = {"ph": "X", "cat": "user_annotation", "name": phase, "pid": 7, "tid": 8}
        events.append({**note, "ts": base_us + at, "dur": 90.0})
        for i in range(2):
            number = int(at) + i + 1
            issue = base_us + at + 10 + 30 * i
            call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel_v7000", "pid": 7, "tid": 8}
            events.append({**call, "ts": issue, "dur": 4.5, "args": {"correlation": number}})
            told = {
                "device": 0,
                "context": 1,
                "stream": 7,
                "correlation": number,
                "grid": [2, 3, 1],
                "block": [64, 1, 1],
            }
            kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": issue + 6.001}
            events.append({**kernel, "dur": 2.002, "args": {**told, "registers per thread": 32, "shared memory": 512}})
    copy = {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "pid": 0, "tid": 7}
    events.append({**copy, "ts": base_us + 80.0, "dur": 1.5, "args": {"device": 0, "stream": 7, "bytes": 8}})
    return {
        "schemaVersion": 1,
        "deviceProperties": [
            {"id": 0, "name": "NVIDIA H100 80GB HBM3", "computeMajor": 9, "computeMinor": 0, "numSms": 132}
        ],
        "baseTimeNanoseconds": 1_790_000_000_000_000_000,
        "traceEvents": events,
    }


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_of_torch_profiler_is_read_to_the_nanosecond(tmp_path: Path, name: str) -> None:
    data = json.dumps(torch_trace()).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    run = import_capture(path, tmp_path / "run")
    kernels = run.table("kernels").sort_values("start_ns")
    assert kernels["start_ns"].iloc[0] == 1_790_000_000_000_000_000 + 5_016_001
    assert (kernels["end_ns"] - kernels["start_ns"]).to_list() == [2002, 2002, 1500, 2002, 2002]
    assert kernels["name"].to_list()[2] == "memcpy DtoH (pageable)"
    assert kernels[["grid_y", "block_x", "registers", "shared_bytes"]].iloc[0].to_list() == [3, 64, 32, 512]
    assert set(run.table("launches")["api"]) == {"cudaLaunchKernel"}
    found = attribute(run)
    assert {phase: account.launches for phase, account in found.accounts.items()} == {"prefill": 3, "decode": 2}
    assert found.host_trace is not None
    # Nothing says which call began the copy.
    assert found.host_trace.caused["cause"].to_list() == ["launch_bound", "unknown", "launch_bound"]


def test_a_torn_file_never_shows_a_traceback(tmp_path: Path) -> None:
    """A hundred files each with bytes changed, or cut: read, or refused in a sentence, and nothing else."""
    rng = np.random.default_rng(5)
    whole = {"t.sqlite": NSYS.read_bytes(), "t.json": json.dumps(torch_trace()).encode()}
    whole["t.json.gz"] = gzip.compress(whole["t.json"], mtime=0)
    refused = 0
    for number in range(300):
        name = list(whole)[number % 3]
        data = bytearray(whole[name])
        if rng.random() < 0.3:
            data = data[: int(rng.integers(1, len(data)))]
        for at in rng.integers(0, len(data), int(rng.integers(1, 200))):
            data[at] = int(rng.integers(0, 256))
        path = tmp_path / name
        path.write_bytes(bytes(data))
        with suppress(LlmkernError):
            refused += 1
            import_capture(path, tmp_path / "run", force=True)
            refused -= 1
    # The test would show nothing if no file were torn enough, or every one.
    assert 30 < refused < 300
