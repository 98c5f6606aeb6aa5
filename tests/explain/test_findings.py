"""Findings on recorded runs: what they count is what the records hold, and they add up to the accounts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from llmkern.attribute.attribution import Attribution, attribute
from llmkern.estimate import Estimate
from llmkern.explain.finding import Finding
from llmkern.explain.findings import FINDINGS, findings
from llmkern.explain.findings.padding import padding
from llmkern.explain.findings.power_cap import power_cap
from llmkern.explain.findings.recorder_effect import recorder_effect
from llmkern.explain.roofline import roofline
from llmkern.runfolder.facts import PromptFacts
from tests.recorded import recorded, recorded_run
from tests.synthetic import synthetic_run


def named(name: str, found: Attribution, phase: str = "decode") -> Finding:
    (finding,) = (f for f in findings(found) if f.name == name and f.phase == phase)
    return finding


def test_synchronisations_per_layer_are_those_in_the_records() -> None:
    run = recorded_run("int8")
    ranges = run.table("ranges", where={"pass": "calls"})
    decode = ranges[(ranges["category"] == "phase") & (ranges["phase"] == "decode")].iloc[0]
    calls = run.table("launches", where={"pass": "calls"})
    inside = calls[calls["start_ns"].between(decode["start_ns"], decode["end_ns"])]
    waits = inside["api"].astype(str).str.contains("Synchronize").sum() / 2
    # Two decoded tokens; each ends with two waits outside the layers, and one of the generation is the recorder's.
    finding = named("synchronizations", recorded("int8"))
    assert float(finding.evidence["launches"].sum()) == 28 * 12
    assert 0 < waits - 28 * 12 <= 3
    assert "336 times per token, 12.0 times per layer" in finding.claim


def test_launches_per_layer_are_those_in_the_records() -> None:
    found = recorded("int8")
    decode = found.kernels[(found.kernels["phase"] == "decode") & found.kernels["layer"].notna()]
    per_layer = decode["launches"].sum() / 28
    assert f"a layer launches {per_layer:,.0f} of them" in named("fragmentation", found).claim
    rows = found.timeline.kernels
    short = ((rows["end_ns"] - rows["start_ns"]) < 5_000)[rows["phase"] == "decode"].mean()
    assert f"{short:.0%} of" in named("fragmentation", found).claim


def test_a_low_roof_is_told_in_the_unit_of_what_bounds_it() -> None:
    found = recorded("int8")
    for phase, unit in (("decode", "TB/s"), ("prefill", "TFLOP/s")):
        claim = named("low_roof", found, phase).claim
        assert roofline(found, phase).iloc[0]["bound"] == ("memory" if unit == "TB/s" else "compute")
        assert f" {unit})." in claim


def test_int8_is_explained_by_its_conversions_and_bf16_is_not() -> None:
    finding = named("overhead_kernels", recorded("int8"))
    account = recorded("int8").accounts["decode"]
    assert finding.energy_j is not None
    assert account.weight.energy_j is not None
    assert 0.5 < finding.energy_j.value / account.weight.energy_j.value < 0.8
    assert set(finding.evidence["kind"]) <= {"quantize", "dequantize", "outlier", "cast"}
    assert not [f for f in findings(recorded("bf16-operators")) if f.name == "synchronizations"]


def test_gaps_by_cause_are_the_gaps_of_the_account() -> None:
    for name in ("int8", "int4", "bf16-operators"):
        found = recorded(name)
        for phase, account in found.accounts.items():
            rows = found.split_gaps(phase, ["cause"])
            assert account.gap_j is not None
            assert rows["energy_j"].sum() == pytest.approx(account.gap_j.value)
            assert rows["duration_ns"].sum() / 1e9 == pytest.approx(account.gap_s.value)
            assert set(rows.loc[rows["duration_ns"] > 0, "cause"]) <= {
                *("launch_bound", "sync_stall", "token_boundary", "launch_latency", "profiler", "dependency")
            }


def test_every_finding_says_how_it_is_known() -> None:
    for name in ("int8", "int4", "bf16-operators", "bf16"):
        for finding in findings(recorded(name)):
            for text in (finding.claim, finding.formula, finding.assumption, finding.next_step):
                assert text
            assert finding.claim.endswith(".")
            assert len(finding.evidence)
            if finding.energy_j is not None:
                # Two rounds of windows (int4) give no interval.
                assert finding.energy_j.low is not None or name == "int4"
                assert (finding.energy_j.low or 0.0) <= finding.energy_j.value


def test_the_largest_share_of_decode_comes_first() -> None:
    found = findings(recorded("int8"))
    assert [f.phase for f in found] == sorted(f.phase for f in found)
    decode = [f.energy_j.value for f in found if f.phase == "decode" and f.energy_j is not None]
    assert decode == sorted(decode, reverse=True)


def test_a_run_without_operators_or_energy_has_findings_of_what_it_knows(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run", energy=False)
    for find in FINDINGS:
        for finding in find(attribute(run)):
            assert finding.energy_j is None


def test_padding_is_the_share_of_computed_tokens_that_no_prompt_has(tmp_path: Path) -> None:
    run, truth = synthetic_run(tmp_path / "run")
    assert padding(attribute(run)) == []
    prompts = PromptFacts(tokens=100, effective_tokens=(100, 20, 30, 50), computed_tokens=400)
    run.facts = replace(run.facts, prompts=prompts)
    (finding,) = padding(attribute(run))
    assert "200 of 400 prompt tokens (50%)" in finding.claim
    assert finding.energy_j is not None
    assert finding.energy_j.value == pytest.approx(truth.prefill_j / 2, rel=0.05)


def test_a_phase_at_the_power_cap_is_told_with_its_clock(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    assert power_cap(attribute(run)) == []
    read = run.table

    def capped(name: str, *args: object, **more: object) -> pd.DataFrame:
        table = read(name, *args, **more)  # type: ignore[arg-type]
        return table.assign(throttle=4, sm_clock_mhz=1500) if name == "power" else table

    attribution = attribute(run)
    attribution.run.table = capped  # type: ignore[method-assign,assignment]
    found = power_cap(attribution)
    assert [f.phase for f in found] == ["prefill", "decode"]
    assert "100% of the readings (mean 1500 MHz)" in found[0].claim


def test_a_recorder_that_changed_the_run_is_told(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    attribution = attribute(run)
    assert recorder_effect(attribution) == []
    decode = attribution.accounts["decode"]
    slow = {"decode": replace(decode, recorder_effect=Estimate(0.5, 0.4, 0.6, 6))}
    (finding,) = recorder_effect(replace(attribution, accounts=slow))
    assert "decode 50% [40%, 60%] longer" in finding.claim
    # R8: what noise alone may be is no effect.
    noisy = {"decode": replace(decode, recorder_effect=Estimate(0.43, -0.1, 1.2, 6))}
    assert recorder_effect(replace(attribution, accounts=noisy)) == []
