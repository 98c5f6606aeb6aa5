"""The kernels of each phase by marginal joules: what each operator adds above the floor, from replays and the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.attribute.energy.counter import EnergyCurve, counter_of
from llmkern.attribute.energy.floor import Floor, FloorDoubt, mean_temperature
from llmkern.attribute.energy.phases import Weighed
from llmkern.attribute.split.account import PhaseAccount
from llmkern.attribute.split.estimator import Features, Marginals, Window, estimate_marginals
from llmkern.attribute.split.kernel_joules import MarginalJoules
from llmkern.attribute.time.operators import UNIDENTIFIED
from llmkern.runfolder import RunFolder

# Windows of the run are made so long that they weigh as much as those of the replays.
_RUN_WINDOW_S = 2.0


@dataclass(frozen=True)
class Evidence:
    """What a run says of joules per launch: its windows, and of each signature its features and launches per phase."""

    windows: list[Window]
    features: dict[str, Features]
    steps: dict[str, pd.DataFrame]
    doubt: FloorDoubt
    most_w: float


def gather(
    run: RunFolder,
    weighed: Weighed,
    accounts: Mapping[str, PhaseAccount],
    kernels: pd.DataFrame,
    ops: pd.DataFrame,
    sensor: tuple[str, int | None],
    limit_w: float = math.inf,
) -> Evidence | None:
    """Return the evidence of *run* in its replays and its weighed phases.

    *kernels* are those of one unit of each phase (see tally_kernels) and *ops* their operators, *sensor* the counter's
    name and device, *limit_w* the board's power limit. None without replays, an energy counter or an idle floor.
    """
    replays = run.table("replays")
    curve = counter_of(run, *sensor)
    if replays.empty or curve is None or weighed.floor is None or not accounts:
        return None
    steps = {phase: signature_steps(kernels, phase) for phase in accounts}
    features = _features(steps, ops)
    power = run.table("power", ["timestamp_ns", "temperature_c", "device"])
    windows = list(replay_windows(replays, curve, weighed, _of_device(power, sensor[1])).values())
    windows += [w for phase, frame in steps.items() for w in _run_windows(weighed, phase, frame)]
    return Evidence(
        [w for w in windows if set(w.launches) <= set(features)],
        features,
        steps,
        weighed.floor.doubt,
        limit_w - weighed.floor.reference_w,
    )


def by_marginals(
    evidence: Evidence, weighed: Weighed, accounts: Mapping[str, PhaseAccount]
) -> tuple[Marginals, dict[str, MarginalJoules]]:
    """Return the joules per launch that *evidence* gives, and for each of *accounts* those of its kernels."""
    marginals = estimate_marginals(evidence.windows, evidence.features, doubt=evidence.doubt, most_w=evidence.most_w)
    return marginals, {
        phase: _phase(account, evidence.steps[phase], marginals, weighed) for phase, account in accounts.items()
    }


def signature_steps(kernels: pd.DataFrame, phase: str) -> pd.DataFrame:
    """Return by signature the launches of the operator and the ns of its kernels, per unit of *phase*."""
    rows = kernels[kernels["phase"] == phase].groupby("signature", observed=True)
    # An operator may launch several kernels, it is called once. What is not identified is one thing, launched once.
    sums = rows[["duration_ns", "calls"]].sum()
    frame = pd.DataFrame({"duration_ns": sums["duration_ns"], "launches": sums["calls"].where(sums["calls"] > 0, 1.0)})
    return frame.set_index(frame.index.astype(object)).sort_index()


def _features(steps: Mapping[str, pd.DataFrame], ops: pd.DataFrame) -> dict[str, Features]:
    traits = ops.groupby("signature", observed=True)[["moved_bytes", "flops"]].mean().to_dict("index")
    features = {}
    for frame in steps.values():
        for name, row in frame.iterrows():
            known = traits.get(str(name), {})
            features[str(name)] = Features(
                float(row["duration_ns"] / 1e9 / row["launches"]),
                float(known.get("moved_bytes", 0.0)),
                float(known.get("flops", 0.0)),
            )
    return features


def _of_device(power: pd.DataFrame, device: int | None) -> pd.DataFrame:
    rows = power.dropna(subset=["temperature_c"]).sort_values("timestamp_ns")
    return rows if device is None else rows[rows["device"] == device]


def replay_windows(
    replays: pd.DataFrame, curve: EnergyCurve, weighed: Weighed, temperature: pd.DataFrame
) -> dict[int, Window]:
    """Return the windows of *replays* by their row; one that the counter's ticks do not frame is left out."""
    floor = weighed.floor
    assert floor is not None
    windows = {}
    for i, row in enumerate(replays.to_dict("records")):
        name, launches = f"replay {i:03d} {row['signature']}", {str(row["signature"]): float(row["launches"])}
        if row["dynamic_j"] is not None and row["dynamic_j"] == row["dynamic_j"]:
            # Of an earlier run on this board: its own floor has been taken off.
            seconds, floor_w = float(row["seconds"]), float(row["floor_w"])
            windows[i] = Window(name, float(row["dynamic_j"]) + floor_w * seconds, seconds, floor_w, launches)
            continue
        framed = curve.window(int(row["start_ns"]), int(row["end_ns"]))
        if framed is None:
            continue
        before_ns, after_ns, joule = framed
        celsius = mean_temperature(temperature, pd.DataFrame({"start_ns": [before_ns], "end_ns": [after_ns]}))
        celsius = celsius if celsius is not None else weighed.temperature_c
        seconds = (after_ns - before_ns) / 1e9
        windows[i] = Window(name, joule, seconds, floor.at(celsius).value, launches, degrees=floor.degrees(celsius))
    return windows


def _run_windows(weighed: Weighed, phase: str, steps: pd.DataFrame) -> list[Window]:
    """Return the weigh windows as prefills or tokens: round by round one of each phase, by difference."""
    floor: Floor | None = weighed.floor
    assert floor is not None
    weight = weighed.phases[phase]
    floor_w, degrees = floor.at(weighed.temperature_c).value, floor.degrees(weighed.temperature_c)
    units = max(1.0, round(_RUN_WINDOW_S / weight.latency_s.value))
    launches = {str(n): float(k) * units for n, k in steps["launches"].items()}
    samples = zip(weight.energy_samples_j, weight.latency_samples_s, strict=True)
    return [
        Window(f"run {phase} {i}", energy_j * units, latency_s * units, floor_w, launches, phase, degrees)
        for i, (energy_j, latency_s) in enumerate(samples)
        if energy_j == energy_j
    ]


def _phase(account: PhaseAccount, steps: pd.DataFrame, marginals: Marginals, weighed: Weighed) -> MarginalJoules:
    floor, mean_w = weighed.floor, account.mean_w
    assert floor is not None
    assert mean_w is not None
    known = set(marginals.unknowns.names)
    seconds = np.maximum(steps["duration_ns"].to_numpy(float) / 1e9, 1e-12)
    factors = np.array(
        [
            marginals.unknowns.row({str(name): float(count)}, account.phase, mean_w)
            if name in known
            else np.zeros(len(marginals.values_j))
            for name, count in steps["launches"].items()
        ]
    )
    degrees = floor.degrees(weighed.temperature_c)
    floor_w = floor.at(weighed.temperature_c).value
    return MarginalJoules(
        tuple(str(name) for name in steps.index),
        factors @ marginals.values_j / seconds,
        marginals.draws_j @ factors.T / seconds,
        floor_w,
        floor_w + marginals.floor_draws_w + marginals.slope_draws * degrees,
        account.busy_s,
        steps["duration_ns"].to_numpy(float),
        account.weight.energy_j,
    )


def worth_replaying(kernels: pd.DataFrame, phases: list[str], share: float = 0.97, most: int = 12) -> list[str]:
    """Return the signatures that make up *share* of the kernels' time of each phase, the longest *most* of them."""
    longest: dict[str, float] = {}
    for phase in phases:
        frame = signature_steps(kernels, phase)
        rows = frame.drop(index=UNIDENTIFIED, errors="ignore")["duration_ns"].sort_values(ascending=False)
        parts = rows / max(float(frame["duration_ns"].sum()), 1.0)
        # One more than reaches the share.
        for name, part in parts[parts.cumsum().shift(fill_value=0.0) < share].items():
            longest[str(name)] = max(longest.get(str(name), 0.0), float(part))
    return sorted(longest, key=lambda n: -longest[n])[:most]


def to_cache(run: RunFolder, weighed: Weighed | None, sensor: tuple[str, int | None]) -> pd.DataFrame:
    """Return the windows that *run* replayed itself: signature, duty, launches, seconds, dynamic_j, floor_w."""
    replays = run.table("replays")
    fresh = replays[replays["dynamic_j"].isna()].reset_index(drop=True)
    curve = counter_of(run, *sensor)
    rows = []
    if not fresh.empty and curve is not None and weighed is not None and weighed.floor is not None:
        power = run.table("power", ["timestamp_ns", "temperature_c", "device"])
        for number, window in replay_windows(fresh, curve, weighed, _of_device(power, sensor[1])).items():
            ((signature, launches),) = window.launches.items()
            rows.append(
                {
                    "signature": signature,
                    "duty": float(fresh["duty"].iloc[number]),
                    "launches": launches,
                    "seconds": window.seconds,
                    "dynamic_j": window.energy_j - window.floor_w * window.seconds,
                    "floor_w": window.floor_w,
                }
            )
    return pd.DataFrame(rows, columns=["signature", "duty", "launches", "seconds", "dynamic_j", "floor_w"])
