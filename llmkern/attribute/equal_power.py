"""Attribution in its first form: gaps at the idle floor, the rest to the kernels by their duration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.attribute.energy import Floor
from llmkern.attribute.estimate import Estimate, combine, from_samples
from llmkern.attribute.timeline import Timeline, build_timeline
from llmkern.attribute.weighed import PhaseWeight, Weighed, weigh_phases
from llmkern.run import RunFolder

# A board may exceed its limit for a moment, kernels on average may not.
POWER_LIMIT_SLACK = 1.05


@dataclass(frozen=True)
class PhaseAccount:
    """The energy of one phase, per unit (a prefill call or a decoded token step), on one device.

    energy = kernels + gaps + residual. ``gap_s`` is the weighed latency minus the kernels' busy time: the recorder
    lengthens the traced gaps, not the weighed ones. Energies are None without an energy counter.
    """

    phase: str
    unit: str
    weight: PhaseWeight
    launches: float
    busy_s: float
    gap_s: Estimate
    kernel_j: Estimate | None
    gap_j: Estimate | None
    residual_j: float | None
    floor_w: Estimate | None
    traced_latency_s: float

    @property
    def busy_share(self) -> float:
        return min(1.0, self.busy_s / self.weight.latency_s.value)

    @property
    def mean_w(self) -> float | None:
        energy = self.weight.energy_j
        return None if energy is None else energy.value / self.weight.latency_s.value

    @property
    def recorder_effect(self) -> float:
        """Return by how much of itself the latency grew under the recorder."""
        return self.traced_latency_s / self.weight.latency_s.value - 1


@dataclass(frozen=True)
class Attribution:
    """Accounts per phase, and one row per kernel and per gap neighbourhood in ``frame`` (table ``attribution``)."""

    accounts: dict[str, PhaseAccount]
    frame: pd.DataFrame
    weighed: Weighed | None
    timeline: Timeline
    host: Weighed | None
    sensor: str
    device: int | None


def attribute(run: RunFolder) -> Attribution:
    """Return the first-form attribution of *run*; an interrupted run gives what its passes allow."""
    device = run.facts["device"]
    index = int(device["index"])
    timeline = build_timeline(run.table("kernels"), run.table("launches"), run.table("ranges"), index)
    host = None
    # RAPL counts packages, not the device that PyTorch names.
    sensor, counted = ("nvml_total", index) if device["kind"] == "cuda" else ("rapl_package", None)
    weighed = weigh_phases(run, sensor, counted)
    if device["kind"] == "cuda" and (run.table("energy", ["sensor"])["sensor"] == "rapl_package").any():
        host = weigh_phases(run, "rapl_package", None)
    limit_mw = device.get("power_limit_mw")
    accounts = {}
    if weighed is not None:
        for phase, weight in weighed.phases.items():
            account = _account(weight, weighed.floor, weighed.temperature_c, timeline, limit_mw)
            if account is not None:
                accounts[phase] = account
    frame = pd.concat(
        [rows for account in accounts.values() for rows in _rows(account, timeline)] or [_empty()], ignore_index=True
    )
    return Attribution(accounts, frame.assign(device=index), weighed, timeline, host, sensor, counted)


def _account(
    weight: PhaseWeight, floor: Floor | None, temperature_c: float | None, timeline: Timeline, limit_mw: int | None
) -> PhaseAccount | None:
    traced = timeline.phases[timeline.phases["phase"] == weight.phase]
    steps = int(traced["tokens"].sum())
    if steps == 0:
        return None
    busy_s = float(traced["busy_ns"].sum()) / 1e9 / steps
    latency = weight.latency_s
    gap_s = combine(max(0.0, latency.value - busy_s), latency.half_width)
    floor_w = floor.at(temperature_c) if floor is not None else None
    kernel_j = gap_j = residual_j = None
    energy = weight.energy_j
    if energy is not None and floor_w is not None:
        gap_j = combine(
            floor_w.value * gap_s.value,
            _product(gap_s.value, floor_w.half_width),
            _product(floor_w.value, gap_s.half_width),
        )
        rest_j = energy.value - gap_j.value
        # No kernel draws less than the idle board or more than the limit; what does not fit stays a residual.
        most_w = np.inf if limit_mw is None else limit_mw / 1e3 * POWER_LIMIT_SLACK
        value = float(np.clip(rest_j, floor_w.value * busy_s, most_w * busy_s))
        kernel_j = combine(value, _spread_of_rest(weight, busy_s, floor_w), _product(gap_s.value, floor_w.half_width))
        residual_j = rest_j - value
    return PhaseAccount(
        weight.phase,
        weight.unit,
        weight,
        float(traced["kernels"].sum()) / steps,
        busy_s,
        gap_s,
        kernel_j,
        gap_j,
        residual_j,
        floor_w,
        float(traced["wall_ns"].sum()) / 1e9 / steps,
    )


def _spread_of_rest(weight: PhaseWeight, busy_s: float, floor_w: Estimate) -> float | None:
    """Return the half-width of the energy above the floor of the gaps, round by round.

    A round that the host slowed down has longer gaps and more energy; what is left for the kernels stays the same.
    """
    rest_j = [
        energy_j - floor_w.value * max(0.0, latency_s - busy_s)
        for energy_j, latency_s in zip(weight.energy_samples_j, weight.latency_samples_s, strict=True)
        if energy_j == energy_j
    ]
    return from_samples(rest_j).half_width


def _product(a: float, b: float | None) -> float | None:
    return None if b is None else a * b


def _rows(account: PhaseAccount, timeline: Timeline) -> list[pd.DataFrame]:
    """Return the phase's kernels by name, its gaps by the kernels around them, and its residual, all per unit."""
    steps = int(timeline.phases.loc[timeline.phases["phase"] == account.phase, "tokens"].sum())
    kernels = timeline.kernels[timeline.kernels["phase"] == account.phase]
    kernels = kernels.assign(duration_ns=kernels["end_ns"] - kernels["start_ns"])
    by_name = _grouped(kernels, ["kind", "name"], steps)
    gaps = timeline.gaps[timeline.gaps["phase"] == account.phase]
    gaps = gaps.assign(kind="gap", name=gaps["before"].astype(str) + " → " + gaps["after"].astype(str))
    by_gap = _grouped(gaps, ["kind", "name"], steps)
    # Weighed gaps also hold the time before the first and after the last kernel, and no recorder.
    if by_gap["duration_ns"].sum() > 0:
        by_gap["duration_ns"] *= account.gap_s.value * 1e9 / by_gap["duration_ns"].sum()
    parts = []
    floor_w = account.floor_w.value if account.floor_w is not None else None
    for rows, total in ((by_name, account.kernel_j), (by_gap, account.gap_j)):
        share = rows["duration_ns"] / max(rows["duration_ns"].sum(), 1.0)
        rows = rows.assign(phase=account.phase, unit=account.unit)
        if total is None or floor_w is None:
            rows = rows.assign(**dict.fromkeys(("floor_j", "dynamic_j", "energy_j", "low_j", "high_j"), np.nan))
        else:
            energy_j = total.value * share
            # Streams that overlap share the floor of the time they share.
            floor_j = energy_j if total is account.gap_j else floor_w * account.busy_s * share
            rows = rows.assign(
                floor_j=floor_j,
                dynamic_j=energy_j - floor_j,
                energy_j=energy_j,
                low_j=np.nan if total.low is None else total.low * share,
                high_j=np.nan if total.high is None else total.high * share,
            )
        parts.append(rows)
    if account.residual_j is not None:
        parts.append(
            pd.DataFrame(
                {
                    "phase": [account.phase],
                    "unit": account.unit,
                    "kind": "residual",
                    "name": "residual",
                    "launches": 0.0,
                    "duration_ns": 0.0,
                    "floor_j": 0.0,
                    "dynamic_j": account.residual_j,
                    "energy_j": account.residual_j,
                    "low_j": np.nan,
                    "high_j": np.nan,
                }
            )
        )
    return parts


def _grouped(rows: pd.DataFrame, keys: list[str], steps: int) -> pd.DataFrame:
    grouped = rows.assign(**{k: rows[k].astype(object) for k in keys}).groupby(keys, sort=False)["duration_ns"]
    frame = grouped.agg(launches="size", duration_ns="sum").reset_index()
    frame["launches"] = frame["launches"].astype(float) / steps
    frame["duration_ns"] = frame["duration_ns"].astype(float) / steps
    return frame.sort_values("duration_ns", ascending=False)


def _empty() -> pd.DataFrame:
    from llmkern.run import TABLES

    return TABLES["attribution"].empty_table().to_pandas()
