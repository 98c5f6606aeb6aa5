"""Joules of each request of a server, also inside a shared batch: requests + idle = what the counter moved."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.energy.counter import EnergyCurve, between_ticks, counter_of
from llmkern.attribute.energy.floor import Floor, mean_temperature, measure_floor
from llmkern.errors import UsageError
from llmkern.estimate import LEAST_FOR_INTERVAL, Estimate, from_samples
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import IDLE, SERVE, WINDOW

# Iterations with less than so many ticks between them are weighed together: the counter cannot tell them apart.
_APART_TICKS = 3.0
# An interval wants several parts of a run that are apart from each other.
_BLOCKS = 10
# Points of a line over time.
_PARTS = 240


@dataclass(frozen=True)
class Served:
    """What a server did in one window and what it took; joules are None without an energy counter.

    ``requests`` has the rows of table requests with ``ttft_s`` and ``latency_s`` from the *intended* moment, and
    ``floor_j``, ``dynamic_j``, ``energy_j``; ``iterations`` has batch, prefill_tokens, decode_tokens and these three.
    ``counter_j`` = sum of the requests + ``unclaimed_j`` (iterations without a request) + ``idle_j`` (idle floor x the
    time in which none ran) + ``residual_j`` (what is left). ``drain_s`` and ``drain_j`` are of the time in which no
    request came any more.
    """

    requests: pd.DataFrame
    iterations: pd.DataFrame
    start_ns: int
    end_ns: int
    busy_s: float
    counter_j: float | None = None
    idle_j: float | None = None
    unclaimed_j: float = 0.0
    residual_j: float = 0.0
    drain_s: float = 0.0
    drain_j: float | None = None
    floor: Floor | None = None
    # At the temperature of the window.
    floor_w: Estimate | None = None
    # By time in flight, for the server's iterations were not seen.
    estimated: bool = False
    # ``second`` of the window and mean ``watts`` from there on; None without a counter.
    power: pd.DataFrame | None = None

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def requests_j(self) -> float:
        """Return the J of all requests together, answered or not."""
        return float(self.requests["energy_j"].sum())

    def per_request_j(self, *, with_idle: bool = True) -> Estimate | None:
        """Return the J of a finished request, with its share of the idle time or without.

        The interval is of up to ten blocks of requests one after the other: neighbours share batches, so that they are
        no samples of their own.
        """
        done = self.finished
        if self.counter_j is None or self.idle_j is None or done.empty:
            return None
        total = self.counter_j if with_idle else self.requests_j
        value = float(total / len(done))
        joules = done["energy_j"].to_numpy()
        own, rest = self.requests_j / len(done), (total - self.requests_j) / len(done)
        if not own:
            return Estimate(value, samples=1)
        # The blocks say how far the mean may be off, in shares of it; idle joules are of the whole run.
        spread = _over_blocks(joules, float(joules.mean()) or 1.0)
        if spread.draws is None:
            return Estimate(value, samples=spread.samples)
        # Few blocks say little, but never that a request takes less than nothing.
        return Estimate.of(value, rest + own * np.maximum(1 + spread.draws, 0.0))

    @property
    def finished(self) -> pd.DataFrame:
        """Return the requests that were answered, in the order in which they were to come."""
        return self.requests[self.requests["status"] == "finished"].sort_values(["intended_ns", "request"])


def relative(one: Served, other: Served) -> Estimate | None:
    """Return what a request takes in *one* as a multiple of what it takes in *other*; None without joules of both.

    Where both answered the same requests each is held against itself: that requests differ is then no doubt of the
    ratio (a ratio estimator over blocks of neighbours, linearized). Else the two intervals make that of the ratio.
    """
    first, second = one.per_request_j(), other.per_request_j()
    if first is None or second is None or not second.value > 0:
        return None
    key = ["request", "prompt_tokens", "output_tokens"]
    both = one.finished[[*key, "energy_j"]].merge(other.finished[[*key, "energy_j"]], on=key, suffixes=("", "_other"))
    if not len(both) == len(one.finished) == len(other.finished):
        return first.of_another_run().with_(second, np.divide)
    # Idle joules are of the whole run: everybody's share.
    left, right = (
        both[column].to_numpy() + mean.value - float(both[column].mean())
        for column, mean in (("energy_j", first), ("energy_j_other", second))
    )
    value = first.value / second.value
    spread = _over_blocks(left - value * right, second.value)
    if spread.draws is None:
        return Estimate(value, samples=spread.samples)
    return Estimate.of(value, np.maximum(value + spread.draws, 0.0), spread.samples)


def _over_blocks(values: np.ndarray, unit: float) -> Estimate:
    """Return by how many *unit* the mean of *values*, whose neighbours share batches, may be off: about 0."""
    blocks = np.array_split(values, min(_BLOCKS, len(values) // 2 or 1))
    spread = from_samples([float(block.mean()) / unit for block in blocks])
    if len(blocks) < LEAST_FOR_INTERVAL or spread.draws is None:
        return Estimate(0.0, samples=len(blocks))
    return Estimate.of(0.0, spread.draws - spread.value, len(blocks))


def served(run: RunFolder, sensor: str | None = None, device: int | None = None) -> Served:
    """Return what the server of *run* did and took; raises UsageError for a run that served nothing."""
    facts = run.facts.device
    sensor = sensor or facts.counter
    if device is None and "," not in run.facts.labels.get("gpus", ""):
        # Of a server on several GPUs all of them count.
        device = facts.counted
    ranges = run.table("ranges")
    ranges = ranges[ranges["pass"] == SERVE]
    windows = ranges[ranges["category"] == WINDOW]
    if windows.empty or not run.has("requests"):
        raise UsageError(f"{run.path} served no requests: make one with 'llmkern serve-study'.")
    start_ns, end_ns = int(windows["start_ns"].iloc[-1]), int(windows["end_ns"].iloc[-1])
    requests, iterations, processed = (run.table(name) for name in ("requests", "iterations", "processed"))
    estimated = iterations.empty and not requests.empty
    if estimated:
        iterations, processed = in_flight(requests)
    # What was warmed up with is none of it.
    iterations = iterations[(iterations["start_ns"] >= start_ns) & (iterations["end_ns"] <= end_ns)]
    iterations = iterations.sort_values("start_ns").reset_index(drop=True)
    processed = processed[processed["iteration"].isin(iterations["iteration"])]
    iterations = with_tokens(iterations, processed)
    requests = _timed(requests)
    busy_s = covered_s(iterations)
    last_ns = requests["sent_ns"].max()
    drain_from_ns = start_ns if pd.isna(last_ns) else int(min(max(last_ns, start_ns), end_ns))
    drain_s = (end_ns - drain_from_ns) / 1e9
    curve = counter_of(run, sensor, device)
    power = run.table("power")
    if device is not None:
        power = power[power["device"] == device]
    temperature = power.dropna(subset=["temperature_c"]).sort_values("timestamp_ns")
    floor = measure_floor(curve, ranges[ranges["category"] == IDLE], temperature) if curve is not None else None
    framed = None if curve is None or floor is None else curve.window(start_ns, end_ns)
    if curve is None or floor is None or framed is None:
        nothing = dict.fromkeys(("floor_j", "dynamic_j", "energy_j"), np.nan)
        unknown = requests.assign(**nothing), iterations.assign(**nothing)
        return Served(*unknown, start_ns, end_ns, busy_s, estimated=estimated, drain_s=drain_s)
    level = floor.at(mean_temperature(temperature, windows))
    floor_w = level.value
    counter_j = framed[2] - floor_w * ((framed[1] - framed[0]) - (end_ns - start_ns)) / 1e9
    # The counter is read rarely in the window (a read holds up launches); what is between two reads the samples say.
    fine = between_ticks(curve, power)
    iterations = weighed_iterations(iterations, fine, floor_w)
    requests, unclaimed_j = shared(requests, iterations, processed)
    idle_j = floor_w * ((end_ns - start_ns) / 1e9 - busy_s)
    residual_j = counter_j - float(requests["energy_j"].sum()) - unclaimed_j - idle_j
    drain_j = float(fine.at(end_ns) - fine.at(drain_from_ns))
    joules: dict[str, Any] = {
        "counter_j": counter_j,
        "idle_j": idle_j,
        "unclaimed_j": unclaimed_j,
        "residual_j": residual_j,
    }
    joules |= {"drain_s": drain_s, "drain_j": drain_j}
    power = mean_power(fine, start_ns, end_ns)
    known: dict[str, Any] = {"floor": floor, "floor_w": level, "estimated": estimated, "power": power}
    return Served(requests, iterations, start_ns, end_ns, busy_s, **known, **joules)


def covered_s(iterations: pd.DataFrame) -> float:
    """Return the s in which any of *iterations* (in the order of their starts) ran."""
    starts, ends = iterations["start_ns"].to_numpy(np.int64), iterations["end_ns"].to_numpy(np.int64)
    if not len(starts):
        return 0.0
    before = np.append(starts[0], np.maximum.accumulate(ends)[:-1])
    return float(np.maximum(ends - np.maximum(starts, before), 0).sum()) / 1e9


def mean_power(curve: EnergyCurve, start_ns: int, end_ns: int) -> pd.DataFrame:
    """Return the mean power in W over parts of a window that are no shorter than two ticks, 240 at the most."""
    tick_ns = float(np.median(np.diff(curve.tick_ns)))
    count = int(max(1, min(_PARTS, (end_ns - start_ns) / (2 * tick_ns))))
    edges = np.linspace(start_ns, end_ns, count + 1)
    watts = np.diff(curve.at(edges)) / (np.diff(edges) / 1e9)
    return pd.DataFrame({"second": (edges[:-1] - start_ns) / 1e9, "watts": watts})


def in_flight(requests: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return spans in which the same *requests* were open, as iterations, and which those were: one token of each.

    Of a server whose iterations nobody sees this is what can be said: whoever was waiting shares alike.
    """
    known = requests[requests["sent_ns"].notna() & requests["last_token_ns"].notna()]
    sent, last = (known[name].to_numpy(np.int64) for name in ("sent_ns", "last_token_ns"))
    moments = np.unique(np.concatenate([sent, last]))
    spans: list[tuple[int, int, int]] = []
    rows: list[tuple[int, int, int, int, int]] = []
    for start_ns, end_ns in pairwise(moments.tolist()):
        inside = known["request"].to_numpy()[(sent <= start_ns) & (last >= end_ns)]
        if len(inside):
            number = len(spans)
            spans.append((number, start_ns, end_ns))
            rows += [(number, int(request), 0, 1, 0) for request in inside]
    columns = ["iteration", "request", "prefill_tokens", "decode_tokens", "new_tokens"]
    return pd.DataFrame(spans, columns=["iteration", "start_ns", "end_ns"]), pd.DataFrame(rows, columns=columns)


def with_tokens(iterations: pd.DataFrame, processed: pd.DataFrame) -> pd.DataFrame:
    """Return *iterations* with batch, prefill_tokens and decode_tokens of what was *processed* in each."""
    each = processed.groupby("iteration").agg(
        batch=("request", "size"), prefill_tokens=("prefill_tokens", "sum"), decode_tokens=("decode_tokens", "sum")
    )
    joined = iterations.join(each, on="iteration")
    return joined.fillna({"batch": 0, "prefill_tokens": 0, "decode_tokens": 0})


def _timed(requests: pd.DataFrame) -> pd.DataFrame:
    """Return *requests* with their times in s from the intended moment: nothing that waited is left out."""
    since = requests["intended_ns"]
    return requests.assign(
        late_s=(requests["sent_ns"] - since) / 1e9,
        ttft_s=(requests["first_token_ns"] - since) / 1e9,
        latency_s=(requests["last_token_ns"] - since) / 1e9,
    )


def weighed_iterations(iterations: pd.DataFrame, curve: EnergyCurve, floor_w: float) -> pd.DataFrame:
    """Return *iterations* (start_ns, end_ns, in order) with floor_j, dynamic_j and energy_j of each.

    Iterations that are closer than three ticks are weighed as one group between ticks, less the floor at its edges and
    in its gaps; inside a group joules above the floor go to an iteration as the counter rose while it ran.
    """
    starts, ends = iterations["start_ns"].to_numpy(np.int64), iterations["end_ns"].to_numpy(np.int64)
    seconds = (ends - starts) / 1e9
    floor_j = floor_w * seconds
    dynamic_j = np.zeros(len(starts))
    if len(starts):
        tick_ns = float(np.median(np.diff(curve.tick_ns))) if len(curve) > 1 else 0.0
        latest = np.maximum.accumulate(ends)
        new = np.append(True, starts[1:] - latest[:-1] > _APART_TICKS * tick_ns)
        firsts = np.flatnonzero(new)
        for first, beyond in zip(firsts, [*firsts[1:], len(starts)], strict=True):
            rows = slice(first, beyond)
            dynamic_j[rows] = _group_j(curve, starts[rows], ends[rows], floor_w)
    return iterations.assign(floor_j=floor_j, dynamic_j=dynamic_j, energy_j=floor_j + dynamic_j)


def _group_j(curve: EnergyCurve, starts: np.ndarray, ends: np.ndarray, floor_w: float) -> np.ndarray:
    """Return the J above the floor of each iteration of one group; NaN where the counter does not frame it."""
    framed = curve.window(int(starts[0]), int(ends.max()))
    if framed is None:
        return np.full(len(starts), np.nan)
    before_ns, after_ns, joule = framed
    above_j = max(0.0, joule - floor_w * (after_ns - before_ns) / 1e9)
    # As the counter rose: read at its ticks and straight between them.
    rose = curve.at(ends.clip(before_ns, after_ns)) - curve.at(starts.clip(before_ns, after_ns))
    weights = np.maximum(rose - floor_w * (ends - starts) / 1e9, 0.0)
    # Shorter than a tick it says little: where nothing rose, time alone does.
    if not weights.sum() > 0:
        weights = (ends - starts).astype(float)
    found: np.ndarray = above_j * weights / weights.sum()
    return found


def shared(requests: pd.DataFrame, iterations: pd.DataFrame, processed: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Return *requests* with the joules of their shares, and the J of iterations that no request was in.

    An iteration's joules, floor and dynamic apart, go to the requests in it by the tokens that it computed of each.
    """
    tokens = processed["prefill_tokens"] + processed["decode_tokens"]
    whole = tokens.groupby(processed["iteration"]).transform("sum")
    rows = processed.assign(share=(tokens / whole.where(whole > 0)).fillna(0.0))
    rows = rows.join(iterations.set_index("iteration")[["floor_j", "dynamic_j"]], on="iteration")
    parts = pd.DataFrame(
        {name: rows[name] * rows["share"] for name in ("floor_j", "dynamic_j")} | {"request": rows["request"]}
    )
    sums = parts.groupby("request")[["floor_j", "dynamic_j"]].sum()
    found = requests.join(sums, on="request").fillna({"floor_j": 0.0, "dynamic_j": 0.0})
    found["energy_j"] = found["floor_j"] + found["dynamic_j"]
    claimed = float(sums.to_numpy().sum())
    return found, float(iterations["energy_j"].sum()) - claimed
