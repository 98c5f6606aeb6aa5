"""Several processes in one capture, and several files of one job: who drove what."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llmkern.attribute.attribution import attribute
from llmkern.errors import UsageError
from llmkern.exchange.exporting import Request, export_run
from llmkern.exchange.importing import import_capture
from llmkern.explain.devices import devices_table
from llmkern.runfolder import RunFolder
from tests import traces
from tests.recorded import DATA
from tests.test_cli import llmkern
from tests.traces import H100


def events(
    pid: int, device: int, count: int, begin_us: int, step_us: int = 100, long_us: int = 40
) -> list[dict[str, Any]]:
    """Return a decode range of *count* kernels of which the last is a collective; correlations from 1."""
    found: list[dict[str, Any]] = [
        {"ph": "X", "cat": "user_annotation", "name": "decode", "pid": pid, "tid": pid, "ts": begin_us - 20,
         "dur": count * step_us}
    ]  # fmt: skip
    for number in range(count):
        begin = begin_us + number * step_us
        name = (
            "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
            if number == count - 1
            else "gemm"
        )
        found += [
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": pid, "tid": pid, "ts": begin - 10,
             "dur": 5, "args": {"correlation": number + 1}},
            {"ph": "X", "cat": "kernel", "name": name, "pid": device, "tid": 7, "ts": begin, "dur": long_us,
             "args": {"device": device, "context": 1, "stream": 7, "correlation": number + 1, "grid": [1, 1, 1],
                      "block": [128, 1, 1]}},
        ]  # fmt: skip
    return found


def written(path: Path, found: list[dict[str, Any]], rank: int | None = None, **more: Any) -> Path:
    distributed = {} if rank is None else {"distributedInfo": {"backend": "nccl", "rank": rank, "world_size": 2}}
    return traces.written(path, found, **distributed, **more)


def test_files_of_ranks_are_devices_of_one_run(tmp_path: Path) -> None:
    """HTA and Kineto write a file for each rank; every rank counts its device 0 and its launches from 1."""
    files = [
        written(tmp_path / "b.json", events(11, 0, 6, 1_000), rank=1),
        written(tmp_path / "a.json", events(11, 0, 4, 1_500), rank=0),
    ]
    run = import_capture(files, tmp_path / "run")
    table = devices_table(attribute(run)).set_index("gpu")
    assert table["launches"].to_dict() == {0: 4, 1: 6}
    assert table["file"].to_dict() == {0: "a.json, rank 0", 1: "b.json, rank 1"}
    assert table["communication_s"].to_dict() == pytest.approx({0: 40e-6, 1: 40e-6})
    assert table["gap_s"].to_dict() == pytest.approx({0: 3 * 60e-6, 1: 5 * 60e-6})
    own = attribute(run.of_device(1))
    assert int(own.timeline.phases["kernels"].sum()) == 6
    # Each was launched by its own rank, 10 µs before it began.
    assert (own.timeline.kernels["start_ns"] - own.timeline.kernels["issued_ns"] == 10_000).all()


def test_the_command_takes_several_and_reports_each(tmp_path: Path) -> None:
    for rank in (0, 1):
        written(tmp_path / f"rank{rank}.json", events(11, 0, 4 + rank, 1_000), rank=rank)
    done = llmkern("import", tmp_path / "rank0.json", tmp_path / "rank1.json", "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "Devices, per unit" in done.stdout
    assert "rank1.json, rank 1" in done.stdout
    other = json.loads(llmkern("report", tmp_path / "run", "--gpu", "1", "--json").stdout)
    assert other["phases"][0]["launches"] == 5
    done = llmkern("report", tmp_path / "run", "--gpu", "7")
    assert done.returncode == 2
    assert "has no GPU 7: it has 0, 1" in done.stderr
    exported = export_run(tmp_path / "run", "nsys", tmp_path / "one.sqlite", Request(gpu=1))
    again = attribute(import_capture(exported, tmp_path / "again"))
    assert int(again.timeline.phases["kernels"].sum()) == 5


@pytest.mark.parametrize(
    ("ranks", "said"), [((0, 0), "are both of rank 0"), ((None, None), None)], ids=["twice", "no-rank"]
)
def test_ranks_decide_the_order_where_they_are_told(tmp_path: Path, ranks: tuple[Any, Any], said: str | None) -> None:
    files = [
        written(tmp_path / f"{n}.json", events(11, 0, 3, 1_000), rank) for n, rank in zip("xy", ranks, strict=True)
    ]
    if said is not None:
        with pytest.raises(UsageError, match=said):
            import_capture(files, tmp_path / "run")
        return
    run = import_capture(files, tmp_path / "run")
    assert devices_table(attribute(run))["file"].tolist() == ["x.json", "y.json"]


def test_a_file_twice_and_energy_of_one_board_are_refused(tmp_path: Path) -> None:
    one = written(tmp_path / "one.json", events(11, 0, 3, 1_000))
    with pytest.raises(UsageError, match="named twice"):
        import_capture([one, one], tmp_path / "run")
    other = written(tmp_path / "other.json", events(11, 0, 3, 1_000))
    with pytest.raises(UsageError, match="joules of one board"):
        import_capture([one, other], tmp_path / "run", energy=DATA / "h100-qwen-7b-int8")
    assert not (tmp_path / "run").exists()


def test_ranks_merged_into_one_trace_keep_their_own_launches(tmp_path: Path) -> None:
    """Tools that fuse traces keep pids and let correlations collide (TraceLens trace fusion, HTA, kineto#832)."""
    # Rank 1 is 3 ms later: by correlation alone its kernels would be rank 0's, launched long before.
    fused = [*events(11, 0, 5, 1_000), *events(12, 1, 8, 4_000)]
    run = import_capture(
        written(tmp_path / "fused.json", fused, deviceProperties=[H100, {**H100, "id": 1}]), tmp_path / "run"
    )
    for gpu, count in ((0, 5), (1, 8)):
        timeline = attribute(run.of_device(gpu)).timeline
        assert int(timeline.phases["kernels"].sum()) == count
        assert (timeline.kernels["start_ns"] - timeline.kernels["issued_ns"] == 10_000).all()


def test_two_processes_of_one_nsys_capture_are_two_devices(tmp_path: Path) -> None:
    """torchrun under nsys profile: a process for each GPU, every one of them counting correlations from 1."""
    single = import_capture(written(tmp_path / "one.json", events(11, 0, 5, 1_000)), tmp_path / "single")
    export = export_run(single.path, "nsys", tmp_path / "two.sqlite")
    with closing(sqlite3.connect(export)) as connection:
        for table, column in (
            ("CUPTI_ACTIVITY_KIND_KERNEL", "globalPid"),
            ("CUPTI_ACTIVITY_KIND_RUNTIME", "globalTid"),
            ("NVTX_EVENTS", "globalTid"),
        ):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            shifted = {"deviceId": "1", column: f"{column} + (1 << 24)", "start": "start + 50000", "end": "end + 50000"}
            chosen = ", ".join(shifted.get(name, f'"{name}"') for name in columns)
            connection.execute(f"INSERT INTO {table} SELECT {chosen} FROM {table}")
        connection.execute("DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE deviceId = 1 AND correlationId = 5")
        connection.commit()
    run = import_capture(export, tmp_path / "run")
    table = devices_table(attribute(run))
    decode = table[table["phase"] == "decode"].set_index("gpu")
    assert decode["launches"].to_dict() == {0: 5, 1: 4}
    for gpu in (0, 1):
        kernels = attribute(run.of_device(gpu)).timeline.kernels
        assert (kernels["start_ns"] - kernels["issued_ns"] == 10_000).all()


def test_one_device_has_no_table_of_devices(tmp_path: Path) -> None:
    run = import_capture(written(tmp_path / "one.json", events(11, 0, 3, 1_000)), tmp_path / "run")
    assert run.facts.imported is not None
    assert run.facts.imported.devices == ()
    assert devices_table(attribute(RunFolder(run.path))).empty


def test_a_gpu_is_what_the_machine_calls_it_not_the_process(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES: every process sees its own GPU as device 0; the export says which it is."""
    single = import_capture(written(tmp_path / "one.json", events(11, 0, 5, 1_000)), tmp_path / "single")
    export = export_run(single.path, "nsys", tmp_path / "two.sqlite")
    with closing(sqlite3.connect(export)) as connection:
        (pid,) = connection.execute("SELECT pid FROM TARGET_INFO_CUDA_DEVICE").fetchone()
        connection.execute("UPDATE TARGET_INFO_CUDA_DEVICE SET gpuId = 5")
        connection.execute(f"INSERT INTO TARGET_INFO_CUDA_DEVICE (gpuId, cudaId, pid) VALUES (2, 0, {pid + 1})")
        columns = [row[1] for row in connection.execute("PRAGMA table_info(TARGET_INFO_GPU)")]
        for number, name in ((5, "GPU five"), (2, "GPU two")):
            own = {"id": str(number), "name": f"'{name}'"}
            chosen = ", ".join(own.get(column, f'"{column}"') for column in columns)
            connection.execute(f"INSERT INTO TARGET_INFO_GPU SELECT {chosen} FROM TARGET_INFO_GPU WHERE id = 0")
        for table, column in (
            ("CUPTI_ACTIVITY_KIND_KERNEL", "globalPid"),
            ("CUPTI_ACTIVITY_KIND_RUNTIME", "globalTid"),
        ):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            chosen = ", ".join({column: f"{column} + (1 << 24)"}.get(name, f'"{name}"') for name in columns)
            connection.execute(f"INSERT INTO {table} SELECT {chosen} FROM {table}")
        connection.commit()
    run = import_capture(export, tmp_path / "run")
    assert run.facts.imported is not None
    found = {one.facts.index: one.facts.name for one in run.facts.imported.devices}
    assert found == {5: "GPU five", 2: "GPU two"}
    table = devices_table(attribute(run))
    assert table.groupby("gpu")["launches"].sum().to_dict() == {2: 5, 5: 5}
