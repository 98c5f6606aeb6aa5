"""What is uncertain is said, and only that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llmkern.attribute.attribution import attribute
from llmkern.attribute.time.operators import Identified, Mismatch
from llmkern.explain.doubts import doubts
from llmkern.runfolder import RunFolder
from llmkern.runfolder.facts import MeterFacts, PlanFacts, RecorderFacts
from tests.synthetic import synthetic_run
from tests.tables import write_table


def said(run: RunFolder) -> str:
    return "\n".join(doubts(run, attribute(run)))


def with_facts(run: RunFolder, **facts: Any) -> RunFolder:
    run.facts = replace(run.facts, **facts)
    return run


def test_a_clean_run_has_the_methods_own_doubts_only(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run", new_tokens=32)
    lines = said(run).splitlines()
    assert [line.split()[0] for line in lines] == ["Weights", "Kernels"]


def test_a_failed_run_gives_its_reason(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    text = said(with_facts(run, status="failed", reason="the disk is full."))
    assert text.startswith("This run is incomplete; its recording stopped: the disk is full.")


@pytest.mark.parametrize(("field", "word"), [("dropped_records", "dropped 5"), ("lost_timestamps", "lost 5")])
def test_lost_records_are_said(tmp_path: Path, field: str, word: str) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    assert word in said(with_facts(run, recorders={"time": RecorderFacts(**{field: 5})}))


def test_records_lost_by_any_pass_are_said(tmp_path: Path) -> None:
    """L5: drops in pass inspect reached no doubt."""
    run, _ = synthetic_run(tmp_path / "run")
    text = said(with_facts(run, recorders={**run.facts.recorders, "inspect": RecorderFacts(dropped_records=7)}))
    assert "CUPTI dropped 7 records" in text
    assert "pass inspect: operators are too low" in text


def test_one_round_is_too_few(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run", rounds=1)
    assert "1 round(s) of windows give no interval" in said(run)


def test_a_clock_held_down_is_named_with_its_share(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    power = run.table("power")
    readings = power["sensor"] == "instant"
    power.loc[readings, "throttle"] = 0x4
    columns = {c: pa.array(power[c].astype(object), from_pandas=True) for c in power.columns}
    write_table(run.path, "power", columns)
    run = RunFolder(run.path)
    assert "held down by the software power cap in 100% of the readings while the run was weighed" in said(run)


def test_what_holds_the_clock_down_outside_of_the_windows_is_not_told(tmp_path: Path) -> None:
    """R2: 63 % of the readings were those of the tool's own test and replays."""
    run, _ = synthetic_run(tmp_path / "run")
    power, ranges = run.table("power"), run.table("ranges")
    windows = ranges[(ranges["category"] == "window") & (ranges["pass"] == "weigh")]
    inside = np.zeros(len(power), bool)
    for start_ns, end_ns in windows[["start_ns", "end_ns"]].itertuples(index=False):
        inside |= power["timestamp_ns"].between(start_ns, end_ns).to_numpy()
    power.loc[(power["sensor"] == "instant") & ~inside, "throttle"] = 0x4
    columns = {c: pa.array(power[c].astype(object), from_pandas=True) for c in power.columns}
    write_table(run.path, "power", columns)
    assert "held down" not in said(RunFolder(run.path))


def test_a_traced_run_longer_than_the_weighed_one_is_said_and_no_share_is_over_the_whole(tmp_path: Path) -> None:
    """R5: shares of 427 % beside a busy clipped to 100 %."""
    run, _ = synthetic_run(tmp_path / "run")
    kernels = run.table("kernels")
    kernels["end_ns"] = kernels["start_ns"] + 40 * (kernels["end_ns"] - kernels["start_ns"])
    columns = {c: pa.array(kernels[c].astype(object), from_pandas=True) for c in kernels.columns}
    write_table(run.path, "kernels", columns)
    run = RunFolder(run.path)
    attribution = attribute(run)
    decode = attribution.accounts["decode"]
    assert decode.is_traced_longer
    assert decode.busy_share == 1.0
    assert decode.gap_s.value == 0.0
    assert "Under the recorder the kernels of decode alone took" in said(run)
    for phase, account in attribution.accounts.items():
        kinds = attribution.split(phase, ["kind"])
        assert (kinds["energy_j"] <= account.weight.energy_j.value).all()  # type: ignore[union-attr]


def test_a_floor_measured_at_another_temperature_is_said(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    power, ranges = run.table("power"), run.table("ranges")
    windows = ranges[ranges["category"] == "window"]
    hot = power["timestamp_ns"].between(windows["start_ns"].min(), windows["end_ns"].max())
    power.loc[hot & (power["sensor"] == "instant"), "temperature_c"] = 70
    columns = {c: pa.array(power[c].astype(object), from_pandas=True) for c in power.columns}
    write_table(run.path, "power", columns)
    run = RunFolder(run.path)
    assert "The run was at 70 °C, the idle floor was measured at 50-" in said(run)


def test_steps_that_differ_from_those_inspected_are_told(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    attribution = attribute(run)
    op = np.zeros(len(attribution.timeline.kernels), int)
    op[:5] = -1
    found = Identified(op, [Mismatch("decode", 3, 17, 100, 5)])
    (line,) = (x for x in doubts(run, replace(attribution, identified=found)) if "inspected" in x)
    assert "the first at kernel 17 of decode token 3" in line


def test_what_the_sensors_cannot_tell_is_said(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    unsupported = {"power_samples": "NOT_SUPPORTED", "memory_average": "INVALID_ARGUMENT"}
    text = said(with_facts(run, sensors={"nvml_total": MeterFacts(source="NVML", unsupported=unsupported)}))
    assert "no 20 ms power samples (NOT_SUPPORTED)" in text
    assert "no memory power (INVALID_ARGUMENT): HBM cannot be told from the rest" in text


def test_a_decode_too_short_to_attribute_is_said(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "long")
    assert "Too short to attribute" not in said(run)
    short, _ = synthetic_run(tmp_path / "short", new_tokens=2, prefill_s=0.5)
    assert "Too short to attribute decode: it is" in said(short)
    assert "use more --new-tokens" in said(short)


def test_what_a_length_costs_at_first_is_told(tmp_path: Path) -> None:
    """In 16 bits on an H100 the first generation of a length took 2.4 s where later ones take 0.8 s."""
    run, truth = synthetic_run(tmp_path / "run", new_tokens=32)
    whole_s = truth.prefill_s + 31 * truth.token_s
    dear = said(with_facts(run, plan=PlanFacts(new_tokens=32, first_generate_s=whole_s + 31 * 0.06)))
    assert "take 60.0 ms more for each token" in dear
    assert "cuDNN" not in dear
    assert "first generation" not in said(with_facts(run, plan=PlanFacts(new_tokens=32, first_generate_s=whole_s)))
    assert "first generation" not in said(with_facts(run, plan=PlanFacts(new_tokens=32)))
