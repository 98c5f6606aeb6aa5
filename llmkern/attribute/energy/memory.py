"""The energy of the device's memory (HBM), from NVML's memory scope: a mean over one second."""

from __future__ import annotations

import numpy as np

from llmkern.attribute.energy.phases import Weighed
from llmkern.estimate import Estimate, from_samples
from llmkern.runfolder import RunFolder

SENSOR = "memory_average"
# A reading is the mean of the second before it: earlier ones in a window still hold what was before.
MEAN_OVER_S = 1.0


def memory_energy(run: RunFolder, weighed: Weighed, device: int | None) -> dict[str, Estimate]:
    """Return the J of the memory per unit of each phase, its idle power included.

    By difference, like the whole: prefill from the windows of generate(1), decode from those of generate(n) less a
    prefill. Empty where the board has no memory scope, or its windows are too short for a mean over a second.
    """
    power = run.table("power")
    readings = power[(power["sensor"] == SENSOR) & (power["device"] == device)]
    ranges = run.table("ranges")
    windows = ranges[(ranges["category"] == "window") & (ranges["pass"] == "weigh")]
    if readings.empty or windows.empty or not {"prefill", "decode"} <= set(weighed.phases):
        return {}
    times, watts = readings["timestamp_ns"].to_numpy(), readings["power_mw"].to_numpy(float) / 1e3
    longest = int(windows["new_tokens"].max())
    by_round: dict[bool, dict[int, float]] = {True: {}, False: {}}
    for window in windows.to_dict("records"):
        settled_ns = int(window["start_ns"]) + int(MEAN_OVER_S * 1e9)
        inside = (times >= settled_ns) & (times <= int(window["end_ns"]))
        if inside.any():
            by_round[int(window["new_tokens"]) == 1][int(window["round"])] = float(watts[inside].mean())
    prefill, decode = weighed.phases["prefill"], weighed.phases["decode"]
    prefill_s, tokens = prefill.latency_s.value, longest - 1
    generate_s = prefill_s + tokens * decode.latency_s.value
    both = sorted(set(by_round[True]) & set(by_round[False]))
    if not both:
        return {}
    alone, among = (np.array([by_round[short][r] for r in both]) for short in (True, False))
    return {
        "prefill": from_samples((alone * prefill_s).tolist()),
        "decode": from_samples(((among * generate_s - alone * prefill_s) / tokens).tolist()),
    }
