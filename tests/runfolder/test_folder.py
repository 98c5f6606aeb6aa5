"""The run folder: recorded beside its name, swapped in when complete, readable when cut off, refused when damaged."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkern.errors import RecordingError, RunFolderError, UsageError
from llmkern.runfolder import RunFolder, RunWriter, writer
from llmkern.runfolder import place as place_module
from llmkern.runfolder.document import json_schema
from llmkern.runfolder.facts import SCHEMA_VERSION, RecorderFacts
from llmkern.runfolder.place import not_ours
from llmkern.runfolder.schema import TABLES, to_table
from tests.tables import least_facts, sign


def energy_rows(first: int, count: int) -> dict[str, object]:
    return {
        "timestamp_ns": np.arange(first, first + count, dtype=np.int64),
        "device": 0,
        "sensor": "nvml_total",
        "energy_mj": list(range(first, first + count)),
        "uncertainty_ns": 0,
    }


def recorded(path: Path, *, rows: int = 3, **facts: object) -> RunFolder:
    """Return a finished run folder at *path*."""
    run = RunWriter(path, least_facts(**facts), force=True)
    run.append("energy", energy_rows(0, rows))
    run.merge()
    run.publish()
    return RunFolder(path)


def test_a_run_is_recorded_beside_its_name_and_readable_all_the_time(tmp_path: Path) -> None:
    run = RunWriter(tmp_path / "run", least_facts())
    run.append("energy", energy_rows(0, 3))
    run.append("energy", energy_rows(3, 2))
    assert not (tmp_path / "run").exists()
    early = RunFolder(tmp_path / "run")
    assert early.path == tmp_path / "run.partial"
    assert early.status == "recording"
    assert list(early.table("energy")["timestamp_ns"]) == [0, 1, 2, 3, 4]
    run.merge()
    assert list(RunFolder(tmp_path / "run").table("energy")["timestamp_ns"]) == [0, 1, 2, 3, 4]
    run.publish(elapsed_s=1.0)
    late = RunFolder(tmp_path / "run")
    assert (late.complete, late.facts.elapsed_s, late.problems) == (True, 1.0, [])
    assert list(late.table("energy")["timestamp_ns"]) == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["energy.parquet", "run.json"]


def test_rows_are_not_doubled_when_the_merge_was_cut_off_before_its_segments_were_deleted(tmp_path: Path) -> None:
    run = RunWriter(tmp_path / "run", least_facts())
    run.append("energy", energy_rows(0, 3))
    segments = {p.name: p.read_bytes() for p in (run.path / "segments").iterdir()}
    run.merge()
    (run.path / "segments").mkdir()
    for name, content in segments.items():
        (run.path / "segments" / name).write_bytes(content)
    assert len(RunFolder(tmp_path / "run").table("energy")) == 3


def test_labels_of_different_segments_keep_their_meaning(tmp_path: Path) -> None:
    run = RunWriter(tmp_path / "run", least_facts())
    for first, sensor in enumerate(("b", "a", "b")):
        run.append("energy", energy_rows(first, 1) | {"sensor": sensor})
    assert list(RunFolder(run.path).table("energy")["sensor"]) == ["b", "a", "b"]
    run.merge()
    assert list(RunFolder(run.path).table("energy")["sensor"]) == ["b", "a", "b"]


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


def test_the_older_run_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    """L1: trace --force deleted the old run before the model was loaded."""
    recorded(tmp_path / "run", command="old")
    with pytest.raises(UsageError, match=r"exists and is not overwritten.*--force"):
        RunWriter(tmp_path / "run", least_facts())
    run = RunWriter(tmp_path / "run", least_facts(command="new"), force=True)
    run.append("energy", energy_rows(0, 1))
    assert RunFolder(tmp_path / "run").facts.command == "old"
    run.merge()
    assert RunFolder(tmp_path / "run").facts.command == "old"
    run.publish()
    assert RunFolder(tmp_path / "run").facts.command == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_disk_that_cannot_exchange_folders_swaps_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(place_module, "_exchange", lambda *_: False)
    recorded(tmp_path / "run", command="old")
    recorded(tmp_path / "run", command=f"new {number}")
    assert RunFolder(tmp_path / "run").facts.command == f"new {number}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("foreign", ["thesis.txt", "segments/notes.md", "kernels.parquet.backup", "more/run.json"])
def test_force_never_deletes_what_llmkern_did_not_write(tmp_path: Path, foreign: str) -> None:
    """L2: --force deleted any folder that held a file named run.json, with everything else in it."""
    recorded(tmp_path / "run")
    (tmp_path / "run" / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / foreign).write_text("years of work")
    with pytest.raises(UsageError, match=r"which llmkern did not write"):
        RunWriter(tmp_path / "run", least_facts(), force=True)
    assert (tmp_path / "run" / foreign).read_text() == "years of work"
    assert RunFolder(tmp_path / "run").complete


def test_a_folder_without_facts_is_nobodys_and_an_empty_one_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "kernels.parquet").write_text("somebody's")
    assert not_ours(tmp_path) == "kernels.parquet"
    (tmp_path / "empty").mkdir()
    assert not_ours(tmp_path / "empty") is None
    assert recorded(tmp_path / "empty").complete


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_name_that_is_no_new_folder_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L2: --out "" --force emptied the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="names no new folder"):
        RunWriter(Path(name), least_facts(), force=True)
    assert (tmp_path / "run.json").exists()


def test_a_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """U1: --out FILE --force was a fault of llmkern."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file or link"):
        RunWriter(tmp_path / "file", least_facts(), force=True)
    with pytest.raises(UsageError, match=r"cannot be created \(.*\).*--out"):
        RunWriter(tmp_path / "file" / "run", least_facts())
    assert (tmp_path / "file").read_text() == "mine"


def test_something_that_comes_while_recording_is_left_alone(tmp_path: Path) -> None:
    run = RunWriter(tmp_path / "run", least_facts())
    run.append("energy", energy_rows(0, 1))
    run.merge()
    recorded(tmp_path / "run", command="quicker")
    with pytest.raises(UsageError, match=r"exists and is not overwritten.*The finished run is in .*run\.partial"):
        run.publish()
    assert RunFolder(tmp_path / "run").facts.command == "quicker"
    assert RunFolder(tmp_path / "run.partial").complete


def test_two_recordings_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """L4: two at once collided."""
    one, two = (RunWriter(tmp_path / "run", least_facts()) for _ in range(2))
    assert one.path != two.path
    one.append("energy", energy_rows(0, 1))
    assert len(RunFolder(two.path).table("energy")) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"schema": SCHEMA_VERSION + 1}),
            f"schema {SCHEMA_VERSION + 1}, this llmkern reads schema {SCHEMA_VERSION}: update llmkern",
        ),
        (json.dumps({"schema": 0}), "schema 0.*trace the run again"),
        ("[]", "schema None"),
        ('{"schema": 2', "cannot be read"),
        ("\x00", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (json.dumps({"schema": 2}), "missing required field `device`"),
        (
            json.dumps({"schema": 2, "device": {"kind": "tpu", "index": 0, "name": "x"}}),
            r"'tpu' - at `\$\.device\.kind`",
        ),
        (json.dumps({"schema": 1, "device": {"kind": "cpu", "index": -1, "name": "x"}}), r">= 0`? - at `\$\.device"),
        (json.dumps({"schema": 2, "device": 7}), r"got `int` - at `\$\.device`"),
        ('{"schema": 2, "device": {"kind": "cpu", "index": 0, "name": "x"}, "elapsed_s": NaN}', "cannot be read"),
        ('{"schema": 2, "device": {"kind": "cpu", "index": 0, "name": "x"}, "elapsed_s": -1}', r"\$\.elapsed_s"),
        ('{"schema": 2, "device": {"kind": "cpu", "index": 0, "name": "x"}, "elapsed_s": 1e999}', "range|cannot be"),
    ],
)
def test_facts_that_cannot_be_get_a_sentence(tmp_path: Path, content: str, message: str) -> None:
    """U10: run.json was never validated; R21: nor was anything else that is read."""
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=message):
        RunFolder(tmp_path)


def test_a_run_of_the_older_schema_is_read(tmp_path: Path) -> None:
    device = {"kind": "cuda", "index": 0, "name": "H100"}
    old = {"schema": 1, "status": "complete", "device": device, "recorder": {"kernels": 5}, "inspected": {"ops": 3}}
    (tmp_path / "run.json").write_text(json.dumps({**old, "plant": "sleeping host"}))
    run = RunFolder(tmp_path)
    assert run.facts.recorders == {"time": RecorderFacts(kernels=5), "inspect": RecorderFacts(ops=3)}
    assert run.facts.labels == {"plant": "sleeping host"}
    # R14: it recorded kernels, and there are none.
    assert run.problems == ["Table kernels is missing: what rests on it is left out."]


def test_a_missing_folder_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder(tmp_path / "nowhere")


def test_only_the_last_segment_may_be_torn_and_others_are_told(tmp_path: Path) -> None:
    """R20: a torn segment in the middle was skipped and nobody said so."""
    run = RunWriter(tmp_path / "run", least_facts())
    for first in (0, 3, 6):
        run.append("energy", energy_rows(first, 3))
    first, middle, last = sorted((run.path / "segments").iterdir())
    last.write_bytes(last.read_bytes()[:100])
    found = RunFolder(run.path)
    assert (len(found.table("energy")), found.problems) == (6, [])
    middle.write_bytes(middle.read_bytes()[:100])
    found = RunFolder(run.path)
    assert len(found.table("energy")) == 3
    assert "torn in the middle" in found.problems[0]
    first.unlink()
    assert any("1 segments" in problem for problem in RunFolder(run.path).problems)


def test_a_table_that_is_no_parquet_gets_a_sentence(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    (run.path / "power.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RunFolderError, match=r"power\.parquet is torn"):
        RunFolder(run.path).table("power")


def test_a_missing_table_is_told(tmp_path: Path) -> None:
    """R14: tables missing from a complete run passed unsaid."""
    run = recorded(tmp_path / "run")
    (run.path / "energy.parquet").unlink()
    found = RunFolder(run.path)
    assert found.problems == ["Table energy is missing (3 rows were recorded): what rests on it is left out."]
    assert found.table("energy").empty


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """R20: 123 of 240 flipped bits in Parquet gave other figures without a word."""
    run = recorded(tmp_path / "run", rows=500)
    file = run.path / "energy.parquet"
    whole = file.read_bytes()
    chance = np.random.default_rng(20)
    for position in chance.integers(0, len(whole) * 8, 100):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << (position % 8)
        file.write_bytes(bytes(damaged))
        with pytest.raises(RunFolderError, match="is not what was recorded"):
            RunFolder(run.path).table("energy")


def test_pages_have_checksums_of_their_own(tmp_path: Path) -> None:
    """Other readers of the tables have no run.json; for them every page carries its own."""
    run = recorded(tmp_path / "run", rows=5000)
    file = run.path / "energy.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 4] ^= 1
    file.write_bytes(bytes(damaged))
    with pytest.raises((OSError, pa.ArrowException), match=r"(?i)checksum|crc"):
        pq.read_table(file, page_checksum_verification=True)


def test_an_absent_table_has_columns_and_no_rows(tmp_path: Path) -> None:
    frame = recorded(tmp_path / "run").table("kernels")
    assert list(frame.columns) == TABLES["kernels"].names
    assert frame.empty


def test_a_table_without_a_column_gets_a_sentence(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    file = run.path / "energy.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["energy_mj"]), file)
    sign(run.path, "energy")
    with pytest.raises(RunFolderError, match=r"energy\.parquet lacks the columns energy_mj"):
        RunFolder(run.path).table("energy")


def test_a_full_disk_ends_in_a_sentence_and_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunWriter(tmp_path / "run", least_facts())
    run.append("energy", energy_rows(0, 3))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(RecordingError, match=r"No space left on device.*--out"):
        run.append("energy", energy_rows(3, 3))
    # L7: on a disk that was remounted read-only the handler of the error itself raised.
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(RecordingError, match=r"No space left on device.*--out"):
        run.append("energy", energy_rows(3, 3))
    assert run.give_up("failed", "the disk is full") == run.path
    monkeypatch.undo()
    found = RunFolder(run.path)
    assert len(found.table("energy")) == 3
    assert found.status == "killed"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        run = RunWriter(disk / "run", least_facts())
        noise = np.random.default_rng(0)

        def fill() -> None:
            for i in range(100):
                rising = np.sort(noise.integers(0, 2**53, 5000)) + i * 2**53
                run.append("energy", energy_rows(i * 5000, 5000) | {"energy_mj": rising})

        with pytest.raises(RecordingError, match="No space left on device"):
            fill()
        run.give_up("failed", "full")
        assert len(RunFolder(disk / "run").table("energy")) >= 5000
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_kill_9_leaves_everything_up_to_the_last_segment_and_a_true_status(tmp_path: Path) -> None:
    """L8: a run whose process was gone had the status "recording" for ever."""
    program = f"""
import time
from pathlib import Path
from llmkern.runfolder import RunWriter
from tests.tables import least_facts
writer = RunWriter(Path({str(tmp_path / "run")!r}), least_facts())
for i in range(10**6):
    writer.append("energy", dict(timestamp_ns=[i], device=0, sensor="s", energy_mj=[i], uncertainty_ns=0))
    print(i, flush=True)
    time.sleep(0.01)
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 20:
        pass
    assert RunFolder(tmp_path / "run").status == "recording"
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = [int(line) for line in process.stdout.read().split()]
    found = RunFolder(tmp_path / "run")
    assert found.status == "killed"
    frame = found.table("energy")
    assert len(frame) >= (max(last) if last else 20)
    assert list(frame["energy_mj"]) == list(range(len(frame)))


def test_what_never_began_leaves_nothing_behind(tmp_path: Path) -> None:
    run = RunWriter(tmp_path / "run", least_facts())
    assert run.give_up("interrupted", "ended by SIGINT") is None
    assert list(tmp_path.iterdir()) == []


def test_the_facts_have_a_schema_of_their_own() -> None:
    schema = json_schema()
    assert schema["$defs"]["DeviceFacts"]["properties"]["index"]["minimum"] == 0
    assert writer.encode(least_facts()).endswith(b"}\n")
