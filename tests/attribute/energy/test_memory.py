"""HBM energy by the one-second mean of the memory scope."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from llmkern.attribute.attribution import attribute
from llmkern.attribute.energy.memory import memory_energy
from llmkern.runfolder import RunFolder
from tests.synthetic import synthetic_run
from tests.tables import write_table


def with_memory(run: RunFolder, watts: dict[bool, float], period_s: float = 0.25) -> RunFolder:
    """Add memory readings: *watts* in windows of generate(1) (True) and of generate(n)."""
    power, ranges = run.table("power"), run.table("ranges")
    windows = ranges[ranges["category"] == "window"]
    rows = []
    for window in windows.itertuples():
        for time_ns in range(int(window.start_ns), int(window.end_ns), int(period_s * 1e9)):
            # The first second still shows what was before.
            settled = time_ns - window.start_ns >= 1e9
            value = watts[window.new_tokens == 1] if settled else 999.0
            rows.append({"timestamp_ns": time_ns, "device": 0, "sensor": "memory_average", "power_mw": value * 1e3})
    frame = pd.concat([power.assign(sensor=power["sensor"].astype(str)), pd.DataFrame(rows)], ignore_index=True)
    write_table(run.path, "power", {c: pa.array(frame[c].astype(object), from_pandas=True) for c in power.columns})
    return RunFolder(run.path)


def test_prefill_and_decode_get_what_the_memory_drew_in_them(tmp_path: Path) -> None:
    run, truth = synthetic_run(tmp_path / "run")
    found = attribute(run)
    assert found.weighed is not None
    assert memory_energy(run, found.weighed, 0) == {}
    run = with_memory(run, {True: 60.0, False: 60.0})
    energy = memory_energy(run, found.weighed, 0)
    assert energy["decode"].value == pytest.approx(60.0 * truth.token_s, rel=0.02)
    assert energy["prefill"].value == pytest.approx(60.0 * found.weighed.phases["prefill"].latency_s.value, rel=0.02)


def test_windows_too_short_for_the_mean_give_nothing(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    found = attribute(run)
    assert found.weighed is not None
    run = with_memory(run, {True: 60.0, False: 60.0}, period_s=100.0)
    assert memory_energy(run, found.weighed, 0) == {}
