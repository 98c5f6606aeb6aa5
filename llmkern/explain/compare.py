"""Where the difference between two runs went: per token, by phase, kind of kernel and cause of gap, and by module."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.split.account import PhaseAccount
from llmkern.errors import UsageError
from llmkern.estimate import Estimate
from llmkern.explain.whatif import Prediction, predict

NOT_DISTINGUISHABLE = "not distinguishable"


@dataclass(frozen=True)
class Checked:
    """A *prediction* of the first run beside what the second run measured, both per unit of the phase.

    The errors are predicted / measured - 1; None where there is no energy.
    """

    prediction: Prediction
    latency_s: Estimate
    energy_j: Estimate | None

    @property
    def latency_error(self) -> float:
        return self.prediction.latency_s.value / self.latency_s.value - 1

    @property
    def energy_error(self) -> float | None:
        if self.prediction.energy_j is None or self.energy_j is None:
            return None
        return self.prediction.energy_j.value / self.energy_j.value - 1


@dataclass(frozen=True)
class Difference:
    """One phase of two runs, *per* token (decode: generated, prefill: of the prompts without padding).

    Where one of the runs does not say how many tokens a unit has, everything is per unit.

    ``bars`` has part (kernels, gaps or residual), name (kind or cause), before_j, after_j, change_j with low_j and
    high_j, before_s, after_s, change_s, launches_before, launches_after and verdict (more, less, not distinguishable,
    or unknown where there is no interval); its changes add up to those of the whole.
    ``work`` has gaps by the kind of kernel that ended them instead of by cause, ``modules`` kinds and causes by module:
    it is empty where a run lacks operators, and *missing* says so. Energies are NaN where a run has none.
    """

    phase: str
    per: str
    before_s: Estimate
    after_s: Estimate
    before_j: Estimate | None
    after_j: Estimate | None
    bars: pd.DataFrame
    work: pd.DataFrame
    modules: pd.DataFrame
    checked: Checked | None
    missing: tuple[str, ...] = ()

    @property
    def ratio_s(self) -> float:
        """Return the time of the second run in times of the first."""
        return self.after_s.value / self.before_s.value

    @property
    def ratio_j(self) -> float:
        """Return the energy of the second run in times of the first, NaN where one has none."""
        if self.before_j is None or self.after_j is None:
            return float("nan")
        return self.after_j.value / self.before_j.value


def compare(before: Attribution, after: Attribution, against: str | None = None) -> list[Difference]:
    """Return the difference of each phase that both runs have, decode first.

    With *against* the first run's prediction of that name is checked. Raises UsageError when nothing can be compared or
    the first run has no such prediction.
    """
    shared = [phase for phase in before.accounts if phase in after.accounts]
    if not shared:
        raise UsageError(
            "These two runs share no phase with both a weighed window and a timeline: compare complete runs, or trace "
            "the incomplete one again."
        )
    predictions: dict[str, Prediction] = {}
    if against is not None:
        made = predict(before)
        predictions = {p.phase: p for p in made if p.name == against}
        if not predictions:
            names = ", ".join(dict.fromkeys(p.name for p in made)) or "none, as it recorded no host calls"
            raise UsageError(f"The first run predicts nothing called {against}; it predicts: {names}.")
    return [_difference(before, after, phase, predictions.get(phase)) for phase in reversed(shared)]


def tokens(attribution: Attribution, account: PhaseAccount) -> int | None:
    """Return how many tokens a unit of the phase of *account* stands for, None where nothing says so."""
    facts = attribution.run.facts
    if facts.imported is not None and not facts.energy_of:
        return None
    if account.unit == "call":
        return (sum(facts.prompts.effective_tokens) or None) if facts.prompts is not None else None
    return facts.options.batch if account.unit == "token" else None


def _difference(before: Attribution, after: Attribution, phase: str, prediction: Prediction | None) -> Difference:
    first, second = before.accounts[phase].weight, after.accounts[phase].weight
    counts = [tokens(a, a.accounts[phase]) for a in (before, after)]
    per = "token" if all(counts) else after.accounts[phase].unit
    scale = [1 / count if count and per == "token" else 1.0 for count in counts]
    checked = None if prediction is None else Checked(prediction, second.latency_s, second.energy_j)

    caused = all(len(a.gaps) for a in (before, after))
    operators = all(a.identified is not None for a in (before, after))
    missing = []
    if not caused:
        missing.append("One of the runs recorded no host calls: its gaps have no cause, so all gaps are one row.")
    if not operators:
        missing.append("One of the runs has no operators (pass inspect): nothing can be compared by module.")

    def view(kernel_keys: list[str], gap_keys: list[str]) -> pd.DataFrame:
        sides = zip((before, after), scale, strict=True)
        return _joined(*(_parts(a, phase, (kernel_keys, gap_keys), caused, s) for a, s in sides))

    modules = view(["kind", "module"], ["cause", "module"])

    return Difference(
        phase,
        per,
        first.latency_s.scaled(scale[0]),
        second.latency_s.scaled(scale[1]),
        None if first.energy_j is None else first.energy_j.scaled(scale[0]),
        None if second.energy_j is None else second.energy_j.scaled(scale[1]),
        view(["kind"], ["cause"]),
        view(["kind"], ["kind"]),
        modules if operators else modules.iloc[:0],
        checked,
        tuple(missing),
    )


def _parts(
    attribution: Attribution, phase: str, by: tuple[list[str], list[str]], caused: bool, scale: float
) -> pd.DataFrame:
    """Return kernels and gaps (by cause if *caused*) *by* their keys and the residual, of a unit times *scale*.

    Columns: j, below_j and above_j (to the ends of its interval), s and launches.
    """
    account = attribution.accounts[phase]
    kernel_keys, gap_keys = by
    kernels = attribution.split(phase, kernel_keys).assign(part="kernels")
    if caused:
        gaps = attribution.split_gaps(phase, gap_keys).assign(part="gaps")
    else:
        # Without host calls all that is known of the gaps is their sum.
        gap_j = account.gap_j
        row = {
            "cause": "unknown",
            "kind": "unknown",
            "module": "",
            "launches": np.nan,
            "duration_ns": account.gap_s.value * 1e9,
        }
        ends = (np.nan,) * 3 if gap_j is None else (gap_j.value, gap_j.low, gap_j.high)
        gaps = pd.DataFrame([{**row, **dict(zip(("energy_j", "low_j", "high_j"), ends, strict=True)), "part": "gaps"}])
        gaps = gaps[[*gap_keys, "launches", "duration_ns", "energy_j", "low_j", "high_j", "part"]]
    kernels = kernels.rename(columns={"kind": "name"})
    gaps = gaps.rename(columns={gap_keys[0]: "name"})
    rows = pd.concat([kernels, gaps], ignore_index=True)
    rest = {"part": "residual", "name": "residual", "module": "", "launches": np.nan, "duration_ns": 0.0}
    residual_j = np.nan if account.residual_j is None else account.residual_j
    # Kernels that overlap are longer together than the device was busy.
    rest_ns = (account.weight.latency_s.value - account.gap_s.value) * 1e9 - float(kernels["duration_ns"].sum())
    rest |= {"energy_j": residual_j, "low_j": residual_j, "high_j": residual_j, "duration_ns": rest_ns}
    rows = pd.concat([rows, pd.DataFrame([rest])], ignore_index=True)
    keys = ["part", "name", *(["module"] if "module" in kernel_keys else [])]
    return pd.DataFrame(
        {
            **{key: rows[key].astype(object) for key in keys},
            "j": rows["energy_j"].astype(float) * scale,
            "below_j": (rows["energy_j"].astype(float) - rows["low_j"].astype(float)) * scale,
            "above_j": (rows["high_j"].astype(float) - rows["energy_j"].astype(float)) * scale,
            "s": rows["duration_ns"].astype(float) / 1e9 * scale,
            "launches": rows["launches"].astype(float) * scale,
        }
    )


def _joined(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    keys = [key for key in ("part", "name", "module") if key in before]
    sides = [frame.groupby(keys, dropna=False, sort=False).sum(min_count=1) for frame in (before, after)]
    both = sides[0].join(sides[1], how="outer", lsuffix="_before", rsuffix="_after")
    has_energy = not (before["j"].isna().all() or after["j"].isna().all())
    # What one run does not have costs nothing there; what it has without an interval has none in the difference.
    there = {side: both[f"s_{side}"].notna() for side in ("before", "after")}
    filled = both.apply(lambda column: column.where(there[str(column.name).rpartition("_")[2]], 0.0))
    change_j = filled["j_after"] - filled["j_before"]
    below = np.hypot(filled["below_j_after"], filled["above_j_before"])
    above = np.hypot(filled["above_j_after"], filled["below_j_before"])
    frame = pd.DataFrame(
        {
            "before_j": filled["j_before"],
            "after_j": filled["j_after"],
            "change_j": change_j,
            "low_j": change_j - below,
            "high_j": change_j + above,
            "before_s": filled["s_before"],
            "after_s": filled["s_after"],
            "change_s": filled["s_after"] - filled["s_before"],
            "launches_before": both["launches_before"],
            "launches_after": both["launches_after"],
        }
    ).reset_index()
    frame["verdict"] = [verdict(*row) for row in zip(frame["low_j"], frame["high_j"], strict=True)]
    if not has_energy:
        frame[["before_j", "after_j", "change_j", "low_j", "high_j"]] = np.nan
    largest = frame["change_j"].abs() if has_energy else frame["change_s"].abs()
    return frame.loc[largest.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def verdict(low: float | None, high: float | None) -> str:
    """Return in words what a change with this interval is."""
    if low is None or high is None or low != low or high != high:
        return "unknown"
    return "more" if low > 0 else "less" if high < 0 else NOT_DISTINGUISHABLE


def change(before: Estimate | None, after: Estimate | None) -> Estimate | None:
    """Return *after* - *before* of two runs, None where one is not known."""
    if before is None or after is None:
        return None
    return after.of_another_run() - before
