"""What holds of every statement: parts lie within their wholes, and how rows are stored is no matter."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmkern.attribute.attribution import Attribution, attribute
from llmkern.estimate import Estimate
from llmkern.explain import Explanation
from llmkern.explain.statement import Part, Statement, state
from llmkern.explain.tables import run_tables
from llmkern.report.document import finite, report_document
from llmkern.runfolder import RunFolder
from tests.recorded import recorded
from tests.synthetic import synthetic_run
from tests.tables import sign

HAIR = 1e-9


def estimates(statement: Statement) -> dict[str, Estimate]:
    """Return every estimate of *statement* by where it stands."""
    found = {}
    for phase in statement.phases:
        for field in fields(phase):
            value = getattr(phase, field.name)
            value = value.energy_j if isinstance(value, Part) else value
            if isinstance(value, Estimate):
                found[f"{phase.phase} {field.name}"] = value
    for told in statement.findings:
        if told.finding.energy_j is not None:
            found[f"{told.finding.phase} {told.finding.name}"] = told.finding.energy_j
    for made in statement.predictions:
        found[f"{made.phase} {made.name} latency"] = made.latency_s
        if made.energy_j is not None:
            found[f"{made.phase} {made.name} energy"] = made.energy_j
    return found


def within(part: Estimate, whole: Estimate, name: str) -> None:
    assert part.value <= whole.value * (1 + HAIR), name
    for end in ("low", "high"):
        own, most = getattr(part, end), getattr(whole, end)
        if own is not None and most is not None:
            assert own <= most * (1 + HAIR), f"{name}: {end} {own} of {most}"


def check_sound(attribution: Attribution) -> None:
    statement = state(Explanation(attribution), top=3)
    for name, estimate in estimates(statement).items():
        ends = [e for e in (estimate.low, estimate.value, estimate.high) if e is not None]
        assert all(map(math.isfinite, ends)), name
        assert ends == sorted(ends), name
        if not name.endswith(("residual", "recorder_effect")):
            assert ends[0] >= 0, name
    for phase in statement.phases:
        assert 0 <= phase.busy_share <= 1 + HAIR
        within(phase.gap_s, phase.latency_s, "gap_s")
        assert phase.busy_s <= phase.latency_s.value * (1 + HAIR)
        shown = {name: rows[rows["phase"] == phase.phase] for name, rows in statement.shown.items()}
        # A phase of one kernel has no gap between two.
        shown = {name: rows for name, rows in shown.items() if len(rows)}
        for name, rows in shown.items():
            numbers = rows[["launches", "time_s", "energy_j", "low_j", "high_j", "share"]].dropna(axis=1, how="all")
            assert (numbers >= -HAIR).all(axis=None), name
            assert rows["share"].max() <= 1 + HAIR, name
            if name in ("causes", "gaps"):
                # Kernels of several streams together may be longer than the phase, gaps may not.
                assert rows["time_s"].sum() <= phase.gap_s.value * (1 + HAIR), name
        if phase.energy_j is None or phase.kernels is None or phase.gaps is None or phase.residual is None:
            assert shown["kinds"]["energy_j"].isna().all()
            continue
        for part in (phase.kernels, phase.gaps):
            within(part.energy_j, phase.energy_j, f"{phase.phase} part")
            assert 0 <= part.share <= 1 + HAIR
        whole = phase.kernels.energy_j.value + phase.gaps.energy_j.value + phase.residual.energy_j.value
        assert whole == pytest.approx(phase.energy_j.value)
        for name, part in (("kinds", phase.kernels), ("kernels", phase.kernels), ("causes", phase.gaps)):
            if name not in shown:
                continue
            assert shown[name]["energy_j"].sum() == pytest.approx(part.energy_j.value)
            for row in shown[name].to_dict("records"):
                low, high = (None if math.isnan(row[e]) else row[e] for e in ("low_j", "high_j"))
                within(Estimate(row["energy_j"], low, high), part.energy_j, f"{name} {row}")
        # The draws of all kernels together are those of the whole, however they are summed.
        for together in (
            attribution.split(phase.phase, ["phase"]).iloc[0],
            attribution.cost(phase.phase, kernels=lambda rows: np.ones(len(rows), bool))[0],
        ):
            assert together is not None
            ends = (
                (together.energy_j, together.low_j, together.high_j)
                if isinstance(together, pd.Series)
                else (together.value, together.low, together.high)
            )
            told = phase.kernels.energy_j
            known = [e for e in (told.value, told.low, told.high) if e is not None]
            assert list(ends[: len(known)]) == pytest.approx(known)


# Each example plays a whole run: making a failing one smaller would take longer than to read it.
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    truth=st.fixed_dictionaries(
        {
            "floor_w": st.floats(20, 200),
            "kernel_w": st.floats(60, 900),
            "prefill_s": st.floats(0.005, 0.2),
            "prefill_busy": st.floats(0.05, 1.2),
            "token_s": st.floats(0.003, 0.08),
            "busy_per_token_s": st.floats(0.0002, 0.1),
            "kernels_per_token": st.integers(1, 20),
            "new_tokens": st.integers(2, 12),
            "rounds": st.integers(1, 7),
            "jitter": st.sampled_from([0.0, 0.05, 0.2]),
            "energy": st.booleans(),
        }
    ),
    seed=st.integers(0, 5),
)
def test_statements_of_made_up_runs_are_sound(
    tmp_path_factory: pytest.TempPathFactory, truth: dict[str, Any], seed: int
) -> None:
    run, _ = synthetic_run(tmp_path_factory.mktemp("property") / "run", seed=seed, **truth)
    check_sound(attribute(run))


@pytest.mark.parametrize("name", ["int8", "int4", "bf16", "bf16-operators"])
def test_statements_of_recorded_runs_are_sound(name: str) -> None:
    check_sound(recorded(name))


def document(run: RunFolder) -> dict[str, Any]:
    explanation = Explanation(attribute(run))
    told = report_document(state(explanation), run_tables(explanation))
    told["run"].pop("folder")
    return json.loads(json.dumps(finite(told)))


def same(one: Any, other: Any, where: str = "") -> None:
    """Sums of numbers in another order may differ in the last bits, nothing else may."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where}[{i}]")
    elif isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-12), where
    else:
        assert one == other, where


@pytest.mark.parametrize("how", ["reversed", "shuffled"])
def test_the_order_of_rows_changes_nothing(tmp_path: Path, how: str) -> None:
    run, _ = synthetic_run(tmp_path / "run", jitter=0.1, rounds=6)
    before = document(run)
    random = np.random.default_rng(5)
    for file in sorted((tmp_path / "run").glob("*.parquet")):
        table = pq.read_table(file)
        rows = np.arange(table.num_rows)[::-1] if how == "reversed" else random.permutation(table.num_rows)
        pq.write_table(table.take(rows), file)
        sign(tmp_path / "run", file.stem)
    same(before, document(RunFolder(tmp_path / "run")))


def test_how_rows_are_split_into_files_changes_nothing(tmp_path: Path) -> None:
    """Row groups of any size, and the segments of a recording that was interrupted before they were merged."""
    run, _ = synthetic_run(tmp_path / "run", jitter=0.1, rounds=6)
    before = document(run)
    for file in sorted((tmp_path / "run").glob("*.parquet")):
        pq.write_table(pq.read_table(file), file, row_group_size=7)
        sign(tmp_path / "run", file.stem)
    same(before, document(RunFolder(tmp_path / "run")))
    segments = tmp_path / "run" / "segments"
    segments.mkdir()
    number = 0
    for file in sorted((tmp_path / "run").glob("*.parquet")):
        table = pq.read_table(file)
        for part in (table.slice(0, 11), table.slice(11)):
            number += 1
            pq.write_table(part, segments / f"{file.stem}-{number:06d}.parquet")
        file.unlink()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**facts, "tables": {}}))
    same(before, document(RunFolder(tmp_path / "run")))
