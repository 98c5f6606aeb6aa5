"""The pump: everything arrives, failures are kept, the interpreter's settings come back."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from llmkern.errors import RecordingError
from llmkern.record.clock import ClockWatch
from llmkern.record.pump import Pump
from llmkern.runfolder import RunFolder, RunWriter
from tests.tables import least_facts


def source(rows: list[int]):
    def drain() -> dict[str, dict[str, object]]:
        taken, rows[:] = list(rows), []
        columns = {"timestamp_ns": taken, "device": 0, "sensor": "s", "energy_mj": taken, "uncertainty_ns": 0}
        return {"energy": columns}

    return drain


def test_rows_arrive_while_it_runs_and_the_rest_at_the_end(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", least_facts())
    rows = [1, 2]
    with Pump(writer, [source(rows)], period_s=0.05):
        time.sleep(0.2)
        assert len(RunFolder(tmp_path / "run").table("energy")) == 2
        rows += [3]
    assert list(RunFolder(tmp_path / "run").table("energy")["energy_mj"]) == [1, 2, 3]


def test_a_failure_of_the_body_loses_nothing(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", least_facts())
    with pytest.raises(ValueError, match="body"), Pump(writer, [source([1])], period_s=60):
        raise ValueError("body")
    assert len(RunFolder(tmp_path / "run").table("energy")) == 1


def test_a_failure_to_write_is_raised_by_check_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", least_facts())

    def refuse(*_: object) -> int:
        raise RecordingError("the disk is full")

    monkeypatch.setattr(writer, "append", refuse)
    pump = Pump(writer, [source([1])], period_s=0.02)

    def body() -> None:
        with pump:
            time.sleep(0.2)

    with pytest.raises(RecordingError, match="the disk is full"):
        body()
    with pytest.raises(RecordingError, match="the disk is full"):
        pump.check()


def test_its_cost_is_known_and_the_switch_interval_comes_back(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", least_facts())
    before_s = sys.getswitchinterval()
    with Pump(writer, [source([1])], period_s=0.02) as pump:
        assert sys.getswitchinterval() < before_s
        time.sleep(0.1)
    assert sys.getswitchinterval() == before_s
    assert 0 < pump.held_s < 0.1
    # Merging at the end has nothing to do with the pump.
    held_s = pump.held_s
    writer.merge()
    assert pump.held_s == held_s


def test_a_clock_that_is_set_ends_the_recording_and_its_second_is_thrown_away(tmp_path: Path) -> None:
    """R17: a stepped clock turned into -1,799 s of prefill and nobody said so."""
    writer = RunWriter(tmp_path / "run", least_facts())
    offset_ns = 0
    clock = ClockWatch(wall_ns=lambda: time.monotonic_ns() + 10**18 + offset_ns)
    rows = [1, 2]
    pump = Pump(writer, [source(rows)], clock, period_s=60)

    def body() -> None:
        nonlocal offset_ns
        with pump:
            pump._pump()
            rows.append(3)
            offset_ns = -1_799_000_000_000

    with pytest.raises(RecordingError, match=r"clock was set back by 1,799\.000 s"):
        body()
    run = RunFolder(tmp_path / "run")
    assert list(run.table("energy")["energy_mj"]) == [1, 2]
    assert len(run.table("clocks")) == 1


def test_a_clock_that_is_disciplined_is_no_step() -> None:
    now_ns = 0
    clock = ClockWatch(wall_ns=lambda: round(now_ns * 1.0004), steady_ns=lambda: now_ns)
    for now_ns in range(10**9, 10**11, 10**10):  # noqa: B007
        clock.look()
    facts = clock.facts()
    assert facts.largest_change_ns > 10**6
    assert facts.looks == 11
    now_ns += 2_000_000
    clock.look()
