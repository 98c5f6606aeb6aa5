"""What runs of a server say beside each other: joules of a request, idle joules, batches, latencies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from llmkern.attribute.iterations import IterationKind, iteration_kinds
from llmkern.attribute.requests import Served, relative, served
from llmkern.errors import LlmkernError
from llmkern.estimate import LEAST_FOR_INTERVAL, Estimate, from_samples
from llmkern.runfolder import RunFolder
from llmkern.runfolder.facts import RunFacts

SEQUENTIAL = "sequential"
# Later than this a client does not send what the schedule says.
LATE_S = 0.002
# Requests and idle time have to be what the counter moved, to within this share of it.
BOOKS_LIMIT = 0.005


@dataclass(frozen=True)
class Arrivals:
    """One run: how requests came, what a finished one took, and how long people waited.

    Percentiles (50, 90, 99) are in s from the intended moment; ``between_s`` is the mean time between the tokens of a
    request. ``saved`` is the share of the J of a request that the sequential run beside it takes more (see ratio).
    ``again`` are further runs of the same pattern: then all of these are of all runs, and *found* is the first of them.
    """

    pattern: str
    facts: RunFacts
    found: Served
    request_j: Estimate | None
    own_j: Estimate | None
    idle_share: float | None
    mean_w: float | None
    mean_batch: float
    busy_share: float
    ttft_s: tuple[float, ...]
    between_s: tuple[float, ...]
    latency_s: tuple[float, ...]
    status: dict[str, int]
    latest_s: float
    kinds: tuple[IterationKind, ...] = ()
    saved: Estimate | None = None
    again: tuple[Served, ...] = ()

    @property
    def runs(self) -> tuple[Served, ...]:
        """Return what each run of the pattern found."""
        return (self.found, *self.again)


@dataclass(frozen=True)
class ServeStatement:
    """All patterns that were served, and for the others why they are not here."""

    arrivals: tuple[Arrivals, ...]
    failed: dict[str, str]
    doubts: tuple[str, ...]


def state(folders: list[Path], failed: dict[str, str]) -> ServeStatement:
    """Return what the runs in *folders* say, those of one pattern together; those that cannot be read are told."""
    patterns: dict[str, list[Arrivals]] = {}
    missing = dict(failed)
    for folder in folders:
        try:
            one = read(folder)
        except LlmkernError as error:
            missing[folder.name] = str(error)
        else:
            patterns.setdefault(one.pattern, []).append(one)
    found = [together(several) for several in patterns.values()]
    base = next((one for one in found if one.pattern == SEQUENTIAL), None)
    if base is not None:
        found = [_beside(one, base) for one in found]
    return ServeStatement(tuple(found), missing, tuple(_doubts(found)))


def together(several: list[Arrivals]) -> Arrivals:
    """Return runs of one pattern, which all had the same requests, as one.

    How far a mean over such requests may be off the first run says, and their runs by how much it varies besides.
    """
    first = several[0]
    if len(several) == 1:
        return first
    runs = tuple(one.found for one in several)
    done = pd.concat([_done(found) for found in runs])
    counts = pd.concat([found.requests["status"] for found in runs]).value_counts()
    idle, power = ([getattr(one, name) for one in several] for name in ("idle_share", "mean_w"))
    return replace(
        first,
        request_j=_mean([one.request_j for one in several]),
        own_j=_mean([one.own_j for one in several]),
        idle_share=None if None in idle else float(np.mean(idle)),
        mean_w=None if None in power else float(np.mean(power)),
        mean_batch=float(np.mean([one.mean_batch for one in several])),
        busy_share=float(np.mean([one.busy_share for one in several])),
        ttft_s=_percentiles(done["ttft_s"]),
        between_s=_percentiles(done["between_s"]),
        latency_s=_percentiles(done["latency_s"]),
        status={str(status): int(count) for status, count in counts.items()},
        latest_s=max(one.latest_s for one in several),
        again=runs[1:],
    )


def _mean(several: list[Estimate | None]) -> Estimate | None:
    known = [estimate for estimate in several if estimate is not None]
    if len(known) < len(several):
        return None
    spread = from_samples([estimate.value for estimate in known])
    mean = float(np.mean([estimate.value for estimate in known]))
    draws, first = known[0].draws, known[0].value
    if draws is None or not first:
        return Estimate(mean, samples=len(known))
    varies = spread.of_another_run().draws
    off = np.zeros(len(draws)) if varies is None else varies - spread.value
    return Estimate.of(mean, np.maximum(mean * draws / first + off, 0.0), len(known))


def ratio(one: Arrivals, other: Arrivals) -> Estimate | None:
    """Return what a request takes in *one* as a multiple of *other*; None without joules of both.

    Where both were served three times or more, by how much that differs from one time to the next; else see relative.
    """
    pairs = [[run.per_request_j() for run in pair] for pair in zip(one.runs, other.runs, strict=False)]
    ratios = [left.value / right.value for left, right in pairs if left and right and right.value > 0]
    if len(ratios) >= LEAST_FOR_INTERVAL:
        return from_samples(ratios)
    return relative(one.found, other.found)


def _beside(one: Arrivals, base: Arrivals) -> Arrivals:
    share = None if one is base else ratio(one, base)
    return one if share is None else replace(one, saved=share.map(lambda value: 1 - value))


def read(folder: Path) -> Arrivals:
    """Return what the run in *folder* says; raises LlmkernError for one that served nothing."""
    run = RunFolder(folder)
    found = served(run)
    requests, iterations = found.requests, found.iterations
    done = _done(found)
    seconds = (iterations["end_ns"] - iterations["start_ns"]).to_numpy(float) / 1e9
    known = found.counter_j is not None and found.idle_j is not None and found.counter_j > 0
    return Arrivals(
        run.facts.labels.get("arrivals", "?"),
        run.facts,
        found,
        found.per_request_j(),
        found.per_request_j(with_idle=False),
        (found.idle_j or 0.0) / (found.counter_j or 1.0) if known else None,
        (found.counter_j or 0.0) / found.seconds if known else None,
        float(np.average(iterations["batch"], weights=seconds)) if seconds.sum() > 0 else 0.0,
        found.busy_s / found.seconds,
        _percentiles(done["ttft_s"]),
        _percentiles(done["between_s"]),
        _percentiles(done["latency_s"]),
        {str(status): int(count) for status, count in requests["status"].value_counts().items()},
        float(requests["late_s"].max()) if requests["late_s"].notna().any() else 0.0,
        tuple(iteration_kinds(run, found)),
    )


def _done(found: Served) -> pd.DataFrame:
    """Return the answered requests with the mean s between the tokens of each."""
    done = found.finished
    steps = (done["output_tokens"] - 1).where(done["output_tokens"] > 1)
    return done.assign(between_s=(done["last_token_ns"] - done["first_token_ns"]) / 1e9 / steps)


def _percentiles(values: pd.Series) -> tuple[float, ...]:
    known = values.dropna().to_numpy(float)
    return tuple(float(q) for q in np.percentile(known, [50, 90, 99])) if len(known) else ()


def _doubts(found: list[Arrivals]) -> list[str]:
    said = []
    for one in found:
        unanswered = sum(count for status, count in one.status.items() if status != "finished")
        if unanswered:
            said.append(f"{one.pattern}: {unanswered} of {sum(one.status.values())} requests were not answered.")
        if one.latest_s > LATE_S:
            said.append(
                f"{one.pattern}: the client sent up to {1e3 * one.latest_s:.1f} ms late; that is in its waiting."
            )
        if one.found.estimated and one.request_j is not None:
            said.append("Joules of single requests are an estimate by time in flight: its iterations are not seen.")
        if one.request_j is None and one.found.estimated and "gpus" not in one.facts.labels:
            said.append(f"{one.pattern}: no --gpu was given, so there are no joules.")
        elif one.request_j is None:
            said.append(f"{one.pattern}: no energy counter could be read, so there are no joules.")
        for run in one.runs:
            limit_j = BOOKS_LIMIT * (run.counter_j or 0.0)
            if abs(run.residual_j) > limit_j:
                said.append(
                    f"{one.pattern}: requests and idle time leave {run.residual_j:+,.1f} J of the counter's "
                    f"{run.counter_j or 0.0:,.1f} (limit {BOOKS_LIMIT:.1%}): the board took something else between "
                    "iterations than at rest."
                )
            elif run.unclaimed_j > limit_j:
                said.append(f"{one.pattern}: {run.unclaimed_j:,.1f} J are of iterations that no request was in.")
    return list(dict.fromkeys(said))
