"""Latency and energy per phase from pass *weigh*, the study's way and by ranges."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from llmkern.attribute.energy.by_ranges import ByRanges, energy_by_ranges
from llmkern.attribute.energy.counter import EnergyCurve, counter_of
from llmkern.attribute.energy.floor import Floor, mean_reading, mean_temperature, measure_floor
from llmkern.attribute.energy.sensors import Sensor, calibrate, choose
from llmkern.attribute.time.timeline import Timeline
from llmkern.errors import RunFolderError
from llmkern.estimate import Estimate, from_samples
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import DECODE, GENERATE, PHASE, PREFILL, PROMPT_SET, WINDOW
from llmkern.text import with_interval

# The first generation of a length is told of where it takes this many times as long as later ones.
FIRST_LIMIT = 1.5
# By difference a temperature is not taken further than this beyond those of both windows.
_MOST_BEYOND_C = 3.0


@dataclass(frozen=True)
class PhaseWeight:
    """One phase as weighed: per call for prefill, per token step for decode.

    The samples are one per round, NaN where a round has no energy; energies are None without an energy counter.
    ``celsius_samples`` are the temperatures at which the idle floor of a round's latency is that of its windows, NaN
    where none was read. ``*_by_ranges`` is the same measured between the phase's own range marks instead of by
    difference.
    """

    phase: str
    unit: str
    latency_s: Estimate
    latency_samples_s: list[float]
    energy_j: Estimate | None
    energy_samples_j: list[float]
    latency_by_ranges_s: Estimate
    energy_by_ranges_j: Estimate | None
    celsius_samples: list[float] = field(default_factory=list)

    def temperature_c(self) -> float | None:
        """Return the °C at which the idle floor of all rounds together is that of its windows, None without any."""
        celsius, seconds = np.array(self.celsius_samples), np.array(self.latency_samples_s)
        known = np.isfinite(celsius)
        if not known.any():
            return None
        weights = np.maximum(seconds[known], 0.0)
        return float(np.average(celsius[known], weights=weights if weights.sum() > 0 else None))


@dataclass(frozen=True)
class Weighed:
    """Pass *weigh* of one sensor: phases, the idle floor, and the books of the whole pass in J.

    ``counter_j`` is what the counter moved from the first window's tick to the last window's; ``windows_j`` of it was
    spent in the windows, ``idle_j`` is floor x the time between them, and ``residual_j`` what is left.
    ``sensors`` is what the self-test says of each source of power (see calibrate).
    ``samples_j`` is the integral of the faster power samples over the same time, None without them, and
    ``sample_lag_ms`` by how much they come late.
    """

    phases: dict[str, PhaseWeight]
    floor: Floor | None
    temperature_c: float | None
    # Of each phase (see PhaseWeight.temperature_c): a prefill heats the die by several degrees more.
    phase_c: dict[str, float | None] = field(default_factory=dict)
    # The mean SM clock there.
    clock_mhz: dict[str, float | None] = field(default_factory=dict)
    counter_j: float | None = None
    windows_j: float | None = None
    idle_j: float | None = None
    residual_j: float | None = None
    samples_j: float | None = None
    sample_lag_ms: float | None = None
    sensors: dict[str, Sensor] = field(default_factory=dict)
    # Phases whose latency cannot be told from nothing, with the sentence that says why.
    unknown: dict[str, str] = field(default_factory=dict)
    # A prefill of the prompt set, by the mean of its batches; None where there is none.
    prompt_set: PhaseWeight | None = None

    def temperature_of(self, phase: str) -> float | None:
        """Return the mean °C in the windows of *phase*, of all where that is not known."""
        celsius = self.phase_c.get(phase)
        return self.temperature_c if celsius is None else celsius

    def floor_of(self, phase: str) -> Estimate | None:
        """Return the idle floor in W at the temperature of *phase*."""
        return None if self.floor is None else self.floor.at(self.temperature_of(phase))


def weigh_phases(run: RunFolder, sensor: str, device: int | None) -> Weighed | None:
    """Return pass *weigh* of *run* with the energy of *sensor* on *device* (None: summed over devices).

    None when the run has no complete round of windows. Raises RunFolderError where a window or generation is there
    twice.
    """
    ranges = run.table("ranges")
    # The board rested before and after this pass, and once more after the replays, when it was warmer.
    idle = ranges[ranges["category"] == "idle"]
    ranges = ranges[ranges["pass"] == "weigh"]
    _check_once(run, ranges)
    power = run.table("power")
    if device is not None:
        power = power[power["device"] == device]
    curve = counter_of(run, sensor, device)
    temperature = power.dropna(subset=["temperature_c"]).sort_values("timestamp_ns")
    windows = ranges[ranges["category"] == WINDOW].sort_values("start_ns")
    sets = ranges[ranges["category"] == PROMPT_SET].sort_values("start_ns")
    generations = ranges[ranges["category"] == "generate"].sort_values("start_ns")
    if windows.empty or generations.empty:
        return None
    mean_c = mean_temperature(temperature, pd.concat([windows, sets]))
    floor = measure_floor(curve, idle, temperature) if curve is not None else None
    measured = _measure_windows(windows, generations, curve, floor, temperature)
    of_sets = _measure_windows(sets, generations, curve, floor, temperature)
    every = pd.concat([measured, of_sets]) if len(of_sets) else measured
    books = _books(every, curve, floor, mean_c, power)
    longest = ranges["new_tokens"].max()
    marks = ranges[(ranges["category"] == "phase") & (ranges["new_tokens"] == longest)]
    by_ranges = None
    sensors = calibrate(run)
    # Where only windows were weighed no sensor was tried that could tell parts of them apart.
    if curve is not None and not run.facts.options.weigh_only:
        # Without a self-test (an older run, a CPU) the samples are taken where there are any.
        fine = device is not None and (not sensors or choose(sensors)[0] == "samples")
        sample_ns, sample_w = _samples(curve, power if fine else power.iloc[:0], books)
        by_ranges = energy_by_ranges(sample_ns, sample_w, windows[windows["new_tokens"] == longest], marks)
    phases, unknown = known_phases(_phases(measured, marks, by_ranges))
    if not phases and not unknown:
        return None
    lag_ms = by_ranges.lag_ms if by_ranges is not None else None
    own = {name: windows[windows["new_tokens"] == tokens] for name, tokens in ((PREFILL, 1), (DECODE, longest))}
    warm = {name: weight.temperature_c() for name, weight in phases.items()}
    clocks = {name: mean_reading(temperature, spans, "sm_clock_mhz") for name, spans in own.items()}
    return Weighed(
        phases,
        floor,
        mean_c,
        warm,
        clocks,
        **books,
        sample_lag_ms=lag_ms,
        sensors=sensors,
        unknown=unknown,
        prompt_set=_of_prompt_set(of_sets),
    )


def _check_once(run: RunFolder, ranges: pd.DataFrame) -> None:
    """Raise RunFolderError where a window, generation or phase begins twice: it would count twice in a mean."""
    own = ranges[ranges["category"].isin((WINDOW, PROMPT_SET, GENERATE, PHASE))]
    twice = own[own.duplicated(["category", "start_ns"])]
    if len(twice):
        first = twice.iloc[0]
        raise RunFolderError(
            f"{run.path / 'ranges.parquet'} has {first['category']} {first['name']!r} at {first['start_ns']} ns twice: "
            "the file was changed or damaged after it was recorded: restore it, or trace the run again."
        )


def known_phases(phases: dict[str, PhaseWeight]) -> tuple[dict[str, PhaseWeight], dict[str, str]]:
    """Return the phases of which something is known, and for the others a sentence that says why not.

    A latency or energy by difference that its interval does not keep from zero is no figure that anything can rest on:
    without a latency there is no phase, without an energy there is time only.
    """
    known: dict[str, PhaseWeight] = {}
    unknown: dict[str, str] = {}
    for name, weight in phases.items():
        if not _known(name, weight.latency_s, weight.latency_samples_s):
            unknown[name] = (
                f"The latency of {name} is not known: by difference it is {with_interval(weight.latency_s, 's')} per "
                f"{weight.unit}, which holds zero; use more --new-tokens and --repeats 10."
            )
            continue
        energy_j = weight.energy_j
        if energy_j is not None and not _known(name, energy_j, weight.energy_samples_j):
            unknown[f"{name} energy"] = (
                f"The energy of {name} is not known: by difference it is {with_interval(energy_j, 'J')} per "
                f"{weight.unit}, which holds zero; use more --new-tokens and --repeats 10."
            )
            nothing = [float("nan")] * len(weight.energy_samples_j)
            weight = replace(weight, energy_j=None, energy_samples_j=nothing, energy_by_ranges_j=None)
        known[name] = weight
    return known, unknown


def _known(phase: str, estimate: Estimate, samples: list[float]) -> bool:
    if phase == PREFILL:
        # Weighed directly: what was measured was there.
        return estimate.value > 0
    if estimate.low is None:
        return all(value > 0 for value in samples if value == value)
    return estimate.is_known and estimate.low > 0


def _not_below_zero(phase: str, estimate: Estimate) -> Estimate:
    """Return *estimate* of what was weighed directly, which no interval can take below zero."""
    return estimate if phase != PREFILL else estimate.map(lambda values: np.maximum(values, 0.0))


def traced_phases(timeline: Timeline) -> dict[str, PhaseWeight]:
    """Return the phases of *timeline* from their first kernel to their last, for a capture with nothing weighed beside.

    Ranges of other tools need not hold the work that they launch: the host may be ahead of the device.
    """
    units = {} if timeline.forwards.empty else {"prefill": "call", "decode": "token"}
    found = {}
    for phase, spans in timeline.phases.groupby("phase", sort=False, observed=True):
        latency_s = ((spans["busy_ns"] + spans["gap_ns"]) / 1e9 / spans["tokens"]).to_list()
        latency = from_samples(latency_s)
        if latency.value <= 0:
            # Records of no length: no share of it is anything.
            continue
        unknown = [float("nan")] * len(latency_s)
        unit = units.get(str(phase), "range" if phase in ("prefill", "decode") else str(phase))
        found[str(phase)] = PhaseWeight(str(phase), unit, latency, latency_s, None, unknown, latency, None)
    return found


def _samples(curve: EnergyCurve, power: pd.DataFrame, books: dict[str, float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return times in ns and mean powers in W: the driver's samples in the counter's scale, or else its own ticks."""
    samples = power[power["sensor"] == "samples"].sort_values("timestamp_ns")
    if len(samples) > 1:
        counter_j, samples_j = books.get("counter_j"), books.get("samples_j")
        scale = counter_j / samples_j if counter_j and samples_j else 1.0
        return samples["timestamp_ns"].to_numpy(), samples["power_mw"].to_numpy(float) / 1e3 * scale
    watts = np.diff(curve.tick_j, prepend=np.nan) / (np.diff(curve.tick_ns, prepend=0) / 1e9)
    return curve.tick_ns, watts


def _measure_windows(
    windows: pd.DataFrame,
    generations: pd.DataFrame,
    curve: EnergyCurve | None,
    floor: Floor | None,
    temperature: pd.DataFrame,
) -> pd.DataFrame:
    """Return a row per window: round, new_tokens, repeats, latency_s and energy_j of one generation, °C, and its ticks.

    A board warms up by ten degrees over the first rounds, and its floor by as many watts: each window has its own.
    """
    rows = []
    for window in windows.itertuples():
        inside = generations[(generations["start_ns"] >= window.start_ns) & (generations["end_ns"] <= window.end_ns)]
        if inside.empty:
            continue
        start_ns, end_ns = int(inside["start_ns"].iloc[0]), int(inside["end_ns"].iloc[-1])
        latency_s = float((inside["end_ns"] - inside["start_ns"]).mean()) / 1e9
        celsius = mean_temperature(temperature, pd.DataFrame({"start_ns": [start_ns], "end_ns": [end_ns]}))
        row = {
            "round": window.round,
            "new_tokens": window.new_tokens,
            "repeats": len(inside),
            "latency_s": latency_s,
            "work_s": (end_ns - start_ns) / 1e9,
            "work_j": np.nan,
            "celsius": np.nan if celsius is None else celsius,
            "tick_before_ns": 0,
            "tick_after_ns": 0,
        }
        framed = curve.window(start_ns, end_ns) if curve is not None else None
        if framed is not None:
            before_ns, after_ns, joule = framed
            edges_s = (after_ns - before_ns - (end_ns - start_ns)) / 1e9
            floor_w = floor.at(celsius).value if floor is not None else 0.0
            row |= {
                "work_j": joule - floor_w * edges_s,
                "tick_before_ns": before_ns,
                "tick_after_ns": after_ns,
            }
        rows.append(row)
    frame = pd.DataFrame(rows)
    if not frame.empty:
        frame["energy_j"] = frame["work_j"] / frame["repeats"]
    return frame


def _phases(measured: pd.DataFrame, marks: pd.DataFrame, by_ranges: ByRanges | None) -> dict[str, PhaseWeight]:
    """Return prefill = generate(1) and decode = (generate(n) - generate(1)) / (n - 1), round by round."""
    if measured.empty:
        return {}
    longest = int(measured["new_tokens"].max())
    short = measured[measured["new_tokens"] == 1].set_index("round")
    long = measured[measured["new_tokens"] == longest].set_index("round")
    rounds = short.index.intersection(long.index)
    if longest < 2 or rounds.empty:
        return {}
    short, long = short.loc[rounds], long.loc[rounds]
    per_token = longest - 1
    decode_s = (long["latency_s"] - short["latency_s"]) / per_token
    decode_j = (long["energy_j"] - short["energy_j"]) / per_token
    prefill = _phase("prefill", "call", short["latency_s"], short["energy_j"], marks, by_ranges, 1)
    decode = _phase("decode", "token", decode_s, decode_j, marks, by_ranges, per_token)
    return {
        "prefill": replace(prefill, celsius_samples=short["celsius"].to_list()),
        "decode": replace(decode, celsius_samples=_by_difference_c(short, long).to_list()),
    }


def _of_prompt_set(measured: pd.DataFrame) -> PhaseWeight | None:
    """Return what prefills of the prompt set take in the mean of its batches, round by round."""
    if measured.empty:
        return None
    latency_s, energy_j = measured["latency_s"], measured["energy_j"]
    seconds, known = from_samples(latency_s.to_list()), energy_j.dropna().to_list()
    joules = from_samples(known) if known else None
    return PhaseWeight(PROMPT_SET, "batch", seconds, latency_s.to_list(), joules, energy_j.to_list(), seconds, joules)


def _by_difference_c(short: pd.DataFrame, long: pd.DataFrame) -> pd.Series:
    """Return per round the °C at which the floor of decode is that of the *long* window less the *short* one's."""
    warmth = long["celsius"] * long["latency_s"] - short["celsius"] * short["latency_s"]
    celsius = warmth / (long["latency_s"] - short["latency_s"])
    # Where the two hardly differ that is anything: no colder or warmer than the windows were.
    both = pd.concat([short["celsius"], long["celsius"]], axis=1)
    return celsius.clip(both.min(axis=1) - _MOST_BEYOND_C, both.max(axis=1) + _MOST_BEYOND_C)


def _phase(
    phase: str,
    unit: str,
    latency_s: pd.Series,
    energy_j: pd.Series,
    marks: pd.DataFrame,
    by_ranges: ByRanges | None,
    steps: int,
) -> PhaseWeight:
    spans = marks[marks["phase"] == phase]
    # Rounds are the independent samples: repeats inside one share its ticks.
    lengths_s = (spans["end_ns"] - spans["start_ns"]) / 1e9 / steps
    by_round = lengths_s.groupby(spans["round"]).mean()
    joule = by_ranges.energy_j.get(phase, []) if by_ranges is not None else []
    known = energy_j.dropna()
    return PhaseWeight(
        phase,
        unit,
        _not_below_zero(phase, from_samples(latency_s.to_list())),
        latency_s.to_list(),
        _not_below_zero(phase, from_samples(known.to_list())) if len(known) else None,
        energy_j.to_list(),
        from_samples(by_round.to_list()) if len(by_round) else from_samples(latency_s.to_list()),
        from_samples([j / steps for j in joule]) if joule else None,
    )


def _books(
    measured: pd.DataFrame, curve: EnergyCurve | None, floor: Floor | None, mean_c: float | None, power: pd.DataFrame
) -> dict[str, float | None]:
    framed = measured[measured["tick_after_ns"] > 0]
    if curve is None or floor is None or framed.empty:
        return {}
    first_ns, last_ns = int(framed["tick_before_ns"].min()), int(framed["tick_after_ns"].max())
    counter_j = float(curve.at(last_ns) - curve.at(first_ns))
    windows_j = float(framed["work_j"].sum())
    idle_j = floor.at(mean_c).value * ((last_ns - first_ns) / 1e9 - float(framed["work_s"].sum()))
    samples = power[power["sensor"] == "samples"].sort_values("timestamp_ns")
    samples_j = None
    if len(samples) > 1:
        times, watts = samples["timestamp_ns"].to_numpy(), samples["power_mw"].to_numpy() / 1e3
        if times[0] <= first_ns and times[-1] >= last_ns:
            sums = np.concatenate([[0.0], np.cumsum(watts[1:] * np.diff(times) / 1e9)])
            samples_j = float(np.interp(last_ns, times, sums) - np.interp(first_ns, times, sums))
    return {
        "counter_j": counter_j,
        "windows_j": windows_j,
        "idle_j": idle_j,
        "residual_j": counter_j - windows_j - idle_j,
        "samples_j": samples_j,
    }
