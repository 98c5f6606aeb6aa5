"""What the recorder changes, from generations with and without it that took turns."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llmkern.estimate import Estimate, student_t
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import BARE, DECODE, PHASE, PREFILL, RECORDED, TOKEN

# The first tokens after a switch are slower than those that follow.
SETTLING_TOKENS = 2
LEAST_PAIRS = 3
# Tokens that were issued within less than this share of a decode were not waited for one by one.
AHEAD = 0.5


def recorder_effects(run: RunFolder) -> dict[str, Estimate]:
    """Return by how much of itself each phase grew under the recorder, with its 95 % interval.

    The two generations of a pair lie next to each other; the mean of the logarithms of their ratios has Student's t.
    Phases with fewer than LEAST_PAIRS pairs are left out: nothing can be said of them.
    """
    ranges = run.table("ranges", ["pass", "start_ns", "end_ns", "category", "phase", "token", "repeat"])
    bare, recorded = (_lengths(ranges[ranges["pass"] == name]) for name in (BARE, RECORDED))
    found = {}
    for phase in (PREFILL, DECODE):
        both = sorted(set(bare[phase]) & set(recorded[phase]))
        if len(both) < LEAST_PAIRS:
            continue
        logs = np.log([recorded[phase][pair] / bare[phase][pair] for pair in both])
        half = float(student_t(len(logs) - 1, np.array(0.975)) * logs.std(ddof=1) / np.sqrt(len(logs)))
        middle = float(logs.mean())
        low, value, high = (float(np.expm1(x)) for x in (middle - half, middle, middle + half))
        found[phase] = Estimate(value, low, high, len(both))
    return found


def _lengths(ranges: pd.DataFrame) -> dict[str, dict[int, float]]:
    """Return per phase and pair the ns of a prefill, and the median ns from one decoded token to the next.

    Where the host is ahead of the device by more than a token, the mean ns of a decoded token.
    """
    found: dict[str, dict[int, float]] = {PREFILL: {}, DECODE: {}}
    numbered = ranges[ranges["repeat"].notna()]
    for pair in sorted(set(numbered["repeat"].astype(int))):
        rows = numbered[numbered["repeat"] == pair]
        prefill = rows[(rows["category"] == PHASE) & (rows["phase"] == PREFILL)]
        if len(prefill) == 1:
            length_ns = int(prefill["end_ns"].iloc[0] - prefill["start_ns"].iloc[0])
            if length_ns > 0:
                found[PREFILL][pair] = float(length_ns)
        tokens = rows[(rows["category"] == TOKEN) & (rows["token"] > SETTLING_TOKENS)].sort_values("token")
        decode = rows[(rows["category"] == PHASE) & (rows["phase"] == DECODE)]
        whole_ns = int((decode["end_ns"] - decode["start_ns"]).sum()) if len(decode) == 1 else 0
        if len(tokens) > 1 and int(tokens["start_ns"].iloc[-1] - tokens["start_ns"].iloc[0]) < AHEAD * whole_ns:
            # The host issued its tokens long before the device computed them: only the whole says how long they took.
            found[DECODE][pair] = whole_ns / (len(tokens) + SETTLING_TOKENS)
            continue
        steps_ns = np.diff(tokens["start_ns"].to_numpy())
        if len(steps_ns) and np.median(steps_ns) > 0:
            found[DECODE][pair] = float(np.median(steps_ns))
    return found
