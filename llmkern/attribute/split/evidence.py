"""The kernels of each phase by marginal joules: what each operator adds above the floor, from replays and the run."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from llmkern.attribute.energy.counter import EnergyCurve, counter_of
from llmkern.attribute.energy.floor import Floor, FloorDoubt, mean_temperature
from llmkern.attribute.energy.phases import Weighed
from llmkern.attribute.split.account import PhaseAccount
from llmkern.attribute.split.estimator import PRIOR_SIGMA, Features, Marginals, estimate_marginals
from llmkern.attribute.split.kernel_classes import Launched
from llmkern.attribute.split.kernel_joules import MarginalJoules
from llmkern.attribute.split.unknowns import Window
from llmkern.runfolder import RunFolder

# Windows of the run are made so long that they weigh as much as those of the replays.
_RUN_WINDOW_S = 2.0


@dataclass(frozen=True)
class Evidence:
    """What a run says of joules per launch: its windows, and of each class its features and launches per phase.

    ``small`` are the classes that are SMALL, with the filled seconds of a launch.
    """

    windows: list[Window]
    features: dict[str, Features]
    steps: dict[str, pd.DataFrame]
    doubt: FloorDoubt
    most_w: float
    small: dict[str, float]


# Classes that were not replayed, each with less than this of every phase's work, are one unknown: SMALL.
_SMALL_SHARE = 0.01
# Its launches are filled seconds (see Features).
SMALL = "small kernels"


@dataclass(frozen=True)
class Work:
    """What ran: the *kernels* of one unit of each phase (see tally_kernels) with kernel_class, their operators *ops*,
    what one call of each of these has *launched*, and on how many *multiprocessors* (None: not known).
    """

    kernels: pd.DataFrame
    ops: pd.DataFrame
    launched: Launched
    multiprocessors: int | None

    @cached_property
    def classes(self) -> dict[tuple[str, str], str]:
        """Return the class of each kernel name of each signature."""
        rows = self.kernels[["signature", "name", "kernel_class"]].astype(str).drop_duplicates()
        return {(signature, name): found for signature, name, found in rows.itertuples(index=False)}

    def launches(self, signature: str) -> dict[str, float]:
        """Return how often one call of *signature* launches each class, nothing where that was not inspected."""
        counts = Counter(self.classes.get((signature, launch.name), "") for launch in self.launched.get(signature, ()))
        return {} if "" in counts else {name: float(count) for name, count in counts.items()}

    def steps(self, phase: str) -> pd.DataFrame:
        """Return by class the launches, and duration_ns, per unit of *phase*."""
        rows = self.kernels[self.kernels["phase"] == phase].groupby("kernel_class", observed=True)
        sums = rows[["duration_ns", "launches"]].sum()
        return sums.set_index(sums.index.astype(object)).sort_index()

    def features(self) -> dict[str, Features]:
        """Return what the prior knows of each class.

        The bytes and FLOPs of an operator are those of its largest kernel; what the others move is not known.
        """
        rows = self.kernels
        filled = np.array([self._filled(s, n) for s, n in zip(rows["signature"], rows["name"], strict=True)])
        size = np.asarray(rows["duration_ns"].to_numpy(float) * filled)
        own = pd.DataFrame(
            {
                "signature": rows["signature"].astype(object),
                "kernel_class": rows["kernel_class"].astype(object),
                "launches": rows["launches"].to_numpy(float),
                "duration_ns": rows["duration_ns"].to_numpy(float),
                "size": size,
                "calls": rows["calls"].to_numpy(float),
            }
        )
        sums = own.groupby(["signature", "kernel_class"], sort=False)[["launches", "duration_ns", "size"]].sum()
        calls = own.groupby("signature")["calls"].sum()
        sums = sums.reset_index()
        main = sums["size"].groupby(sums["signature"]).transform("max") == sums["size"]
        main &= ~sums["signature"].duplicated() | ~main.groupby(sums["signature"]).cumsum().gt(1)
        traits = self.ops.groupby("signature", observed=True)[["moved_bytes", "flops"]].mean()
        for column in ("moved_bytes", "flops"):
            per_call = sums["signature"].map(traits[column].astype(float)).astype(float).fillna(0.0)
            sums[column] = np.where(main, per_call * sums["signature"].map(calls).astype(float), 0.0)
        by_class = sums.groupby("kernel_class")[["launches", "duration_ns", "size", "moved_bytes", "flops"]].sum()
        return {
            str(name): Features(ns / 1e9 / n, moved / n, flops / n, size / max(ns, 1e-9))
            for name, n, ns, size, moved, flops in by_class.itertuples(name=None)
            if n > 0
        }

    def _filled(self, signature: str, name: str) -> float:
        found = [launch for launch in self.launched.get(signature, ()) if launch.name == name]
        if name.startswith(_COPIES):
            return _COPY_FILLED
        if not found or not found[0].blocks or not self.multiprocessors:
            return 1.0
        return min(1.0, found[0].blocks / self.multiprocessors)


# Copies and memsets within an operator are small, and need no multiprocessor.
_COPIES, _COPY_FILLED = ("memcpy", "memset"), 0.05


def gather(
    run: RunFolder, weighed: Weighed, accounts: Mapping[str, PhaseAccount], work: Work, sensor: tuple[str, int | None]
) -> Evidence | None:
    """Return the evidence of *run* in its replays and its weighed phases.

    *sensor* is the counter's name and device. None without replays, an energy counter or an idle floor.
    """
    replays = run.table("replays")
    curve = counter_of(run, *sensor)
    if replays.empty or curve is None or weighed.floor is None or not accounts:
        return None
    steps = {phase: work.steps(phase) for phase in accounts}
    features = work.features()
    power = run.table("power", ["timestamp_ns", "temperature_c", "device"])
    windows = list(replay_windows(replays, curve, weighed, _of_device(power, sensor[1]), work).values())
    small = _small(features, steps, {name for window in windows for name in window.launches})
    features |= _of_small(features, small)
    windows += [w for phase, frame in steps.items() for w in _run_windows(weighed, phase, frame, small)]
    limit_mw = run.facts.device.power_limit_mw
    limit_w = math.inf if limit_mw is None else limit_mw / 1e3
    return Evidence(
        [w for w in windows if w.launches and set(w.launches) <= set(features)],
        features,
        steps,
        weighed.floor.doubt,
        limit_w - weighed.floor.reference_w,
        small,
    )


def _small(features: Mapping[str, Features], steps: Mapping[str, pd.DataFrame], replayed: set[str]) -> dict[str, float]:
    filled_s = {name: of.traits[0] for name, of in features.items()}
    large = set(replayed)
    for frame in steps.values():
        work_s = frame["launches"] * np.array([filled_s[str(name)] for name in frame.index])
        large |= set(frame.index[work_s >= _SMALL_SHARE * work_s.sum()])
    return {name: max(own_s, 1e-12) for name, own_s in filled_s.items() if name not in large}


def _of_small(features: Mapping[str, Features], small: Mapping[str, float]) -> dict[str, Features]:
    """Return the features of SMALL, per filled second; nothing without any."""
    whole_s = sum(small.values())
    if not small:
        return {}
    moved, flops = (sum(getattr(features[name], what) for name in small) / whole_s for what in ("moved_bytes", "flops"))
    return {SMALL: Features(1.0, moved, flops)}


def by_marginals(
    evidence: Evidence, weighed: Weighed, accounts: Mapping[str, PhaseAccount]
) -> tuple[Marginals, dict[str, MarginalJoules]]:
    """Return the joules per launch that *evidence* gives, and for each of *accounts* those of its kernels."""
    marginals = estimate_marginals(evidence.windows, evidence.features, doubt=evidence.doubt, most_w=evidence.most_w)
    return marginals, {
        phase: _phase(account, evidence.steps[phase], marginals, weighed, evidence.small)
        for phase, account in accounts.items()
    }


def _of_device(power: pd.DataFrame, device: int | None) -> pd.DataFrame:
    rows = power.dropna(subset=["temperature_c"]).sort_values("timestamp_ns")
    return rows if device is None else rows[rows["device"] == device]


def replay_windows(
    replays: pd.DataFrame, curve: EnergyCurve, weighed: Weighed, temperature: pd.DataFrame, work: Work | None
) -> dict[int, Window]:
    """Return the windows of *replays* by their row; one that the counter's ticks do not frame is left out.

    Their launches are those of the classes in *work*; without it, of the operator or its kernel.
    """
    floor = weighed.floor
    assert floor is not None
    windows = {}
    for i, row in enumerate(replays.to_dict("records")):
        signature, kernel, count = str(row["signature"]), row["kernel"], float(row["launches"])
        name = f"replay {i:03d} {signature}"
        if work is None:
            launches = {signature if _is_whole(kernel) else f"{signature} {kernel}": count}
        elif _is_whole(kernel):
            launches = {found: count * each for found, each in work.launches(signature).items()}
        else:
            launches = {work.classes.get((signature, str(kernel)), "not in the run"): count}
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


def _is_whole(kernel: object) -> bool:
    """Whether a row of table replays with this *kernel* is of the whole operator."""
    return not isinstance(kernel, str)


def _run_windows(weighed: Weighed, phase: str, steps: pd.DataFrame, small: Mapping[str, float]) -> list[Window]:
    """Return the weigh windows as prefills or tokens: round by round one of each phase, by difference."""
    floor: Floor | None = weighed.floor
    assert floor is not None
    weight = weighed.phases[phase]
    floor_w, degrees = floor.at(weighed.temperature_c).value, floor.degrees(weighed.temperature_c)
    units = max(1.0, round(_RUN_WINDOW_S / weight.latency_s.value))
    launches: dict[str, float] = defaultdict(float)
    for name, count in steps["launches"].items():
        launches[SMALL if name in small else str(name)] += float(count) * units * small.get(str(name), 1.0)
    samples = zip(weight.energy_samples_j, weight.latency_samples_s, strict=True)
    return [
        Window(f"run {phase} {i}", energy_j * units, latency_s * units, floor_w, launches, phase, degrees)
        for i, (energy_j, latency_s) in enumerate(samples)
        if energy_j == energy_j
    ]


def _phase(
    account: PhaseAccount, steps: pd.DataFrame, marginals: Marginals, weighed: Weighed, small: Mapping[str, float]
) -> MarginalJoules:
    floor, mean_w = weighed.floor, account.mean_w
    assert floor is not None
    assert mean_w is not None
    known = set(marginals.unknowns.names)
    names = [SMALL if name in small else str(name) for name in steps.index]
    amounts = np.array(
        [small.get(str(name), 1.0) if one in known else 0.0 for name, one in zip(steps.index, names, strict=True)]
    )
    there = [name if name in known else marginals.unknowns.names[0] for name in names]
    values_j, draws_j = (part * amounts for part in marginals.launches(there, account.phase, mean_w))
    # What they take together says little of one of them.
    apart = np.random.default_rng(4).normal(0.0, PRIOR_SIGMA, draws_j.shape)
    draws_j *= np.exp(np.where([name == SMALL for name in names], apart, 0.0))
    degrees = floor.degrees(weighed.temperature_c)
    floor_w = floor.at(weighed.temperature_c).value
    return MarginalJoules(
        tuple(str(name) for name in steps.index),
        values_j,
        draws_j,
        floor_w,
        floor_w + marginals.floor_draws_w + marginals.slope_draws * degrees,
        account.busy_s,
        steps["launches"].to_numpy(float),
        float(steps["duration_ns"].sum()) / 1e9,
        account.weight.energy_j,
    )


def to_cache(run: RunFolder, weighed: Weighed | None, sensor: tuple[str, int | None]) -> pd.DataFrame:
    """Return the windows that *run* replayed itself: signature, kernel, duty, launches, seconds, dynamic_j, floor_w."""
    replays = run.table("replays")
    fresh = replays[replays["dynamic_j"].isna()].reset_index(drop=True)
    curve = counter_of(run, *sensor)
    rows = []
    if not fresh.empty and curve is not None and weighed is not None and weighed.floor is not None:
        power = run.table("power", ["timestamp_ns", "temperature_c", "device"])
        for number, window in replay_windows(fresh, curve, weighed, _of_device(power, sensor[1]), None).items():
            (launches,) = window.launches.values()
            rows.append(
                {
                    "signature": fresh["signature"].iloc[number],
                    "kernel": None if _is_whole(fresh["kernel"].iloc[number]) else str(fresh["kernel"].iloc[number]),
                    "duty": float(fresh["duty"].iloc[number]),
                    "launches": launches,
                    "seconds": window.seconds,
                    "dynamic_j": window.energy_j - window.floor_w * window.seconds,
                    "floor_w": window.floor_w,
                }
            )
    return pd.DataFrame(rows, columns=["signature", "kernel", "duty", "launches", "seconds", "dynamic_j", "floor_w"])
