"""Where the joules of a run went: accounts per phase, and a row per kernel and per gap."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.energy.memory import memory_energy
from llmkern.attribute.energy.phases import PhaseWeight, Weighed, traced_phases, weigh_phases
from llmkern.attribute.split.account import PhaseAccount, account_phase
from llmkern.attribute.split.closure import Closure, closures
from llmkern.attribute.split.estimator import Marginals
from llmkern.attribute.split.evidence import Evidence, Work, by_marginals, gather
from llmkern.attribute.split.kernel_classes import kernel_classes, launched_by
from llmkern.attribute.split.kernel_joules import EqualPower, without_energy
from llmkern.attribute.time.host_calls import HostTrace, host_of, read_host
from llmkern.attribute.time.operators import Identified, Inspected, identify, read_inspected
from llmkern.attribute.time.per_unit import OP_COLUMNS, operators, tally_kernels, tally_neighbours
from llmkern.attribute.time.recorder_effect import recorder_effects
from llmkern.attribute.time.stretch import without_recorder
from llmkern.attribute.time.timeline import Timeline, read_timeline
from llmkern.estimate import Estimate
from llmkern.runfolder import RunFolder
from llmkern.runfolder.schema import TABLES
from llmkern.runfolder.vocabulary import RAPL_COUNTER

# Returns which of some rows are meant.
Chosen = Callable[[pd.DataFrame], Any]
# Rows with energies, and the draws of these, None where there is no interval.
Drawn = tuple[pd.DataFrame, np.ndarray | None]
# From so many kernels on the host's calls are worked on beside the rest.
_MANY = 500_000


@dataclass(frozen=True)
class Attribution:
    """Accounts per phase, and what their kernels and gaps are.

    ``kernels`` are those of one unit of each phase, summed by name and operator (see tally_kernels), ``ops`` the
    operators behind them (see operators), ``marginals`` the joules per launch where operators were replayed,
    from ``evidence``.
    """

    run: RunFolder
    accounts: dict[str, PhaseAccount]
    weighed: Weighed | None
    timeline: Timeline
    kernels: pd.DataFrame
    ops: pd.DataFrame
    inspected: Inspected | None
    identified: Identified | None
    marginals: Marginals | None
    evidence: Evidence | None
    host: Weighed | None
    sensor: str
    device: int | None
    # Returns what the host did in pass *calls*.
    called: Callable[[], HostTrace | None]
    # What was made of it already: splits, roofs. Frames in here are handed out as copies.
    memo: dict[Any, pd.DataFrame] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: tuple[Any, ...], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Return a copy of what *make* returns; it is called the first time that *key* is asked for."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key].copy(deep=False)

    @property
    def only_weighed(self) -> list[PhaseWeight]:
        """Return the phases that were weighed and have no account, for the timeline holds no whole one of them."""
        phases = self.weighed.phases if self.weighed is not None else {}
        return [weight for phase, weight in phases.items() if phase not in self.accounts]

    @cached_property
    def host_trace(self) -> HostTrace | None:
        """Return what the host did, None where no host call was recorded."""
        return self.called() or host_of(self.run, self.timeline, self.identified, self.ops)

    @cached_property
    def memory(self) -> dict[str, Estimate]:
        """Return the J of the device's memory per unit of each phase (see memory_energy)."""
        return {} if self.weighed is None else memory_energy(self.run, self.weighed, self.device)

    @cached_property
    def closures(self) -> dict[str, Closure]:
        """Return what replays alone say of each phase against the counter; empty without replays."""
        if self.evidence is None or self.weighed is None:
            return {}
        return closures(self.evidence, self.weighed, self.accounts)

    @cached_property
    def devices(self) -> int:
        """Return on how many devices kernels ran."""
        return int(self.run.table("kernels", ["device"])["device"].nunique())

    @cached_property
    def gaps(self) -> pd.DataFrame:
        """Return the gaps of one unit of each phase by cause and operator (see tally_gaps); empty without calls.

        They are as long as in the weighed run.
        """
        if self.host_trace is not None:
            return without_recorder(self.host_trace.gaps, self._gap_s)
        return pd.DataFrame(columns=["phase", "cause", "kind", "op", "module", "layer", "launches", "duration_ns"])

    @property
    def _gap_s(self) -> dict[str, float]:
        return {phase: account.gap_s.value for phase, account in self.accounts.items()}

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Return a row per kernel name, gap neighbourhood and residual of one unit of each phase."""
        neighbours = without_recorder(tally_neighbours(self.timeline), self._gap_s)
        rows = [part for account in self.accounts.values() for part in _rows(account, self.kernels, neighbours)]
        frame = pd.concat(rows or [TABLES["attribution"].empty_table().to_pandas()], ignore_index=True)
        return frame.assign(device=self.run.facts.device.index)

    def kernels_of(self, phase: str) -> pd.DataFrame:
        """Return the rows of ``kernels`` of *phase*."""
        return self.once(("rows", phase), lambda: self.kernels[self.kernels["phase"] == phase])

    def gaps_of(self, phase: str) -> pd.DataFrame:
        """Return the rows of ``gaps`` of *phase*."""
        return self.once(("gap rows", phase), lambda: self.gaps[self.gaps["phase"] == phase])

    def split(self, phase: str, keys: list[str]) -> pd.DataFrame:
        """Return *keys* (columns of ``kernels``), launches, duration_ns and energies per unit of *phase*.

        The longest comes first; the number of a layer is written as ``*``.
        """
        return self.once(("kernels", phase, *keys), lambda: self.drawn(phase, keys)[0])

    def drawn(self, phase: str, keys: list[str]) -> Drawn:
        """Return what split does, and the draws of its energies [rows, DRAWS]."""
        return _split(self.accounts[phase], self.kernels_of(phase), keys)

    def cost(
        self, phase: str, kernels: Chosen | None = None, gaps: Chosen | None = None
    ) -> tuple[Estimate | None, float]:
        """Return J (None without energy) and seconds per unit of *phase* of the chosen kernels and gaps together.

        *kernels* and *gaps* return which rows of ``kernels`` and ``gaps`` are meant.
        """
        account = self.accounts[phase]
        parts: list[Estimate] = []
        time_s = 0.0
        if kernels is not None:
            rows = self.kernels_of(phase)
            chosen = np.asarray(kernels(rows), bool)
            time_s += float(rows["duration_ns"].to_numpy()[chosen].sum()) / 1e9 * account.traced_scale
            if account.joules is not None:
                parts.append(account.joules.of(rows, chosen))
        if gaps is not None and len(self.gaps):
            rows = self.gaps_of(phase)
            chosen = np.asarray(gaps(rows), bool)
            share = float(rows["duration_ns"].to_numpy()[chosen].sum()) / max(float(rows["duration_ns"].sum()), 1e-9)
            time_s += share * account.gap_s.value
            if account.gap_j is not None:
                parts.append(account.gap_j.scaled(share))
        if account.joules is None or account.weight.energy_j is None or not parts:
            return None, time_s
        return reduce(Estimate.__add__, parts).within(account.weight.energy_j), time_s

    def table(self) -> pd.DataFrame:
        """Return table ``attribution``: a row per kernel, gap and residual of one unit of each phase.

        *part* is kernels, gaps or residual; *kind*, *op*, *module* and *name* are those of the kernel, for a gap of
        the one that ended it, and *cause* is the gap's. Sums of energy_j over parts, kinds and causes are those of a
        report.
        """
        parts = [self._rows_of(phase) for phase in self.accounts]
        frame = pd.concat(parts or [TABLES["attribution"].empty_table().to_pandas()], ignore_index=True)
        return frame.assign(device=self.run.facts.device.index)

    def _rows_of(self, phase: str) -> pd.DataFrame:
        account = self.accounts[phase]
        parts = [self.split(phase, ["kind", "op", "module", "name"]).assign(part="kernels", cause=None)]
        if len(self.gaps):
            gaps = self.split_gaps(phase, ["cause", "kind", "op", "module", "name"])
        else:
            own = self.frame[(self.frame["phase"] == phase) & (self.frame["kind"] == "gap")]
            gaps = own.drop(columns=["phase", "unit"]).assign(
                cause="unknown", kind=None, op=None, module=None, name=own["name"].astype(str).str.split(" → ").str[-1]
            )
        parts.append(gaps.assign(part="gaps"))
        rest = self.frame[(self.frame["phase"] == phase) & (self.frame["kind"] == "residual")]
        rest = rest.drop(columns=["phase", "unit"])
        parts.append(rest.assign(part="residual", cause=None, op=None, module=None))
        return pd.concat([p for p in parts if len(p)], ignore_index=True).assign(phase=phase, unit=account.unit)

    def split_gaps(self, phase: str, keys: list[str]) -> pd.DataFrame:
        """Return *keys* (columns of ``gaps``), launches (their count), duration_ns and energies per unit of *phase*.

        Counts are those of the traced pass; times add up to the weighed gap time, which no recorder has lengthened.
        """
        return self.once(("gaps", phase, *keys), lambda: self.drawn_gaps(phase, keys)[0])

    def drawn_gaps(self, phase: str, keys: list[str]) -> Drawn:
        """Return what split_gaps does, and the draws of its energies [rows, DRAWS]."""
        return _gaps_at_floor(self.accounts[phase], self.gaps_of(phase), keys)


def attribute(run: RunFolder, *, equal_power: bool = False) -> Attribution:
    """Return the attribution of *run*; an interrupted run gives what its passes allow.

    Kernels have their marginal joules where operators were replayed, otherwise, or if asked for, equal power.
    """
    device = run.facts.device
    index = device.index
    beside = ThreadPoolExecutor(1)
    # The two large tables at the same time; whoever needs one first waits for it, or is told what is wrong with it.
    beside.submit(run.table, "launches", ["pass"])
    inspected = read_inspected(run, index)
    ops = operators(run.table("ops", OP_COLUMNS))
    called: Callable[[], HostTrace | None] = partial(read_host, run, inspected, ops)
    if len(run.table("kernels", ["pass"])) >= _MANY:
        called = beside.submit(called).result
    beside.shutdown(wait=False)
    timeline = read_timeline(run, index)
    host = None
    sensor, counted = device.counter, device.counted
    weighed = weigh_phases(run, sensor, counted)
    if sensor != RAPL_COUNTER and (run.table("energy", ["sensor"])["sensor"] == RAPL_COUNTER).any():
        host = weigh_phases(run, RAPL_COUNTER, None)
    effects = recorder_effects(run)
    accounts = {}
    weights = weighed.phases if weighed is not None else {}
    if weighed is None and run.facts.imported is not None:
        weights = traced_phases(timeline)
    for phase, weight in weights.items():
        floor_w = weighed.floor_of(phase) if weighed is not None else None
        account = account_phase(weight, floor_w, timeline, device.power_limit_mw)
        if account is not None and weighed is None:
            # Nothing else was measured that the capture could be longer than.
            account = replace(account, traced_latency_s=weight.latency_s.value)
        if account is not None:
            accounts[phase] = replace(account, recorder_effect=effects.get(phase))
    identified = identify(inspected, timeline) if inspected is not None else None
    kernels = tally_kernels(timeline, identified, ops)
    marginals = evidence = None
    if weighed is not None and not equal_power:
        launched = launched_by(inspected, ops)
        kernels["kernel_class"] = kernel_classes(kernels, launched)
        work = Work(kernels, ops, launched, device.multiprocessors)
        evidence = gather(run, weighed, accounts, work, (sensor, counted))
        if evidence is not None:
            marginals, joules = by_marginals(evidence, weighed, accounts)
            accounts = {p: account.by(joules[p], marginals.host_w.get(p)) for p, account in accounts.items()}
    return Attribution(
        run,
        accounts,
        weighed,
        timeline,
        kernels,
        ops,
        inspected,
        identified,
        marginals,
        evidence,
        host,
        sensor,
        counted,
        called,
    )


def _split(account: PhaseAccount, rows: pd.DataFrame, keys: list[str]) -> Drawn:
    drawn = (without_energy(rows, keys), None) if account.joules is None else account.joules.drawn(rows, keys)
    frame, draws = drawn
    # Shares are those of the traced run, lengths fit into the weighed one.
    frame["duration_ns"] *= account.traced_scale
    return frame, draws


def _rows(account: PhaseAccount, kernels: pd.DataFrame, neighbours: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the phase's kernels by name, its gaps by the kernels around them, and its residual, all per unit."""
    by_name, _ = _split(account, kernels[kernels["phase"] == account.phase], ["kind", "name"])
    gaps = neighbours[neighbours["phase"] == account.phase].assign(kind="gap")
    by_gap, _ = _gaps_at_floor(account, gaps, ["kind", "before", "after"])
    by_gap["name"] = by_gap["before"].astype(str) + " → " + by_gap["after"].astype(str)
    parts = [by_name, by_gap.drop(columns=["before", "after"])]
    if account.residual_j is not None:
        residual = {"kind": "residual", "name": "residual", "launches": 0.0, "duration_ns": 0.0, "floor_j": 0.0}
        residual |= {"dynamic_j": account.residual_j, "energy_j": account.residual_j, "low_j": np.nan, "high_j": np.nan}
        parts.append(pd.DataFrame([residual]))
    return [part.assign(phase=account.phase, unit=account.unit) for part in parts]


def _gaps_at_floor(account: PhaseAccount, rows: pd.DataFrame, keys: list[str]) -> Drawn:
    """Return gaps summed over *keys*: times as weighed, energy at the floor."""
    if account.gap_j is None or account.floor_w is None:
        by_gap, draws = without_energy(rows, keys), None
    else:
        # An idle device draws the same power everywhere, and what its host adds is known of all gaps together.
        by_gap, draws = EqualPower(account.gap_j, account.floor_w, account.gap_s.value).drawn(rows, keys)
    return by_gap, draws
