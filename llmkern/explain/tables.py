"""Every table of a run, and the rows of them that a report shows, energies and times per unit of the phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.split.account import PhaseAccount
from llmkern.explain import Explanation
from llmkern.explain.devices import devices_table

_NUMBERS = ["launches", "each_s", "time_s", "energy_j", "low_j", "high_j", "share"]


def run_tables(explanation: Explanation) -> dict[str, pd.DataFrame]:
    """Return the tables of a run by name; energies are NaN where they are not known."""
    attribution = explanation.attribution
    found = {}
    splits = {"kinds": ["kind"], "kernels": ["kind", "name"], "operators": ["kind", "op", "module"]}
    for name, keys in splits.items():
        found[name] = _per_phase(attribution, partial(attribution.split, keys=keys))
    if len(attribution.gaps):
        for name, keys in {"causes": ["cause"], "gaps": ["cause", "kind", "op", "module"]}.items():
            found[name] = _per_phase(attribution, partial(attribution.split_gaps, keys=keys))
    layers = _per_phase(attribution, lambda phase: attribution.split(phase, ["layer", "kind"]))
    found["layers"] = layers[layers["layer"].notna()] if len(layers) else layers
    if attribution.host_trace is not None:
        calls = attribution.host_trace.tally
        found["host_calls"] = (
            calls.groupby(["phase", "api", "waits", "op", "module"], sort=False, observed=True)[
                ["launches", "duration_ns"]
            ]
            .sum()
            .reset_index()
        )
    found["devices"] = devices_table(attribution)
    found["roofline"] = _per_phase(attribution, lambda phase: explanation.roofs[phase])
    return found


def _per_phase(attribution: Attribution, of: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
    parts = [of(phase) for phase in attribution.accounts]
    tables = [part.assign(phase=phase) for phase, part in zip(attribution.accounts, parts, strict=True)]
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    return table[["phase", *(c for c in table.columns if c != "phase")]]


def shown_tables(attribution: Attribution, top: int) -> dict[str, pd.DataFrame]:
    """Return what a report shows of each phase: all kinds and causes, the *top* kernels, gaps and operators.

    Columns: phase, those that name a row, others (how many rows are summed in the last one, else 0), launches, each_s,
    time_s, energy_j with low_j and high_j, and share: of the phase's energy, or of its time where it has no energy.
    """
    accounts = list(attribution.accounts.values())
    caused = len(attribution.gaps) > 0
    located = attribution.identified is not None

    def per_phase(rows: Callable[[PhaseAccount], pd.DataFrame], view: _View) -> pd.DataFrame:
        parts = [_shown(rows(account), account, view) for account in accounts]
        return (
            pd.concat(parts, ignore_index=True)
            if parts
            else pd.DataFrame(columns=["phase", *view.names, "others", *_NUMBERS])
        )

    def between(account: PhaseAccount) -> pd.DataFrame:
        frame = attribution.frame
        return frame.loc[(frame["phase"] == account.phase) & (frame["kind"] == "gap")]

    found = {"kinds": per_phase(lambda a: attribution.split(a.phase, ["kind"]), _View(["kind"]))}
    if caused:
        found["causes"] = per_phase(lambda a: attribution.split_gaps(a.phase, ["cause"]), _View(["cause"], gaps=True))
    found["kernels"] = per_phase(lambda a: attribution.split(a.phase, ["name"]), _View(["name"], top))
    for i in found["kernels"].index[found["kernels"]["others"] > 0]:
        # The interval of a sum is that of its draws, not the sum of intervals.
        own = found["kernels"][found["kernels"]["phase"] == found["kernels"].loc[i, "phase"]]
        rest = partial(_other_than, names=list(own["name"].dropna()))
        joule, _ = attribution.cost(str(own["phase"].iloc[0]), kernels=rest)
        if joule is not None and joule.low is not None:
            found["kernels"].loc[i, ["low_j", "high_j"]] = [joule.low, joule.high]
    if caused and located:
        keys = ["cause", "op", "module"]
        found["gaps"] = per_phase(
            lambda a: attribution.split_gaps(a.phase, keys), _View(keys, top, others=False, gaps=True)
        )
    else:
        found["gaps"] = per_phase(between, _View(["name"], top, gaps=True))
    if located:
        keys = ["op", "module"]
        found["operators"] = per_phase(lambda a: attribution.split(a.phase, keys), _View(keys, top, others=False))
    return found


def _other_than(rows: pd.DataFrame, names: list[str]) -> pd.Series:
    return ~rows["name"].isin(names)


@dataclass(frozen=True)
class _View:
    """Rows called *names*: the largest *most* of them (None: all) and, if wanted, the sum of the *others*."""

    names: list[str]
    most: int | None = None
    others: bool = True
    gaps: bool = False


def _shown(rows: pd.DataFrame, account: PhaseAccount, view: _View) -> pd.DataFrame:
    by = "energy_j" if account.joules is not None else "duration_ns"
    rows = rows.sort_values(by, ascending=False, kind="stable").assign(others=0)
    busy_s = 0.0 if view.gaps else float(rows["duration_ns"].sum()) / 1e9
    if view.most is not None and len(rows) > view.most:
        rest = rows.iloc[view.most :]
        rows = rows.head(view.most)
        if view.others:
            # Ends of intervals are added as if all erred alike: so gaps do.
            sums = rest[["launches", "duration_ns", "energy_j", "low_j", "high_j"]].sum(min_count=1).to_dict()
            rows = pd.concat([rows, pd.DataFrame([{**sums, "others": len(rest)}])], ignore_index=True)
    energy = account.weight.energy_j
    time_s = rows["duration_ns"] / 1e9
    with np.errstate(divide="ignore", invalid="ignore"):
        each_s = (time_s / rows["launches"]).where(rows["launches"] > 0)
    known = energy is not None and account.joules is not None
    # Kernels that ran at the same time share it: together they are as long as the device was busy.
    overlap = min(1.0, account.busy_s / max(busy_s, 1e-12))
    numbers: dict[str, Any] = {
        "launches": rows["launches"],
        "each_s": each_s,
        "time_s": time_s,
        "energy_j": rows["energy_j"] if known else np.nan,
        "low_j": rows["low_j"] if known else np.nan,
        "high_j": rows["high_j"] if known else np.nan,
        "share": rows["energy_j"] / energy.value
        if known and energy is not None
        else time_s * overlap / account.latency_s,
    }
    named = {name: rows[name].astype(object) for name in view.names}
    frame = pd.DataFrame({"phase": account.phase, **named, "others": rows["others"], **numbers})
    return frame.reset_index(drop=True)
