"""Where the difference between two runs went: per token, by phase, kind of kernel and cause of gap, and by module."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.attribute.attribution import Attribution, Drawn
from llmkern.attribute.split.account import PhaseAccount
from llmkern.errors import UsageError
from llmkern.estimate import DRAWS, Estimate
from llmkern.explain.whatif import Prediction, predict

NOT_DISTINGUISHABLE = "not distinguishable"
# Kernels that overlap for less than this share of the busy time change no figure that is shown.
OVERLAP_LIMIT = 0.01


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

    ``bars`` has part (kernels, gaps, overlap or residual), name (kind or cause), before_j, after_j, change_j with low_j
    and high_j, before_s, after_s, change_s, launches_before, launches_after and verdict (more, less, not
    distinguishable, or unknown where there is no interval); its changes add up to those of the whole.
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
    return tokens_of_unit(attribution, account.unit)


def tokens_of_unit(attribution: Attribution, unit: str) -> int | None:
    """Return how many tokens a *unit* (call, token) of a run stands for, None where nothing says so."""
    facts = attribution.run.facts
    if facts.imported is not None and not facts.energy_of:
        return None
    if unit == "call":
        return (sum(facts.prompts.effective_tokens) or None) if facts.prompts is not None else None
    return facts.options.batch if unit == "token" else None


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


@dataclass(frozen=True)
class _Row:
    """A part of a phase in J (NaN where that is not known), s and launches, all per unit that is compared."""

    joules: Estimate
    seconds: float
    launches: float


def _parts(
    attribution: Attribution, phase: str, by: tuple[list[str], list[str]], caused: bool, scale: float
) -> dict[tuple[str, ...], _Row]:
    """Return kernels and gaps (by cause if *caused*) *by* their keys, overlap and residual, of a unit times *scale*."""
    account = attribution.accounts[phase]
    kernel_keys, gap_keys = by
    kernels = attribution.drawn(phase, kernel_keys)
    found = _rows("kernels", kernels, kernel_keys, scale)
    if caused:
        found |= _rows("gaps", attribution.drawn_gaps(phase, gap_keys), gap_keys, scale)
    else:
        # Without host calls all that is known of the gaps is their sum.
        key = ("gaps", "unknown", *([""] if "module" in gap_keys else []))
        found[key] = _Row(_known(account.gap_j).scaled(scale), account.gap_s.value * scale, np.nan)
    rest_s = account.weight.latency_s.value - account.gap_s.value - float(kernels[0]["duration_ns"].sum()) / 1e9
    nowhere = [""] if "module" in kernel_keys else []
    if rest_s < -OVERLAP_LIMIT * account.busy_s:
        # Kernels that overlap are longer together than the device was busy; what they draw is theirs all the same.
        nothing = Estimate(0.0, 0.0, 0.0, draws=np.zeros(DRAWS))
        found[("overlap", "overlap of kernels", *nowhere)] = _Row(nothing, rest_s * scale, np.nan)
        rest_s = 0.0
    key = ("residual", "residual", *nowhere)
    found[key] = _Row(_known(account.residual).scaled(scale), rest_s * scale, np.nan)
    return found


def _rows(part: str, drawn: Drawn, keys: list[str], scale: float) -> dict[tuple[str, ...], _Row]:
    frame, draws = drawn
    values = frame[["energy_j", "duration_ns", "launches"]].to_numpy(float) * scale
    return {
        (part, *names): _Row(
            Estimate.of(joules, None if draws is None else draws[i] * scale), duration_ns / 1e9, launches
        )
        for i, (names, (joules, duration_ns, launches)) in enumerate(
            zip(frame[keys].itertuples(index=False, name=None), values, strict=True)
        )
    }


def _known(joules: Estimate | None) -> Estimate:
    return Estimate(np.nan) if joules is None else joules


def _joined(before: dict[tuple[str, ...], _Row], after: dict[tuple[str, ...], _Row]) -> pd.DataFrame:
    # What one run does not have costs nothing there, with certainty.
    nothing = _Row(Estimate(0.0, 0.0, 0.0, draws=np.zeros(DRAWS)), 0.0, np.nan)
    rows = []
    for key in dict.fromkeys([*before, *after]):
        first, second = before.get(key, nothing), after.get(key, nothing)
        changed = change(first.joules, second.joules)
        assert changed is not None
        rows.append(
            {
                **dict(zip(("part", "name", "module"), key, strict=False)),
                "before_j": first.joules.value,
                "after_j": second.joules.value,
                "change_j": changed.value,
                "low_j": np.nan if changed.low is None else changed.low,
                "high_j": np.nan if changed.high is None else changed.high,
                "before_s": first.seconds,
                "after_s": second.seconds,
                "change_s": second.seconds - first.seconds,
                "launches_before": first.launches,
                "launches_after": second.launches,
                "verdict": verdict(changed.low, changed.high),
            }
        )
    frame = pd.DataFrame(rows)
    has_energy = not any(_lacks_energy(side) for side in (before, after))
    if not has_energy:
        frame[["before_j", "after_j", "change_j", "low_j", "high_j"]] = np.nan
        frame["verdict"] = verdict(None, None)
    largest = frame["change_j"].abs() if has_energy else frame["change_s"].abs()
    return frame.loc[largest.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def _lacks_energy(rows: dict[tuple[str, ...], _Row]) -> bool:
    return all(row.joules.value != row.joules.value for row in rows.values())


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
