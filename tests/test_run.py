"""The run folder: segments, merging, interruption, versions, torn files, disks that refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llmkern.errors import RecordingError, RunFolderError, UsageError
from llmkern.run import SCHEMA_VERSION, TABLES, RunFolder, RunWriter, to_table


def energy_rows(first: int, count: int) -> dict[str, object]:
    return {
        "timestamp_ns": np.arange(first, first + count, dtype=np.int64),
        "device": 0,
        "sensor": "nvml_total",
        "energy_mj": list(range(count)),
        "uncertainty_ns": 0,
    }


def test_segments_are_readable_before_and_after_the_merge(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {"device": {"kind": "cpu"}})
    writer.append("energy", energy_rows(0, 3))
    writer.append("energy", energy_rows(3, 2))
    early = RunFolder(tmp_path / "run")
    assert not early.complete
    assert list(early.table("energy")["timestamp_ns"]) == [0, 1, 2, 3, 4]
    writer.finish(elapsed_s=1.0)
    late = RunFolder(tmp_path / "run")
    assert late.complete
    assert list(late.table("energy")["timestamp_ns"]) == [0, 1, 2, 3, 4]
    assert not (tmp_path / "run" / "segments").exists()
    assert (tmp_path / "run" / "energy.parquet").is_file()


def test_rows_are_not_doubled_when_the_merge_was_cut_off_before_its_segments_were_deleted(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.append("energy", energy_rows(0, 3))
    segments = {p.name: p.read_bytes() for p in (tmp_path / "run" / "segments").iterdir()}
    writer.finish()
    (tmp_path / "run" / "segments").mkdir()
    for name, content in segments.items():
        (tmp_path / "run" / "segments" / name).write_bytes(content)
    assert len(RunFolder(tmp_path / "run").table("energy")) == 3


def test_labels_of_different_segments_keep_their_meaning(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    for sensor in ("b", "a", "b"):
        writer.append("energy", energy_rows(0, 1) | {"sensor": sensor})
    writer.finish()
    assert list(RunFolder(tmp_path / "run").table("energy")["sensor"]) == ["b", "a", "b"]


def test_dictionary_columns_and_nulls_pass_through() -> None:
    names = pa.DictionaryArray.from_arrays(pa.array([1, 0], pa.int32()), pa.array(["x", "y"]))
    table = to_table(
        "power",
        {
            "timestamp_ns": [1, 2],
            "device": 0,
            "sensor": names,
            "power_mw": [5, 6],
            "sm_clock_mhz": pa.array(np.array([-1, 1980]), mask=np.array([True, False])),
            "temperature_c": [None, 40],
            "throttle": None,
        },
    )
    assert table.schema == TABLES["power"]
    assert table["sensor"].to_pylist() == ["y", "x"]
    assert table["sm_clock_mhz"].to_pylist() == [None, 1980]
    assert table["throttle"].null_count == 2


def test_an_existing_folder_is_refused_and_force_replaces_it(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", {"mark": 1})
    with pytest.raises(UsageError, match=r"exists and is not overwritten.*--force"):
        RunWriter(tmp_path / "run", {})
    RunWriter(tmp_path / "run", {"mark": 2}, force=True)
    assert RunFolder(tmp_path / "run").facts["mark"] == 2


def test_force_never_deletes_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a run folder"):
        RunWriter(tmp_path, {}, force=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be created \(Not a directory\).*--out"):
        RunWriter(tmp_path / "file" / "run", {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"schema": SCHEMA_VERSION + 1}),
            f"schema {SCHEMA_VERSION + 1}, this llmkern reads schema {SCHEMA_VERSION}",
        ),
        (json.dumps({"schema": 0}), "schema 0"),
        ("[]", "schema None"),
        ('{"schema": 1', "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_foreign_or_torn_run_json_gets_a_sentence(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=message):
        RunFolder(tmp_path)


def test_a_missing_folder_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder(tmp_path / "nowhere")


def test_a_torn_table_gets_a_sentence_but_a_torn_segment_costs_only_itself(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.append("energy", energy_rows(0, 3))
    writer.append("energy", energy_rows(3, 3))
    torn = sorted((tmp_path / "run" / "segments").iterdir())[-1]
    torn.write_bytes(torn.read_bytes()[:100])
    assert len(RunFolder(tmp_path / "run").table("energy")) == 3
    (tmp_path / "run" / "power.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RunFolderError, match=r"power\.parquet is torn"):
        RunFolder(tmp_path / "run").table("power")


def test_an_absent_table_has_columns_and_no_rows(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", {})
    frame = RunFolder(tmp_path / "run").table("kernels")
    assert list(frame.columns) == TABLES["kernels"].names
    assert frame.empty


def test_a_full_disk_ends_in_a_sentence_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.append("energy", energy_rows(0, 3))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmkern.run.pq.ParquetWriter.write_table", refuse)
    with pytest.raises(RecordingError, match=r"No space left on device.*--out"):
        writer.append("energy", energy_rows(3, 3))
    assert len(RunFolder(tmp_path / "run").table("energy")) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        writer = RunWriter(disk / "run", {})
        noise = np.random.default_rng(0)

        def fill() -> None:
            for i in range(100):
                writer.append("energy", energy_rows(i, 5000) | {"energy_mj": noise.integers(0, 2**60, 5000)})

        with pytest.raises(RecordingError, match="No space left on device"):
            fill()
        assert len(RunFolder(disk / "run").table("energy")) >= 5000
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_kill_9_leaves_everything_up_to_the_last_segment(tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from llmkern.run import RunWriter
writer = RunWriter(Path({str(tmp_path / "run")!r}), {{}})
for i in range(10**6):
    writer.append("energy", dict(timestamp_ns=[i], device=0, sensor="s", energy_mj=[i], uncertainty_ns=0))
    print(i, flush=True)
    time.sleep(0.01)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 20:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = [int(line) for line in process.stdout.read().split()]
    frame = RunFolder(tmp_path / "run").table("energy")
    assert len(frame) >= (max(last) if last else 20)
    assert list(frame["energy_mj"]) == list(range(len(frame)))
