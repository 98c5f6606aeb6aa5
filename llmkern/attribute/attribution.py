"""Where the joules of a run went: accounts per phase, and a row per kernel and per gap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from llmkern.attribute.account import PhaseAccount, account_phase
from llmkern.attribute.identify import NONE, UNIDENTIFIED, Identified, identify
from llmkern.attribute.joules import EqualPower, without_energy
from llmkern.attribute.marginal import Marginals
from llmkern.attribute.replayed import Evidence, by_marginals, gather
from llmkern.attribute.timeline import Timeline, build_timeline
from llmkern.attribute.weighed import Weighed, weigh_phases
from llmkern.explain.causes import gap_causes
from llmkern.explain.kinds import kinds
from llmkern.run import TABLES, RunFolder


@dataclass(frozen=True)
class Attribution:
    """Accounts per phase, and one row per kernel and per gap neighbourhood in ``frame`` (table ``attribution``).

    ``kernels`` are those of the timeline with the signature, op, module and shapes that launched them (UNIDENTIFIED
    and "" where that is not known), ``marginals`` the joules per launch where operators were replayed, from
    ``evidence``.
    """

    run: RunFolder

    accounts: dict[str, PhaseAccount]
    frame: pd.DataFrame
    weighed: Weighed | None
    timeline: Timeline
    kernels: pd.DataFrame
    identified: Identified | None
    marginals: Marginals | None
    evidence: Evidence | None
    host: Weighed | None
    sensor: str
    device: int | None

    @cached_property
    def gaps(self) -> pd.DataFrame:
        """Return the gaps of the pass that recorded host calls, with cause, and op and module of what ended them.

        Empty where no host call was recorded.
        """
        return _explained_gaps(self.run, int(self.run.facts["device"]["index"]))

    def split(self, phase: str, keys: list[str]) -> pd.DataFrame:
        """Return *keys* (columns of ``kernels``), launches, duration_ns and energies per unit of *phase*.

        The longest comes first; the number of a layer is written as ``*``.
        """
        return _split(self.accounts[phase], _per_unit(self.kernels, self.timeline, phase), keys)

    def split_gaps(self, phase: str, keys: list[str]) -> pd.DataFrame:
        """Return *keys* (columns of ``gaps``), launches (their count), duration_ns and energies per unit of *phase*.

        Counts are those of the traced pass; times are scaled to the weighed gap time, which no recorder has lengthened.
        """
        rows = self.gaps[self.gaps["phase"] == phase]
        return _gaps_at_floor(self.accounts[phase], rows.assign(launches=rows["launches"] / rows["units"]), keys)


def attribute(run: RunFolder, *, equal_power: bool = False) -> Attribution:
    """Return the attribution of *run*; an interrupted run gives what its passes allow.

    Kernels have their marginal joules where operators were replayed, otherwise, or if asked for, equal power.
    """
    device = run.facts["device"]
    index = int(device["index"])
    timeline = build_timeline(run.table("kernels"), run.table("launches"), run.table("ranges"), index)
    host = None
    # RAPL counts packages, not the device that PyTorch names.
    sensor, counted = ("nvml_total", index) if device["kind"] == "cuda" else ("rapl_package", None)
    weighed = weigh_phases(run, sensor, counted)
    if device["kind"] == "cuda" and (run.table("energy", ["sensor"])["sensor"] == "rapl_package").any():
        host = weigh_phases(run, "rapl_package", None)
    accounts = {}
    if weighed is not None:
        for phase, weight in weighed.phases.items():
            account = account_phase(
                weight, weighed.floor, weighed.temperature_c, timeline, device.get("power_limit_mw")
            )
            if account is not None:
                accounts[phase] = account
    identified = identify(run, timeline, index) if run.has("ops") else None
    kernels = _described(run, timeline, identified)
    kernels = kernels.assign(kind=kinds(kernels))
    marginals = evidence = None
    if weighed is not None and not equal_power:
        limit_mw = device.get("power_limit_mw")
        limit_w = math.inf if limit_mw is None else limit_mw / 1e3
        evidence = gather(run, weighed, accounts, timeline, kernels, (sensor, counted), limit_w)
        if evidence is not None:
            marginals, joules = by_marginals(evidence, weighed, accounts)
            accounts = {phase: account.by(joules[phase]) for phase, account in accounts.items()}
    rows = [part for account in accounts.values() for part in _rows(account, timeline, kernels)]
    frame = pd.concat(rows or [TABLES["attribution"].empty_table().to_pandas()], ignore_index=True)
    return Attribution(
        run,
        accounts,
        frame.assign(device=index),
        weighed,
        timeline,
        kernels,
        identified,
        marginals,
        evidence,
        host,
        sensor,
        counted,
    )


def _described(run: RunFolder, timeline: Timeline, identified: Identified | None) -> pd.DataFrame:
    kernels = timeline.kernels.reset_index(drop=True)
    duration_ns = (kernels["end_ns"] - kernels["start_ns"]).astype(float)
    kernels = kernels.assign(duration_ns=duration_ns, launches=1.0)
    if identified is None:
        row, ops = np.full(len(kernels), NONE), pd.DataFrame(columns=["op", "module", "signature", "shapes"])
    else:
        row, ops = identified.op, run.table("ops", ["op", "module", "signature", "shapes"])
    # The layers of a model differ in nothing but their number.
    modules = ops["module"].astype(object).fillna("").astype(str).str.replace(r"\.\d+(?=\.|$)", ".*", regex=True)
    return kernels.assign(
        op_index=row,
        signature=_looked_up(ops["signature"], row, UNIDENTIFIED),
        op=_looked_up(ops["op"], row, UNIDENTIFIED),
        module=_looked_up(modules, row, ""),
        shapes=_looked_up(ops["shapes"], row, ""),
    )


def _looked_up(values: pd.Series, row: np.ndarray, missing: str) -> pd.Categorical:
    """Return the value of each *row*, *missing* for NONE; a run repeats few values very often, so as categories."""
    names = [missing, *(str(v) for v in values.astype(object).fillna(missing))]
    codes, categories = pd.factorize(np.array(names, object))
    return pd.Categorical.from_codes(codes[row + 1], categories=pd.Index(categories))


def _per_unit(rows: pd.DataFrame, timeline: Timeline, phase: str) -> pd.DataFrame:
    """Return the *rows* of *phase* with launches and duration_ns divided by how many units of it were traced."""
    units = max(1, int(timeline.phases.loc[timeline.phases["phase"] == phase, "tokens"].sum()))
    chosen = rows[rows["phase"] == phase]
    return chosen.assign(launches=chosen["launches"] / units, duration_ns=chosen["duration_ns"] / units)


def _split(account: PhaseAccount, rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    if account.joules is None:
        return without_energy(rows, keys)
    return account.joules.split(rows, keys)


def _rows(account: PhaseAccount, timeline: Timeline, kernels: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the phase's kernels by name, its gaps by the kernels around them, and its residual, all per unit."""
    by_name = _split(account, _per_unit(kernels, timeline, account.phase), ["kind", "name"])
    gaps = timeline.gaps.assign(launches=1.0, kind="gap")
    by_gap = _gaps_at_floor(account, _per_unit(gaps, timeline, account.phase), ["kind", "before", "after"])
    by_gap["name"] = by_gap["before"].astype(str) + " → " + by_gap["after"].astype(str)
    parts = [by_name, by_gap.drop(columns=["before", "after"])]
    if account.residual_j is not None:
        residual = {"kind": "residual", "name": "residual", "launches": 0.0, "duration_ns": 0.0, "floor_j": 0.0}
        residual |= {"dynamic_j": account.residual_j, "energy_j": account.residual_j, "low_j": np.nan, "high_j": np.nan}
        parts.append(pd.DataFrame([residual]))
    return [part.assign(phase=account.phase, unit=account.unit) for part in parts]


def _gaps_at_floor(account: PhaseAccount, rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return gaps summed over *keys*: time scaled to the weighed gap time, energy at the floor."""
    if account.gap_j is None or account.floor_w is None:
        by_gap = without_energy(rows, keys)
    else:
        # An idle device draws the same power everywhere.
        by_gap = EqualPower(account.gap_j, account.floor_w.value, account.gap_s.value).split(rows, keys)
    # Weighed gaps also hold the time before the first and after the last kernel, and no recorder.
    if by_gap["duration_ns"].sum() > 0:
        by_gap["duration_ns"] *= account.gap_s.value * 1e9 / by_gap["duration_ns"].sum()
    return by_gap


def _explained_gaps(run: RunFolder, device: int) -> pd.DataFrame:
    """Return the gaps of the pass with host calls: cause, api, op, module, launches (1) and units of the phase."""
    launches = run.table("launches")
    passes = set(launches["pass"].astype(str))
    # Runs recorded before pass *calls* existed have the host's calls in pass *time*.
    pass_name = next((name for name in ("calls", "time") if name in passes), None)
    columns = ["cause", "api", "op", "module", "launches", "units"]
    if pass_name is None:
        return pd.DataFrame(columns=["phase", "duration_ns", *columns])
    ranges = run.table("ranges")
    timeline = build_timeline(run.table("kernels"), launches, ranges, device, pass_name)
    identified = identify(run, timeline, device) if run.has("ops") else None
    kernels = _described(run, timeline, identified)
    gaps = gap_causes(timeline, launches, ranges, run.table("overheads"), pass_name)
    ended_by = gaps["kernel"].to_numpy() if len(gaps) else np.empty(0, int)
    units = timeline.phases.groupby("phase")["tokens"].sum()
    return gaps.assign(
        op=kernels["op"].to_numpy()[ended_by],
        module=kernels["module"].to_numpy()[ended_by],
        launches=1.0,
        units=gaps["phase"].map(units).astype(float).clip(lower=1.0),
    )
