"""What an evaluation says, as data: a sentence per candidate, shares of the bandwidth, the fit t = t0 + bytes / rate.

Pure: the reports render it and compute nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmkern.evaluate.evaluation import Evaluation
from llmkern.evaluate.job import LIMIT_L2, Check, ModelRow, Row

# Cold this much slower than the fastest peer, and warm faster than that one cold: its speed is the cache's.
WARM_ONLY = 0.9
# Relative L2 of a peer that rounds x to 8 bits, at most.
ROUNDED_X_L2 = 0.03


@dataclass(frozen=True)
class Spread:
    """A median with the 5th and 95th percentile of its samples."""

    value: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    low, high = np.percentile(np.asarray(samples, float), [5, 95])
    return Spread(float(np.median(samples)), float(low), float(high))


@dataclass(frozen=True)
class Line:
    """One row of the tables: a contender in a case. Shares are of 1; None is unknown."""

    row: Row
    own: bool
    right: bool
    judgement: str
    cold_us: Spread | None = None
    warm_us: float | None = None
    share_of_sheet: float | None = None
    share_of_read: float | None = None
    joules_per_gb: float | None = None


@dataclass(frozen=True)
class Fit:
    """t = t0 + bytes / rate over the shapes of one contender, format and number of tokens; *misfit* is its largest
    share.
    """

    candidate: str
    format: str
    m: int
    t0_us: float
    bytes_per_s: float
    shapes: int
    misfit: float


@dataclass(frozen=True)
class Verdict:
    """The answer on one candidate of the user's."""

    name: str
    sentence: str
    right: bool


@dataclass(frozen=True)
class Statement:
    """All that a report of an evaluation says."""

    evaluation: Evaluation
    verdicts: tuple[Verdict, ...]
    lines: tuple[Line, ...]
    fits: tuple[Fit, ...]
    doubts: tuple[str, ...]
    in_model: tuple[ModelRow, ...] = ()


def state(evaluation: Evaluation) -> Statement:
    """Return what *evaluation* says."""
    own = {contender.name for contender in evaluation.request.contenders if contender.own}
    lines = tuple(_line(row, row.candidate in own, evaluation) for row in evaluation.rows)
    names = [contender.name for contender in evaluation.request.contenders if contender.own]
    return Statement(
        evaluation,
        tuple(_verdict(name, lines, evaluation) for name in names),
        lines,
        tuple(_fits(lines)),
        tuple(_doubts(lines, evaluation)),
        tuple(evaluation.in_model),
    )


def _line(row: Row, own: bool, evaluation: Evaluation) -> Line:
    wrong = judgement_of(row, own)
    if row.latency is None:
        return Line(row, own, not wrong, wrong or "right")
    roof = evaluation.roof
    cold = spread(row.latency.cold_us)
    seconds = cold.value / 1e6
    sheet, read = (None, None) if roof is None else (roof.sheet_bytes_per_s, roof.read_bytes_per_s)
    return Line(
        row,
        own,
        not wrong,
        wrong or "right",
        cold,
        float(np.median(row.latency.warm_us)),
        None if sheet is None else row.code_bytes / seconds / sheet,
        None if read is None else row.stored_bytes / seconds / read,
        None if row.energy is None else row.energy.total_mj[0] / 1e3 / (row.stored_bytes / 1e9),
    )


def judgement_of(row: Row, own: bool) -> str:
    """Return what is wrong with *row* in a few words, "" if nothing is; peers may round x to int8 as well."""
    if row.error is not None:
        return row.error
    tried = [check for check in row.checks if check.values]
    for check in (*tried, *([row.after] if row.after is not None else [])):
        if not check.right and (own or not rounds_activations(check)):
            return wrong_in(check)
    return ""


def rounds_activations(check: Check) -> bool:
    """Whether *check* is off by what 8 bits for x explain (LLM.int8: 0.6 % on normal values, more beside outliers)."""
    return check.rel_l2 is not None and check.rel_l2 <= ROUNDED_X_L2


def wrong_in(check: Check) -> str:
    """Return in a few words what *check* found, which is not right."""
    on = "after timing" if check.name == "after timing" else f"on {check.name} inputs"
    if check.unwritten:
        return f"leaves {check.unwritten / check.values:.0%} of its output unwritten (or NaN) {on}"
    if check.not_finite:
        return f"returns {check.not_finite} infinite values {on}"
    return f"wrong {on}: relative L2 {check.rel_l2:.2g} (limit {LIMIT_L2:g}), {check.matched:.1%} of values match"


def _verdict(name: str, lines: Sequence[Line], evaluation: Evaluation) -> Verdict:
    mine = [line for line in lines if line.row.candidate == name]
    failed = evaluation.failed.get(name)
    if failed is not None:
        return Verdict(name, f"{name}: {failed}", False)
    wrong = [line for line in mine if not line.right]
    if wrong:
        where = f" ({wrong[0].row.case.key}{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''})"
        fast = _fast_although(mine, lines)
        return Verdict(name, f"{name}: {wrong[0].judgement.rstrip('.')}{where}{fast}.", False)
    if not mine:
        return Verdict(name, f"{name}: no case was tried.", False)
    checks = sum(1 for line in mine for check in line.row.checks if check.values)
    refused = any(check.name == "odd tail" and not check.values for line in mine for check in line.row.checks)
    right = f"right on {checks} inputs" + (", but takes no odd tails" if refused else "")
    timed = [line for line in mine if line.cold_us is not None]
    if not timed:
        return Verdict(name, f"{name}: {right}; how fast it is needs a GPU.", True)
    return Verdict(name, f"{name}: {right}; {_speed(timed, lines)}.", True)


def _fast_although(mine: Sequence[Line], lines: Sequence[Line]) -> str:
    timed = [line for line in mine if line.cold_us is not None]
    faster = [line for line in timed if (best := _best_peer(line, lines)) is not None and _ratio(line, best) > 1]
    return f"; it is fast ({_times(faster[0], lines)}), but that is worth nothing" if faster else ""


def _times(line: Line, lines: Sequence[Line]) -> str:
    best = _best_peer(line, lines)
    assert best is not None
    return f"{_ratio(line, best):.2f} × {best.row.candidate}"


def _ratio(line: Line, other: Line) -> float:
    """Return by how many times *line* is faster than *other*, cold."""
    assert line.cold_us is not None
    assert other.cold_us is not None
    return other.cold_us.value / line.cold_us.value


def _peers(line: Line, lines: Sequence[Line]) -> list[Line]:
    return [
        other
        for other in lines
        if other.row.case == line.row.case and not other.own and other.right and other.cold_us is not None
    ]


def _best_peer(line: Line, lines: Sequence[Line]) -> Line | None:
    return min(_peers(line, lines), key=lambda p: p.cold_us.value if p.cold_us else math.inf, default=None)


def _speed(timed: Sequence[Line], lines: Sequence[Line]) -> str:
    """Return how fast the candidate is beside the fastest peer of each case."""
    against = [(line, best) for line in timed if (best := _best_peer(line, lines)) is not None]
    shares = [line.share_of_sheet for line in timed if line.share_of_sheet is not None]
    of_sheet = f"{min(shares):.0%}" + (f" to {max(shares):.0%}" if len(shares) > 1 else "") if shares else "unknown"
    rate = f"{of_sheet} of the data sheet's bandwidth by weight bytes" if shares else "bandwidth unknown"
    if not against:
        return rate
    only_warm = [
        (line, best)
        for line, best in against
        if _ratio(line, best) < WARM_ONLY and line.warm_us is not None and line.warm_us < _cold(best)
    ]
    if len(only_warm) * 2 > len(against):
        line, best = only_warm[0]
        return (
            f"fast only while its weights are in L2: {_cold(line):.1f} µs cold but {line.warm_us:.1f} µs warm, where "
            f"{best.row.candidate} takes {_cold(best):.1f} µs cold ({line.row.case.key}); a model's weights come "
            f"from memory"
        )
    ratios = sorted(_ratio(line, best) for line, best in against)
    names = sorted({best.row.candidate for _, best in against})
    beside = f"{_range(ratios)} × as fast as the fastest peer ({', '.join(names)})"
    return f"{beside}, {rate}"


def _cold(line: Line) -> float:
    assert line.cold_us is not None
    return line.cold_us.value


def _range(values: Sequence[float]) -> str:
    least, most = f"{values[0]:.2f}", f"{values[-1]:.2f}"
    return least if least == most else f"{least} to {most}"


def _fits(lines: Sequence[Line]) -> list[Fit]:
    groups: dict[tuple[str, str, int], list[Line]] = {}
    for line in lines:
        if line.cold_us is not None and line.right:
            case = line.row.case
            groups.setdefault((line.row.candidate, case.format, case.m), []).append(line)
    found = []
    for (name, format, m), members in groups.items():
        read = np.array([line.row.stored_bytes for line in members], float)
        us = np.array([_cold(line) for line in members])
        if len(set(read)) < 3:
            continue
        # By shares: a microsecond is much for a small layer and nothing for a large one.
        rows = np.stack([np.ones_like(read), read / 1e6], axis=1) / us[:, None]
        (t0, per_mb), *_ = np.linalg.lstsq(rows, np.ones_like(us), rcond=None)
        if per_mb <= 0:
            continue
        misfit = float(np.abs((t0 + per_mb * read / 1e6) / us - 1).max())
        found.append(Fit(name, format, m, float(t0), 1e12 / float(per_mb), len(members), misfit))
    return found


def _doubts(lines: Sequence[Line], evaluation: Evaluation) -> list[str]:
    told = []
    request = evaluation.request
    if request.interpret:
        told.append(
            "There is no GPU here: Triton ran in its interpreter, PyTorch on the CPU, shapes were cut to "
            "256 x 512; latency and energy need a GPU."
        )
    peers = {contender.name for contender in request.contenders if not contender.own}
    told += [f"{name} is missing: {why}" for name, why in evaluation.failed.items() if name in peers or name == "roof"]
    for name in sorted(peers & {line.row.candidate for line in lines if not line.right}):
        first = next(line for line in lines if line.row.candidate == name and not line.right)
        told.append(f"{name} is left out of comparisons where it is not right: {first.judgement.rstrip('.')}.")
    rounding = {
        line.row.candidate
        for line in lines
        if not line.own and line.right and not all(check.right for check in line.row.checks if check.values)
    }
    told += [f"{name} rounds x to 8 bits too: its result is up to 3 % (relative L2) off." for name in sorted(rounding)]
    eager = sorted(
        {line.row.candidate for line in lines if line.row.latency is not None and not line.row.latency.captured}
    )
    if eager:
        told.append(
            f"{', '.join(eager)} could not be captured in a CUDA graph: the time has the host's launches in it."
        )
    clocks = [line.row.latency.sm_clock_mhz for line in lines if line.row.latency is not None]
    known = [clock for clock in clocks if clock]
    if known and min(known) < 0.95 * max(known):
        told.append(f"The SM clock was between {min(known)} and {max(known)} MHz: compare within one call only.")
    return told
