"""The kernels of each phase by marginal joules: what each launch adds above the floor, from replays and the run."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.energy.counter import EnergyCurve, counter_of
from llmkern.attribute.energy.floor import Floor, FloorDoubt, mean_reading, mean_temperature
from llmkern.attribute.energy.phases import Weighed
from llmkern.attribute.split.account import PhaseAccount
from llmkern.attribute.split.estimator import Marginals, estimate_marginals
from llmkern.attribute.split.kernel_classes import Launched
from llmkern.attribute.split.kernel_joules import MarginalJoules
from llmkern.attribute.split.prior import PRIOR_SIGMA, Features
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
    # In which each phase ran (see Window).
    regimes: dict[str, float]


# By how much a kernel may cost more or less alone than among those of its operator, whose data it finds in L2 or not
# (one sigma): on an H100 casts of 3.7 MB after a GEMV took 10-17 % more than alone, ten kernels of an int8 product
# together 0.7 % more than each alone.
_ALONE_APART, _MIXED_APART = 0.1, 0.01
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
        rows = self.kernels[["signature", "name", "kernel_class"]].drop_duplicates()
        return {(str(signature), str(name)): str(found) for signature, name, found in rows.itertuples(index=False)}

    def launches(self, signature: str) -> dict[str, float]:
        """Return how often one call of *signature* launches each class, nothing where that was not inspected."""
        counts = Counter(self.classes.get((signature, launch.name), "") for launch in self.launched.get(signature, ()))
        return {} if "" in counts else {name: float(count) for name, count in counts.items()}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Return how long a launch of each class takes."""
        sums = self.kernels.groupby("kernel_class", observed=True)[["duration_ns", "launches"]].sum()
        return {str(name): ns / 1e9 / n for name, ns, n in sums.itertuples(name=None) if n > 0}

    def asks(self, signature: str) -> bool:
        """Whether the operator copies an answer to the host, waits for it, and cannot be captured."""
        return any(launch.name.startswith("memcpy DtoH") for launch in self.launched.get(signature, ()))

    def steps(self, phase: str) -> pd.DataFrame:
        """Return by class the launches, and duration_ns, per unit of *phase*."""
        rows = self.kernels[self.kernels["phase"] == phase].groupby("kernel_class", observed=True)
        sums = rows[["duration_ns", "launches"]].sum()
        return sums.set_index(sums.index.astype(object)).sort_index()

    def features(self) -> dict[str, Features]:
        """Return what the prior knows of each class.

        An operator's FLOPs are those of its largest kernel; its bytes go by filled time: which moves what is not known.
        """
        rows = self.kernels
        # Rows are many, pairs of operator and kernel few.
        pair, pairs = pd.MultiIndex.from_frame(rows[["signature", "name"]]).factorize()
        filled = np.array([self._filled(str(signature), str(name)) for signature, name in pairs])[pair]
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
        of_op = sums["size"].groupby(sums["signature"])
        shares = {"moved_bytes": sums["size"] / of_op.transform("sum").clip(lower=1e-9)}
        largest = np.zeros(len(sums))
        largest[of_op.idxmax().to_numpy()] = 1.0
        shares["flops"] = pd.Series(largest)
        traits = self.ops.groupby("signature", observed=True)[["moved_bytes", "flops"]].mean()
        for column, share in shares.items():
            per_call = sums["signature"].map(traits[column].astype(float)).astype(float).fillna(0.0)
            sums[column] = share * per_call * sums["signature"].map(calls).astype(float)
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


# What of a window another run needs.
CACHED = ["signature", "kernel", "duty", "launches", "seconds", "dynamic_j", "floor_w", "clock_mhz"]
# Copies and memsets within an operator are small, and need no multiprocessor.
_COPIES, _COPY_FILLED = ("memcpy", "memset"), 0.05


def gather(
    run: RunFolder, weighed: Weighed, accounts: Mapping[str, PhaseAccount], work: Work, sensor: tuple[str, int | None]
) -> Evidence | None:
    """Return the evidence of *run* in its replays and its weighed phases.

    *sensor* is the counter's name and device. None without a replay of what ran, an energy counter or an idle floor.
    """
    replays = run.table("replays")
    curve = counter_of(run, *sensor)
    if replays.empty or curve is None or weighed.floor is None or not accounts:
        return None
    steps = {phase: work.steps(phase) for phase in accounts}
    features = work.features()
    windows = list(replay_windows(replays, curve, weighed, _of_device(run, sensor[1]), work).values())
    small = _small(features, steps, {name for window in windows for name in window.launches})
    features |= _of_small(features, small)
    windows += [w for phase, frame in steps.items() for w in _run_windows(weighed, accounts[phase], frame, small)]
    limit_mw = run.facts.device.power_limit_mw
    limit_w = math.inf if limit_mw is None else limit_mw / 1e3
    windows = _of_one_measure([w for w in windows if w.launches and set(w.launches) <= set(features)])
    if not windows:
        return None
    regimes = {phase: [w.regime for w in windows if w.context == phase] for phase in steps}
    return Evidence(
        windows,
        features,
        steps,
        weighed.floor.doubt,
        limit_w - weighed.floor.reference_w,
        small,
        {phase: float(np.mean(found)) for phase, found in regimes.items() if found},
    )


def _of_one_measure(windows: list[Window]) -> list[Window]:
    """Return *windows* with their clocks if all have one, else with none: powers and clocks do not compare."""
    if all(w.clock_mhz is not None for w in windows):
        return windows
    return [replace(w, clock_mhz=None) for w in windows]


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
    return marginals, {phase: _phase(account, evidence, marginals, weighed) for phase, account in accounts.items()}


def _of_device(run: RunFolder, device: int | None) -> pd.DataFrame:
    """Return the readings of temperature and clock of *device* (None: of all) in their order."""
    power = run.table("power", ["timestamp_ns", "temperature_c", "sm_clock_mhz", "device"])
    rows = power.dropna(subset=["temperature_c"]).sort_values("timestamp_ns")
    return rows if device is None else rows[rows["device"] == device]


def replay_windows(
    replays: pd.DataFrame, curve: EnergyCurve, weighed: Weighed, readings: pd.DataFrame, work: Work | None
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
        apart = idle_s = 0.0
        if work is None:
            launches = {signature if _is_whole(kernel) else f"{signature} {kernel}": count}
        elif _is_whole(kernel):
            launches = {found: count * each for found, each in work.launches(signature).items()}
            apart = _MIXED_APART if len(launches) > 1 else 0.0
            if work.asks(signature):
                # Launched one by one, by a host that waits for the answers.
                idle_s = max(0.0, _host_s(row) - sum(each * work.seconds.get(n, 0.0) for n, each in launches.items()))
        else:
            launches = {work.classes.get((signature, str(kernel)), "not in the run"): count}
            apart = _ALONE_APART
        if row["dynamic_j"] is not None and row["dynamic_j"] == row["dynamic_j"]:
            # Of an earlier run on this board: its own floor has been taken off.
            seconds, floor_w = float(row["seconds"]), float(row["floor_w"])
            energy_j = float(row["dynamic_j"]) + floor_w * seconds
            clock = row["clock_mhz"]
            clock_mhz = None if clock is None or clock != clock else float(clock)
            windows[i] = Window(name, energy_j, seconds, floor_w, launches, "", 0.0, apart, clock_mhz, idle_s)
            continue
        framed = curve.window(int(row["start_ns"]), int(row["end_ns"]))
        if framed is None:
            continue
        before_ns, after_ns, joule = framed
        span = pd.DataFrame({"start_ns": [before_ns], "end_ns": [after_ns]})
        celsius = mean_temperature(readings, span)
        worked = pd.DataFrame({"start_ns": [int(row["start_ns"])], "end_ns": [int(row["end_ns"])]})
        clock_mhz = mean_reading(readings, worked, "sm_clock_mhz")
        celsius = celsius if celsius is not None else weighed.temperature_c
        seconds = (after_ns - before_ns) / 1e9
        floor_w, degrees = floor.at(celsius).value, floor.degrees(celsius)
        windows[i] = Window(name, joule, seconds, floor_w, launches, "", degrees, apart, clock_mhz, idle_s)
    return windows


def _host_s(row: Mapping[Hashable, Any]) -> float:
    """Return for how many seconds of the window *row* of table replays the host was at work, and did not pause."""
    start_ns, end_ns = row["start_ns"], row["end_ns"]
    worked = row["seconds"] if start_ns is None or start_ns != start_ns else (end_ns - start_ns) / 1e9
    return float(worked) * float(row["duty"])


def _is_whole(kernel: object) -> bool:
    """Whether a row of table replays with this *kernel* is of the whole operator."""
    return not isinstance(kernel, str)


def _run_windows(
    weighed: Weighed, account: PhaseAccount, steps: pd.DataFrame, small: Mapping[str, float]
) -> list[Window]:
    """Return the weigh windows as prefills or tokens: round by round one of each phase, by difference."""
    floor: Floor | None = weighed.floor
    assert floor is not None
    phase, weight = account.phase, account.weight
    mean_c, clock_mhz = weighed.temperature_of(phase), weighed.clock_mhz.get(phase)
    units = max(1.0, round(_RUN_WINDOW_S / weight.latency_s.value))
    launches: dict[str, float] = defaultdict(float)
    for name, count in steps["launches"].items():
        launches[SMALL if name in small else str(name)] += float(count) * units * small.get(str(name), 1.0)
    # The mean of all: that a slower round takes more above the floor (1.5 to 5 W on H100s) may as well come from
    # kernels that find a board at rest.
    idle_s = max(0.0, weight.latency_s.value - account.busy_s) * units
    windows = []
    rounds = zip_longest(weight.energy_samples_j, weight.latency_samples_s, weight.celsius_samples, fillvalue=np.nan)
    for i, (energy_j, latency_s, own_c) in enumerate(rounds):
        if energy_j == energy_j:
            celsius = own_c if own_c == own_c else mean_c
            where = (floor.at(celsius).value, launches, phase, floor.degrees(celsius), 0.0, clock_mhz, idle_s)
            windows.append(Window(f"run {phase} {i}", energy_j * units, latency_s * units, *where))
    return windows


def _phase(account: PhaseAccount, evidence: Evidence, marginals: Marginals, weighed: Weighed) -> MarginalJoules:
    floor, steps, small = weighed.floor, evidence.steps[account.phase], evidence.small
    assert floor is not None
    regime = evidence.regimes.get(account.phase, 0.0)
    known = set(marginals.unknowns.names)
    names = [SMALL if name in small else str(name) for name in steps.index]
    amounts = np.array(
        [small.get(str(name), 1.0) if one in known else 0.0 for name, one in zip(steps.index, names, strict=True)]
    )
    there = [name if name in known else marginals.unknowns.names[0] for name in names]
    values_j, draws_j = (part * amounts for part in marginals.launches(there, account.phase, regime))
    # What they take together says little of one of them.
    apart = np.random.default_rng(4).normal(0.0, PRIOR_SIGMA, draws_j.shape)
    draws_j *= np.exp(np.where([name == SMALL for name in names], apart, 0.0))
    celsius = weighed.temperature_of(account.phase)
    degrees, floor_w = floor.degrees(celsius), floor.at(celsius).value
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
    """Return the windows that *run* replayed itself, with columns CACHED."""
    replays = run.table("replays")
    fresh = replays[replays["dynamic_j"].isna()].reset_index(drop=True)
    curve = counter_of(run, *sensor)
    rows = []
    if not fresh.empty and curve is not None and weighed is not None and weighed.floor is not None:
        for number, window in replay_windows(fresh, curve, weighed, _of_device(run, sensor[1]), None).items():
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
                    "clock_mhz": window.clock_mhz,
                }
            )
    return pd.DataFrame(rows, columns=CACHED)
