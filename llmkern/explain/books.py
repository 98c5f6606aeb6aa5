"""What closes the books of a run, and what its sensors, replays and recorder did, each with its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.energy.phases import Weighed
from llmkern.attribute.energy.sensors import choose, describe
from llmkern.text import quantity, signed, with_interval


@dataclass(frozen=True)
class Book:
    """One entry: a *sentence* and its *values*, with units in their names."""

    name: str
    sentence: str
    values: dict[str, Any]


# By how much counters of boards differ: Yang, Adámek and Armour, SC24, arXiv:2312.02741.
GAIN_SHARE = 0.05


def books(attribution: Attribution) -> list[Book]:
    """Return the entries that the run allows."""
    found = []
    weighed = attribution.weighed
    if weighed is not None:
        found += _weighed(weighed)
    if weighed is not None and weighed.sensors:
        source, why = choose(weighed.sensors)
        sensors = {
            name: {"refresh_ms": s.refresh_ms, "lag_ms": s.lag_ms, "window_ms": s.window_ms, "step_w": s.step_w}
            for name, s in weighed.sensors.items()
        }
        told = "; ".join(map(describe, weighed.sensors.values()))
        found.append(Book("sensors", f"Sensor test: {told}.", sensors))
        found.append(Book("source", f"Times within a phase by the {source}: {why}.", {"source": source}))
    if weighed is not None and "decode" in weighed.phases:
        found.append(_two_ways(weighed))
    return [*found, *_replays(attribution), *_recording(attribution)]


def _weighed(weighed: Weighed) -> list[Book]:
    if weighed.counter_j is None or weighed.residual_j is None:
        return []
    share = weighed.residual_j / weighed.counter_j
    found = [
        Book(
            "weigh_pass",
            f"Whole weigh pass: counter {quantity(weighed.counter_j, 'J')} = "
            f"windows {quantity(weighed.windows_j, 'J')} + idle between them {quantity(weighed.idle_j, 'J')} "
            f"+ residual {quantity(weighed.residual_j, 'J')} "
            f"({share:+.2%}).",
            {
                "counter_j": weighed.counter_j,
                "windows_j": weighed.windows_j,
                "idle_j": weighed.idle_j,
                "residual_j": weighed.residual_j,
                "residual_share": share,
            },
        ),
        Book(
            "gain",
            f"All joules have the gain of this board's counter, off by up to {GAIN_SHARE:.0%}; it cancels in shares "
            "and ratios.",
            {"gain_share": GAIN_SHARE},
        ),
    ]
    if weighed.samples_j is not None:
        apart = weighed.samples_j / weighed.counter_j - 1
        late = "" if weighed.sample_lag_ms is None else f" and come {weighed.sample_lag_ms:.0f} ms late"
        found.append(
            Book(
                "power_samples",
                f"The driver's power samples integrate to {apart:+.2%} of the counter{late}.",
                {"samples_j": weighed.samples_j, "apart_share": apart, "lag_ms": weighed.sample_lag_ms},
            )
        )
    floor, mean_c = weighed.floor, weighed.temperature_c
    if floor is not None and mean_c is not None:
        slope = f"{floor.slope_w_per_c:.2f} W/°C"
        floor_w = floor.at(mean_c)
        found.append(
            Book(
                "idle_floor",
                f"Idle floor {with_interval(floor_w, 'W')} at the run's {mean_c:.0f} °C, from {floor.samples} idle "
                f"samples, {slope} {'measured' if floor.slope_is_measured else 'mostly assumed'}.",
                {
                    "floor_w": floor_w,
                    "temperature_c": mean_c,
                    "samples": floor.samples,
                    "slope_w_per_c": floor.slope_w_per_c,
                    "slope_is_measured": floor.slope_is_measured,
                },
            )
        )
    return found


def _two_ways(weighed: Weighed) -> Book:
    decode = weighed.phases["decode"]
    values = {"latency_apart_share": decode.latency_by_ranges_s.value / decode.latency_s.value - 1}
    text = f"latency {values['latency_apart_share']:+.2%}"
    if decode.energy_by_ranges_j is not None and decode.energy_j is not None:
        values["energy_apart_share"] = decode.energy_by_ranges_j.value / decode.energy_j.value - 1
        text += f", energy {values['energy_apart_share']:+.2%}"
    return Book("two_ways", f"Decode by ranges against generate(n) - generate(1): {text}.", values)


def _replays(attribution: Attribution) -> list[Book]:
    marginals = attribution.marginals
    if marginals is None:
        return []
    replays = attribution.run.table("replays", ["signature", "kernel"]).drop_duplicates()
    operators, alone = int(replays["kernel"].isna().sum()), int(replays["kernel"].notna().sum())
    values: dict[str, Any] = {"operators": operators, "kernels": alone, "condition_number": marginals.condition}
    shares = []
    for phase in attribution.accounts:
        rows = attribution.kernels_of(phase)
        own_ns = float(rows.loc[rows["kernel_class"].isin(marginals.replayed), "duration_ns"].sum())
        share = own_ns / max(float(rows["duration_ns"].sum()), 1.0)
        values[phase] = {"time_share": share}
        shares.append(f"{phase} {share:.0%}")
    told = (
        f"Replayed: {operators} operators, and {alone} of their kernels alone; told apart are, of the kernels' time: "
    )
    return [Book("replays", f"{told}{', '.join(shares)}.", values), *_closure(attribution)]


def _closure(attribution: Attribution) -> list[Book]:
    """Return what idle floor and replays alone, which have not seen the run, say against the counter."""
    values = {
        phase: {
            "error_share": closure.error.value,
            "low": closure.error.low,
            "high": closure.error.high,
            "guessed_share": closure.guessed_share,
        }
        for phase, closure in attribution.closures.items()
    }
    if not values:
        return []
    told = ", ".join(f"{phase} {signed(closure.error)}" for phase, closure in attribution.closures.items())
    return [Book("closure", f"Predicted from the idle floor and replays alone, against the counter: {told}.", values)]


def _recording(attribution: Attribution) -> list[Book]:
    facts = attribution.run.facts
    found = []
    cost = facts.own_cost
    if cost is not None:
        shares = {"sensors_share": cost.sensors_s / cost.wall_s, "writing_share": cost.pump_s / cost.wall_s}
        whole = (cost.pump_s + cost.sensors_s) / cost.wall_s
        found.append(
            Book(
                "own_cost",
                f"While windows were weighed, llmkern's own threads can have held up the launches for {whole:.2%} of "
                f"the time at most (sensors {shares['sensors_share']:.2%}, writing {shares['writing_share']:.2%}).",
                {"share": whole, **shares},
            )
        )
    recorder = facts.recorder
    if recorder is not None:
        found.append(
            Book(
                "recorder",
                f"Recorder: {recorder.source}, {recorder.kernels:,} kernels, {recorder.launches:,} host calls, "
                f"{recorder.dropped_records} dropped.",
                {
                    "source": recorder.source,
                    "kernels": recorder.kernels,
                    "launches": recorder.launches,
                    "dropped_records": recorder.dropped_records,
                },
            )
        )
    clock = facts.clock
    if clock is not None:
        found.append(
            Book(
                "clock",
                f"The wall clock kept step with the monotonic one to {clock.largest_change_ns / 1e3:,.0f} µs between "
                f"two of {clock.looks} looks.",
                {"largest_change_ns": clock.largest_change_ns, "looks": clock.looks},
            )
        )
    if facts.elapsed_s:
        text = f"From command to run folder: {facts.elapsed_s:.0f} s."
        found.append(Book("elapsed", text, {"elapsed_s": facts.elapsed_s}))
    return found
