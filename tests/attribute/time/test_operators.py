"""The join by launch order: exact where it can be, silent nowhere, guessing never."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from llmkern.attribute.time.operators import Identified, identify, read_inspected
from llmkern.attribute.time.timeline import Timeline, build_timeline
from llmkern.runfolder import RunFolder
from llmkern.runfolder.schema import TABLES
from llmkern.runfolder.vocabulary import NONE
from tests.synthetic import MS, synthetic_run
from tests.tables import write_table


def write(run: RunFolder, name: str, frame: pd.DataFrame) -> None:
    columns = {c: pa.array(frame[c].astype(object), from_pandas=True) for c in TABLES[name].names}
    write_table(run.path, name, columns)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A synthetic run whose first traced repeat counts as inspected as well, one operator per kernel."""
    run, _ = synthetic_run(tmp_path / "run", new_tokens=4)
    kernels, launches, ranges = (run.table(t) for t in ("kernels", "launches", "ranges"))
    first = ranges[(ranges["pass"] == "time") & (ranges["repeat"] == 0)]
    until_ns = first["end_ns"].max()
    copies = {}
    for name, frame in (("kernels", kernels), ("launches", launches), ("ranges", first)):
        chosen = frame[frame["start_ns"] <= until_ns].assign(**{"pass": "inspect"})
        copies[name] = pd.concat([{"kernels": kernels, "launches": launches, "ranges": ranges}[name], chosen])
        write(run, name, copies[name])
    issued = launches[launches["start_ns"] <= until_ns]
    ops = pd.DataFrame({"start_ns": issued["start_ns"] - 100, "end_ns": issued["end_ns"] + 100})
    names = kernels.set_index("correlation_id")["name"]
    ops["op"] = "op of " + issued["correlation_id"].map(names).astype(str)
    for column in TABLES["ops"].names:
        if column not in ops:
            ops[column] = None
    write(run, "ops", ops)
    return RunFolder(run.path)


def found(run: RunFolder, kernels: pd.DataFrame | None = None) -> tuple[Identified, Timeline]:
    rows = run.table("kernels") if kernels is None else kernels
    timeline = build_timeline(rows, run.table("launches"), run.table("ranges"), 0)
    inspected = read_inspected(run, 0)
    assert inspected is not None
    return identify(inspected, timeline), timeline


def assert_true_ops(run: RunFolder, result: Identified, timeline: Timeline) -> None:
    ops = run.table("ops")["op"].astype(str).to_numpy()
    for name, op in zip(timeline.kernels["name"].astype(str), result.op, strict=True):
        assert op == NONE or ops[op] == f"op of {name}"


def test_equal_steps_are_identified_kernel_by_kernel(run: RunFolder) -> None:
    result, timeline = found(run)
    assert result.share == 1.0
    assert result.mismatches == []
    assert_true_ops(run, result, timeline)


def test_an_extra_kernel_is_unidentified_and_told_with_its_place(run: RunFolder) -> None:
    kernels = run.table("kernels")
    traced = kernels[kernels["pass"] == "time"]
    # GIVEN a kernel that was not inspected, in the middle of the last token
    last = traced.iloc[-5]
    extra = pd.DataFrame([{**last, "name": "stranger", "correlation_id": 0, "start_ns": last["start_ns"] - MS}])
    extra["end_ns"] = extra["start_ns"] + 1000
    result, timeline = found(run, pd.concat([kernels.astype({"name": object}), extra], ignore_index=True))
    # THEN it alone is unknown, and the others keep their operators
    assert (result.op == NONE).sum() == 1
    assert timeline.kernels["name"].to_numpy()[result.op == NONE] == ["stranger"]
    (mismatch,) = result.mismatches
    assert (mismatch.phase, mismatch.token, mismatch.unidentified, mismatch.kernels) == ("decode", 3, 1, 11)
    assert_true_ops(run, result, timeline)


def test_a_missing_kernel_shifts_nobody(run: RunFolder) -> None:
    kernels = run.table("kernels")
    traced = kernels.index[kernels["pass"] == "time"]
    result, timeline = found(run, kernels.drop(traced[-5]))
    assert (result.op == NONE).sum() == 0
    (mismatch,) = result.mismatches
    assert (mismatch.kernels, mismatch.unidentified) == (9, 0)
    assert_true_ops(run, result, timeline)


def test_a_phase_that_was_not_inspected_stays_unidentified(run: RunFolder) -> None:
    ranges = run.table("ranges")
    write(run, "ranges", ranges[~((ranges["pass"] == "inspect") & (ranges["phase"] == "prefill"))])
    result, timeline = found(RunFolder(run.path))
    prefill = (timeline.kernels["phase"] == "prefill").to_numpy()
    assert (result.op[prefill] == NONE).all()
    assert (result.op[~prefill] != NONE).all()
    assert {m.phase for m in result.mismatches} == {"prefill"}


def test_without_the_pass_nothing_is_known(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    assert read_inspected(run, 0) is None
