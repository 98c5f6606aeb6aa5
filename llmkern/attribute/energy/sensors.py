"""What each power sensor of a board made of a load of known times: how often it refreshes, how late, how blurred."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmkern.runfolder import RunFolder

COUNTER = "counter"
LAGS_S = np.arange(0.0, 0.2001, 0.005)
WINDOWS_S = (0.005, 0.01, 0.02, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0)
# Power steps below this are lost in the noise of an idle board.
LEAST_STEP_W = 10.0
LEAST_READINGS = 8
# A sensor that sees less than this share of the load's step, or more than 1/share, shows something else.
LEAST_SHARE = 0.8
# Finer than this and a phase of some tens of ms can be told from what is around it.
FINE_MS = 50.0


@dataclass(frozen=True)
class Sensor:
    """One source: *refresh_ms* between new values, *lag_ms* by which they come late, *window_ms* they are means of.

    *step_w* is how much higher it read under the load, *error_w* the scatter about that response; *step_w*, lag and
    window are None where the load could not be seen, *refresh_ms* with fewer than two readings.
    """

    name: str
    refresh_ms: float | None
    lag_ms: float | None
    window_ms: float | None
    step_w: float | None
    error_w: float | None
    readings: int


def calibrate(run: RunFolder) -> dict[str, Sensor]:
    """Return what the sensor self-test of *run* says of each source of device power; empty without one."""
    ranges = run.table("ranges")
    test = ranges[(ranges["category"] == "selftest")]
    if test.empty:
        return {}
    device = run.facts.device.index
    start_ns, end_ns = int(test["start_ns"].min()), int(test["end_ns"].max())
    load = ranges[ranges["category"] == "load"]
    on = (load["start_ns"].to_numpy() - start_ns) / 1e9, (load["end_ns"].to_numpy() - start_ns) / 1e9
    found = {}
    power = run.table("power")
    power = power[(power["device"] == device) & power["timestamp_ns"].between(start_ns, end_ns)]
    for name, rows in power.groupby(power["sensor"].astype(str)):
        times, watts = (rows["timestamp_ns"].to_numpy() - start_ns) / 1e9, rows["power_mw"].to_numpy(float) / 1e3
        if name != "samples":
            # A field holds its value until the next; what counts is when it changed.
            fresh = np.flatnonzero(np.diff(watts, prepend=np.nan) != 0)[1:]
            times, watts = times[fresh], watts[fresh]
        found[name] = respond(name, times, watts, on)
    energy = run.table("energy")
    energy = energy[(energy["device"] == device) & (energy["sensor"] == "nvml_total")]
    ticks = energy[energy["timestamp_ns"].between(start_ns, end_ns)].sort_values("timestamp_ns")
    times = (ticks["timestamp_ns"].to_numpy() - start_ns) / 1e9
    watts = np.diff(ticks["energy_mj"].to_numpy(float)) / 1e3 / np.maximum(np.diff(times), 1e-6)
    found[COUNTER] = respond(COUNTER, times[1:], watts, on)
    return found


def respond(name: str, times_s: np.ndarray, watts: np.ndarray, on: tuple[np.ndarray, np.ndarray]) -> Sensor:
    """Fit a delayed running mean to readings of a load that was *on* from and to the given times in s.

    reading(t) = rest + step x mean of the load over [t - lag - window, t - lag], by least squares over a grid of lags
    and windows (Yang, Adámek and Armour, SC24, arXiv:2312.02741, fit a boxcar in the same way).
    """
    order = np.argsort(times_s, kind="stable")
    times_s, watts = times_s[order], watts[order]
    refresh_ms = float(np.median(np.diff(times_s)) * 1e3) if len(times_s) > 1 else None
    blind = Sensor(name, refresh_ms, None, None, None, None, len(times_s))
    if len(times_s) < LEAST_READINGS:
        return blind
    edges = np.sort(np.concatenate(on))
    level = np.concatenate([[0.0], np.cumsum(np.diff(edges) * (np.arange(len(edges) - 1) % 2 == 0))])
    best: tuple[float, float, float, float] | None = None
    until = times_s - LAGS_S[:, None]
    covered = np.interp(until, edges, level)
    for window_s in WINDOWS_S:
        share = (covered - np.interp(until - window_s, edges, level)) / window_s
        centred = share - share.mean(axis=1, keepdims=True)
        size = (centred**2).sum(axis=1)
        seen = size >= 1e-6
        step_w = (centred @ watts)[seen] / size[seen]
        error_w = np.sqrt(np.mean((watts - watts.mean() - step_w[:, None] * centred[seen]) ** 2, axis=1))
        if len(error_w) and (best is None or error_w.min() < best[0]):
            i = int(error_w.argmin())
            best = (float(error_w[i]), float(step_w[i]), float(LAGS_S[seen][i]), window_s)
    if best is None or best[1] < LEAST_STEP_W:
        return blind
    least_w, height_w, lag_s, window_s = best
    return Sensor(name, refresh_ms, lag_s * 1e3, window_s * 1e3, height_w, least_w, len(times_s))


def choose(sensors: dict[str, Sensor]) -> tuple[str, str]:
    """Return the source for times within a phase (``samples`` or ``counter``), and in words why."""
    samples, counter = sensors.get("samples"), sensors.get(COUNTER)
    if samples is None or samples.step_w is None or samples.refresh_ms is None:
        return COUNTER, "this board's driver keeps no power samples that follow the load"
    if samples.refresh_ms > FINE_MS:
        return COUNTER, f"its power samples come every {samples.refresh_ms:.0f} ms, no finer than the counter"
    if counter is not None and counter.step_w is not None:
        share = samples.step_w / counter.step_w
        if not LEAST_SHARE <= share <= 1 / LEAST_SHARE:
            return COUNTER, f"its power samples show {share:.0%} of the load that the counter shows"
    return "samples", f"its power samples come every {samples.refresh_ms:.0f} ms and follow the load"


def describe(sensor: Sensor) -> str:
    """Return one sensor in words."""
    if sensor.refresh_ms is None:
        return f"{sensor.name} silent"
    if sensor.step_w is None:
        every = f"{sensor.name} every {sensor.refresh_ms:.0f} ms"
        return f"{every}, its step under the load below {LEAST_STEP_W:.0f} W and lost in its noise"
    late = f"{sensor.lag_ms:.0f} ms late, mean over {sensor.window_ms:.0f} ms"
    return f"{sensor.name} every {sensor.refresh_ms:.0f} ms, {late}"
