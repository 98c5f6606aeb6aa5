"""What the device did in each phase: kernels with their phase and token step, busy time, gaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Timeline:
    """The traced generations of one device.

    ``kernels``: rows of table kernels with phase, instance (index into ``phases``) and token.
    ``phases``: one row per traced phase: phase, repeat, start_ns, end_ns, wall_ns, tokens, kernels, busy_ns, gap_ns.
    ``gaps``: start_ns, duration_ns, phase, instance, token, before, after (kernel names), kernel (the position in
    ``kernels`` of the one that ended it).
    ``outside``: kernels that belong to no phase.
    """

    kernels: pd.DataFrame
    phases: pd.DataFrame
    gaps: pd.DataFrame
    outside: int


def build_timeline(
    kernels: pd.DataFrame, launches: pd.DataFrame, ranges: pd.DataFrame, device: int, pass_name: str = "time"
) -> Timeline:
    """Assign every kernel of pass *pass_name* to the phase and token step during which the host launched it.

    A kernel whose launch was not recorded (pass ``time`` records none) counts by its own start: a generation reads
    every token back, so the device has run dry where a step begins. Gaps are the time within a phase in which no
    kernel, copy or memset ran on any stream of *device*, between its first and its last.
    """
    kernels, launches, ranges = (t[t["pass"] == pass_name] for t in (kernels, launches, ranges))
    kernels = kernels[kernels["device"] == device].sort_values("start_ns", kind="stable").reset_index(drop=True)
    phases = _of_category(ranges, "phase")
    tokens = _of_category(ranges, "token")
    issued_ns = _issued(kernels, launches)
    instance = _containing(issued_ns, phases)
    token = _containing(issued_ns, _until_next(tokens, phases))
    kernels = kernels.assign(
        issued_ns=issued_ns,
        instance=instance,
        phase=_lookup(phases["phase"], instance).astype("category"),
        token=_lookup(tokens["token"], token),
    )
    inside = kernels[kernels["instance"] >= 0]
    # Nanoseconds since 1970 do not fit a float's 53 bits; nanoseconds since the first kernel do.
    base_ns = int(inside["start_ns"].min()) if len(inside) else 0
    start = (inside["start_ns"] - base_ns).to_numpy(float)
    end = (inside["end_ns"] - base_ns).to_numpy(float)
    previous_end = _previous_end(inside["instance"], end)
    first = np.isinf(previous_end)
    idle = np.where(first, 0.0, start - previous_end)
    busy = np.where(first, end - start, np.maximum(0.0, end - np.maximum(start, previous_end)))
    by_instance = inside["instance"].to_numpy()
    count = len(phases)
    phases = phases.assign(
        wall_ns=phases["end_ns"] - phases["start_ns"],
        tokens=_tokens_in(phases),
        kernels=np.bincount(by_instance, minlength=count),
        busy_ns=np.bincount(by_instance, busy, minlength=count),
        gap_ns=np.bincount(by_instance, np.maximum(0.0, idle), minlength=count),
    )
    return Timeline(inside, phases, _gaps(inside, idle, previous_end, base_ns), int((kernels["instance"] < 0).sum()))


def _of_category(ranges: pd.DataFrame, category: str) -> pd.DataFrame:
    rows = ranges[ranges["category"] == category]
    return rows.sort_values("start_ns", kind="stable").reset_index(drop=True)


def _tokens_in(phases: pd.DataFrame) -> np.ndarray:
    """Tokens that a phase computed: one in prefill, the others in decode."""
    return np.where(phases["phase"] == "prefill", 1, phases["new_tokens"].fillna(1) - 1).astype(int)


def _until_next(tokens: pd.DataFrame, phases: pd.DataFrame) -> pd.DataFrame:
    """Return the token steps lengthened to the start of the next, or to the end of their phase.

    What runs between two forwards (sampling, stopping criteria) belongs to the token before.
    """
    if tokens.empty:
        return tokens
    start = tokens["start_ns"].to_numpy()
    following = np.append(start[1:], np.iinfo(np.int64).max)
    own = _containing(start, phases)
    phase_end = np.where(own >= 0, phases["end_ns"].to_numpy()[np.maximum(own, 0)], tokens["end_ns"].to_numpy())
    return tokens.assign(end_ns=np.minimum(following, phase_end))


def _issued(kernels: pd.DataFrame, launches: pd.DataFrame) -> np.ndarray:
    """Return the host time in ns at which each kernel was launched."""
    if launches.empty:
        return kernels["start_ns"].to_numpy()
    calls = launches.drop_duplicates("correlation_id").set_index("correlation_id")["start_ns"]
    issued = kernels["correlation_id"].map(calls)
    return issued.fillna(kernels["start_ns"]).to_numpy().astype(np.int64)


def _containing(times_ns: np.ndarray, spans: pd.DataFrame) -> np.ndarray:
    """Return the index of the span (sorted, not overlapping) that holds each time, -1 for none."""
    if spans.empty:
        return np.full(len(times_ns), -1)
    index = np.searchsorted(spans["start_ns"].to_numpy(), times_ns, side="right") - 1
    inside = (index >= 0) & (times_ns <= spans["end_ns"].to_numpy()[np.maximum(index, 0)])
    return np.where(inside, index, -1)


def _lookup(values: pd.Series, index: np.ndarray) -> pd.Series:
    padded = values.astype(object).to_numpy() if len(values) else np.array([None], object)
    found = np.where(index >= 0, padded[np.maximum(index, 0)], None)
    return pd.Series(found)


def _previous_end(instance: pd.Series, end_ns: np.ndarray) -> np.ndarray:
    """Return for each kernel the latest end of all before it in its phase, -inf for the first."""
    latest = pd.Series(end_ns, instance.index).groupby(instance, sort=False).cummax()
    return latest.groupby(instance, sort=False).shift().fillna(-np.inf).to_numpy()


def _gaps(kernels: pd.DataFrame, idle_ns: np.ndarray, previous_end: np.ndarray, base_ns: int) -> pd.DataFrame:
    names = kernels["name"].astype("category")
    # Codes shift faster than strings.
    codes = names.cat.codes.groupby(kernels["instance"], sort=False).shift(fill_value=-1).to_numpy()
    open_ = idle_ns > 0
    return pd.DataFrame(
        {
            "start_ns": previous_end[open_].astype(np.int64) + base_ns,
            "duration_ns": idle_ns[open_],
            "phase": kernels["phase"].to_numpy()[open_],
            "instance": kernels["instance"].to_numpy()[open_],
            "token": kernels["token"].to_numpy()[open_],
            "before": pd.Categorical.from_codes(codes[open_], categories=pd.Index(names.cat.categories)),
            "after": names.array[open_],
            "kernel": np.flatnonzero(open_),
        }
    )
