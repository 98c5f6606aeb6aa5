"""The account of a phase by marginal joules: what each operator adds above the floor, from replays and the run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.attribute.energy import EnergyCurve, mean_temperature
from llmkern.attribute.equal_power import Attribution, PhaseAccount
from llmkern.attribute.estimate import Estimate, combine
from llmkern.attribute.identify import NONE, UNIDENTIFIED, Identified, identify
from llmkern.attribute.marginal import Features, Marginals, Window, estimate_marginals
from llmkern.attribute.timeline import Timeline, build_timeline
from llmkern.attribute.weighed import counter_of
from llmkern.run import RunFolder

# At the power cap the clock falls, and a launch costs less (a 4096 GEMM on an H100 123 mJ instead of 155): joules from
# there do for work that ran there, and for no other.
CAPPED = " at the power cap"
_POWER_CAP = 0x4
_CAPPED_SHARE = 0.5


@dataclass(frozen=True)
class PhaseByMarginals:
    """Joules of one phase per unit: operators (dynamic and floor), gaps, and what the counter says beyond them."""

    phase: str
    unit: str
    kernel_j: Estimate
    gap_j: float
    residual_j: float
    by_signature: pd.DataFrame


@dataclass(frozen=True)
class Replays:
    """Marginal joules per launch of each signature, and the phases that they explain."""

    marginals: Marginals
    phases: dict[str, PhaseByMarginals]


def account_replays(run: RunFolder, attribution: Attribution, identified: Identified) -> Replays | None:
    """Return the marginal account of *run*; None without replays, an energy counter or an idle floor."""
    replays = run.table("replays")
    weighed = attribution.weighed
    if replays.empty or weighed is None or weighed.floor is None:
        return None
    curve = counter_of(run, attribution.sensor, attribution.device)
    if curve is None:
        return None
    ops = run.table("ops")
    steps = launches_per_step(attribution.timeline, identified, ops)
    features = _features(steps, ops)
    power = run.table("power", ["timestamp_ns", "temperature_c", "throttle"])
    replayed = _replay_windows(attribution, replays, curve, power)
    has_capped = {name.removesuffix(CAPPED) for w in replayed.values() for name in w.launches if name.endswith(CAPPED)}
    features |= {name + CAPPED: features[name] for name in has_capped if name in features}
    capped = _capped_phases(run, power)
    steps = {
        phase: frame.rename(index=lambda n: n + CAPPED if n in has_capped else n) if phase in capped else frame
        for phase, frame in steps.items()
    }
    windows = [w for w in [*replayed.values(), *_run_windows(attribution, steps)] if set(w.launches) <= set(features)]
    floor_w = weighed.floor.at(weighed.temperature_c)
    sigma_w = (floor_w.half_width or 0.0) / 2
    marginals = estimate_marginals(windows, features, floor_sigma_w=sigma_w)
    phases = {
        phase: _phase(account, steps[phase], marginals, floor_w)
        for phase, account in attribution.accounts.items()
        if phase in steps
    }
    return Replays(marginals, phases)


def worth_replaying(run: RunFolder, device: int, share: float = 0.97, most: int = 16) -> list[str]:
    """Return the signatures that make up *share* of the kernels' time of each phase, the longest *most* of them."""
    timeline = build_timeline(run.table("kernels"), run.table("launches"), run.table("ranges"), device)
    steps = launches_per_step(timeline, identify(run, timeline, device), run.table("ops"))
    longest: dict[str, float] = {}
    for frame in steps.values():
        rows = frame.drop(index=UNIDENTIFIED, errors="ignore")["duration_ns"].sort_values(ascending=False)
        parts = rows / max(float(frame["duration_ns"].sum()), 1.0)
        # One more than reaches the share.
        for name, part in parts[parts.cumsum().shift(fill_value=0.0) < share].items():
            longest[str(name)] = max(longest.get(str(name), 0.0), float(part))
    return sorted(longest, key=lambda n: -longest[n])[:most]


def launches_per_step(timeline: Timeline, identified: Identified, ops: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return per phase a frame by signature: launches of the operator and ns of its kernels, per unit of the phase."""
    names = ops["signature"].astype(object).to_numpy()
    kernels = timeline.kernels.reset_index(drop=True)
    known = identified.op != NONE
    frame = pd.DataFrame(
        {
            "phase": kernels["phase"].astype(str),
            "instance": kernels["instance"],
            "token": kernels["token"].fillna(-1),
            "op": identified.op,
            "signature": np.where(known, names[identified.op], UNIDENTIFIED),
            "duration_ns": (kernels["end_ns"] - kernels["start_ns"]).astype(float),
        }
    )
    steps = {}
    for phase, rows in frame.groupby("phase"):
        units = max(1, int(timeline.phases.loc[timeline.phases["phase"] == phase, "tokens"].sum()))
        summed = rows.groupby("signature")["duration_ns"].sum().to_frame() / units
        # An operator may launch several kernels: it counts once in each step.
        calls = rows[rows["op"] != NONE].drop_duplicates(["instance", "token", "op"]).groupby("signature").size()
        summed["launches"] = calls.reindex(summed.index).fillna(1.0) / units
        steps[str(phase)] = summed
    return steps


def _features(steps: dict[str, pd.DataFrame], ops: pd.DataFrame) -> dict[str, Features]:
    traits = ops.groupby(ops["signature"].astype(str))[["moved_bytes", "flops"]].mean().to_dict("index")
    features = {}
    for frame in steps.values():
        for name, row in frame.iterrows():
            seconds = float(row["duration_ns"] / 1e9 / row["launches"])
            known = traits.get(name, {})
            moved_bytes, flops = float(known.get("moved_bytes", 0.0)), float(known.get("flops", 0.0))
            features[str(name)] = Features(seconds, moved_bytes, flops)
    return features


def to_cache(run: RunFolder, attribution: Attribution) -> pd.DataFrame:
    """Return the windows that *run* replayed itself: signature, duty, launches, seconds, dynamic_j, capped."""
    replays = run.table("replays")
    fresh = replays[replays["dynamic_j"].isna()].reset_index(drop=True)
    curve = counter_of(run, attribution.sensor, attribution.device)
    if fresh.empty or curve is None or attribution.weighed is None or attribution.weighed.floor is None:
        return pd.DataFrame(columns=["signature", "duty", "launches", "seconds", "dynamic_j", "capped"])
    power = run.table("power", ["timestamp_ns", "temperature_c", "throttle"])
    rows = []
    for number, window in _replay_windows(attribution, fresh, curve, power).items():
        ((key, launches),) = window.launches.items()
        rows.append(
            {
                "signature": key.removesuffix(CAPPED),
                "duty": float(fresh["duty"].iloc[number]),
                "launches": launches,
                "seconds": window.seconds,
                "dynamic_j": window.energy_j - window.floor_w * window.seconds,
                "capped": key.endswith(CAPPED),
            }
        )
    return pd.DataFrame(rows)


def _is_capped(power: pd.DataFrame, start_ns: int, end_ns: int) -> bool:
    """Whether the driver held the clock down for the power cap in most readings between the two times."""
    inside = power["throttle"][power["timestamp_ns"].between(start_ns, end_ns)].dropna().astype("int64")
    return len(inside) > 0 and float(((inside & _POWER_CAP) != 0).mean()) >= _CAPPED_SHARE


def _capped_phases(run: RunFolder, power: pd.DataFrame) -> set[str]:
    """Return the phases whose weigh windows ran at the power cap; decode is judged by the windows of generate(n)."""
    ranges = run.table("ranges", ["category", "pass", "start_ns", "end_ns", "new_tokens"])
    windows = ranges[(ranges["category"] == "window") & (ranges["pass"] == "weigh")]
    found = set()
    for phase, chosen in (("prefill", windows["new_tokens"] == 1), ("decode", windows["new_tokens"] > 1)):
        spans = windows[chosen]
        held = [_is_capped(power, int(s), int(e)) for s, e in zip(spans["start_ns"], spans["end_ns"], strict=True)]
        if held and sum(held) > len(held) / 2:
            found.add(phase)
    return found


def _replay_windows(
    attribution: Attribution, replays: pd.DataFrame, curve: EnergyCurve, power: pd.DataFrame
) -> dict[int, Window]:
    """Return the windows of *replays* by their row; one that the counter's ticks do not frame is left out."""
    weighed = attribution.weighed
    assert weighed is not None
    assert weighed.floor is not None
    degrees = power.dropna(subset=["temperature_c"]).sort_values("timestamp_ns")
    windows = {}
    for i, row in enumerate(replays.to_dict("records")):
        name, launches = f"replay {i:03d} {row['signature']}", float(row["launches"])
        if row["dynamic_j"] is not None and row["dynamic_j"] == row["dynamic_j"]:
            key = str(row["signature"]) + (CAPPED if row["capped"] else "")
            windows[i] = Window(name, float(row["dynamic_j"]), float(row["seconds"]), 0.0, {key: launches})
            continue
        framed = curve.window(int(row["start_ns"]), int(row["end_ns"]))
        if framed is None:
            continue
        before_ns, after_ns, joule = framed
        span = pd.DataFrame({"start_ns": [before_ns], "end_ns": [after_ns]})
        celsius = mean_temperature(degrees, span)
        floor_w = weighed.floor.at(celsius if celsius is not None else weighed.temperature_c).value
        regime = CAPPED if _is_capped(power, int(row["start_ns"]), int(row["end_ns"])) else ""
        seconds = (after_ns - before_ns) / 1e9
        windows[i] = Window(name, joule, seconds, floor_w, {str(row["signature"]) + regime: launches})
    return windows


def _run_windows(attribution: Attribution, steps: dict[str, pd.DataFrame]) -> list[Window]:
    """Return the weigh windows as prefills and tokens: round by round one of each phase, by difference."""
    weighed = attribution.weighed
    assert weighed is not None
    assert weighed.floor is not None
    floor_w = weighed.floor.at(weighed.temperature_c).value
    windows = []
    for phase, weight in weighed.phases.items():
        if phase not in steps:
            continue
        # So many units that a window is as long as those of the replays.
        units = max(1.0, round(2.0 / weight.latency_s.value))
        launches = {str(n): float(k) * units for n, k in steps[phase]["launches"].items()}
        for i, (energy_j, latency_s) in enumerate(zip(weight.energy_samples_j, weight.latency_samples_s, strict=True)):
            if energy_j == energy_j:
                windows.append(
                    Window(f"run {phase} {i}", energy_j * units, latency_s * units, floor_w, launches, "run")
                )
    return windows


def _phase(account: PhaseAccount, steps: pd.DataFrame, marginals: Marginals, floor_w: Estimate) -> PhaseByMarginals:
    rows = []
    for name, row in steps.iterrows():
        estimate = marginals.energy_j.get(str(name), Estimate(0.0, 0.0, 0.0))
        floor_j = floor_w.value * float(row["duration_ns"]) / 1e9
        dynamic = estimate.scaled(float(row["launches"]))
        rows.append(
            {
                "signature": str(name),
                "launches": float(row["launches"]),
                "duration_ns": float(row["duration_ns"]),
                "floor_j": floor_j,
                "dynamic_j": dynamic.value,
                "energy_j": floor_j + dynamic.value,
                "low_j": floor_j + (dynamic.low or 0.0),
                "high_j": floor_j + (dynamic.high if dynamic.high is not None else dynamic.value),
            }
        )
    frame = pd.DataFrame(rows).sort_values("energy_j", ascending=False, ignore_index=True)
    halves = ((frame["high_j"] - frame["low_j"]) / 2).to_list()
    kernel_j = combine(float(frame["energy_j"].sum()), *halves)
    gap_j = floor_w.value * account.gap_s.value
    energy = account.weight.energy_j
    total_j = energy.value if energy is not None else kernel_j.value + gap_j
    return PhaseByMarginals(account.phase, account.unit, kernel_j, gap_j, total_j - kernel_j.value - gap_j, frame)
