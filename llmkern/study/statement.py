"""What a study says, as data: figures, tables, claims, books, and what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from llmkern.attribute.energy.phases import FIRST_LIMIT
from llmkern.estimate import Estimate
from llmkern.runfolder.vocabulary import DECODE, PREFILL
from llmkern.study.claims import Claim, by_batch, called, claims, optimum
from llmkern.study.collect import GENERATE, Collection, Pooled, Run, pooled
from llmkern.text import with_interval


@dataclass(frozen=True)
class Figure:
    """One figure: rows of ``x``, ``series``, ``value``, ``low``, ``high``; *by_size*: x is a number on a log2 axis."""

    name: str
    title: str
    note: str
    x: str
    y: str
    unit: str
    rows: pd.DataFrame
    by_size: bool = False


@dataclass(frozen=True)
class StudyStatement:
    """All that is told of the runs of a study."""

    title: str
    devices: tuple[str, ...]
    answer: tuple[str, ...]
    figures: tuple[Figure, ...]
    # Strings as they are shown, a row per configuration.
    summary: pd.DataFrame
    claims: tuple[Claim, ...]
    books: pd.DataFrame
    frame: pd.DataFrame
    doubts: tuple[str, ...]
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def state(collection: Collection, title: str, failed: dict[str, str] | None = None) -> StudyStatement:
    """Return what the runs of *collection* say; *failed* are runs that there is nothing of, with their reasons."""
    configurations = pooled(collection.runs)
    books = collection.books()
    devices = tuple(dict.fromkeys(run.facts.device.name for run in collection.runs))
    versions = collection.runs[0].facts.versions if collection.runs else {}
    return StudyStatement(
        title,
        devices,
        tuple(_answer(configurations)),
        tuple(_figures(configurations)),
        _summary(configurations),
        tuple(claims(configurations)),
        books,
        collection.frame(),
        tuple(_doubts(collection, devices, books)),
        {**(failed or {}), **collection.left_out},
        {name: version for name, version in versions.items() if version},
    )


def _answer(configurations: list[Pooled]) -> list[str]:
    """Return the first sentences: the least and the most per token of each phase, and the best batch size."""
    found = []
    for phase, measure, what in (
        (DECODE, "energy_per_output_token", "An output token of decode"),
        (PREFILL, "energy_per_effective_input_token", "An input token of prefill"),
    ):
        known = [(one, each) for one in configurations if (each := one.per(phase, measure)) is not None]
        if len(known) < 2:
            continue
        least, most = min(known, key=lambda pair: pair[1].value), max(known, key=lambda pair: pair[1].value)
        found.append(
            f"{what} takes from {with_interval(least[1], 'J')} ({_name(least[0])}) to {with_interval(most[1], 'J')} "
            f"({_name(most[0])})."
        )
    for name, curve in by_batch(configurations, PREFILL, "energy_per_effective_input_token").items():
        best = optimum(curve)
        where = "" if best.low is None or best.high is None else f" [{best.low:.0f}, {best.high:.0f}]"
        found.append(
            f"{name}: a prompt's token is cheapest at batch {best.value:.0f}{where} of "
            f"{', '.join(map(str, curve))}, {with_interval(curve[int(best.value)], 'J')}."
        )
    return found


def _name(one: Pooled) -> str:
    axes = one.axes
    engine = "" if axes["engine"] == "eager" else f" {axes['engine']}"
    return f"{called(one)}, {axes['precision']}{engine}"


def _figures(configurations: list[Pooled]) -> list[Figure]:
    found = []
    precisions = {(one.axes["precision"], one.axes["engine"]) for one in configurations}
    models = {one.axes["model"] for one in configurations}
    shape, alike = _most_common_shape(configurations)
    if len(precisions) > 1 or len(models) > 1:
        for number, phase, measure, unit, what in (
            ("1a", PREFILL, "energy_per_effective_input_token", "J", "Energy per input token of prefill"),
            ("1b", DECODE, "energy_per_output_token", "J", "Energy per output token of decode"),
            ("4", PREFILL, "latency", "s", "Latency of prefill: time to the first token"),
            ("5", DECODE, "latency_per_token", "s", "Latency of a decode step"),
        ):
            rows = [_row(one, one.axes["model"], _series(one), one.per(phase, measure)) for one in alike]
            found.append(_figure(number, what, f"{shape}, by model.", ("model", what, unit), rows))
    batches = {one.axes["batch"] for one in configurations}
    if len(batches) > 2:
        found += _batch_figures(configurations)
    return [figure for figure in found if len(figure.rows)]


def _most_common_shape(configurations: list[Pooled]) -> tuple[str, list[Pooled]]:
    """Return in words the batch and lengths that most configurations have, and those that have them."""
    groups: dict[tuple[Any, ...], list[Pooled]] = {}
    for one in configurations:
        key = tuple(one.axes[name] for name in ("batch", "prompts", "prompt_tokens", "new_tokens"))
        groups.setdefault(key, []).append(one)
    if not groups:
        return "", []
    (batch, prompts, tokens, new_tokens), most = max(groups.items(), key=lambda pair: len(pair[1]))
    lengths = f"prompts {prompts}" if prompts else f"{tokens} prompt tokens, {new_tokens} new"
    return f"Batch {batch}, {lengths}", most


def _batch_figures(configurations: list[Pooled]) -> list[Figure]:
    def rows(phase: str, measures: dict[str, str]) -> list[dict[str, Any]]:
        return [
            _row(one, one.axes["batch"], f"{_series(one, with_model=True)}, {told}", one.per(phase, measure))
            for one in configurations
            for measure, told in measures.items()
        ]

    effective = "Effective: without padding. Computed: with it."
    return [
        _figure(
            "2a",
            "Energy per input token of prefill by batch size",
            effective,
            ("batch size", "J per input token", "J"),
            rows(
                PREFILL,
                {"energy_per_effective_input_token": "effective", "energy_per_computed_input_token": "computed"},
            ),
            by_size=True,
        ),
        _figure(
            "2b",
            "Energy per output token by batch size, of a whole generation",
            "Effective: answers as long as they were wanted. Computed: all rows as long as the longest.",
            ("batch size", "J per output token", "J"),
            rows(GENERATE, {"energy_per_output_token": "effective", "energy_per_computed_output_token": "computed"}),
            by_size=True,
        ),
        _figure(
            "2c",
            "Energy per output token by batch size, decode alone",
            effective,
            ("batch size", "J per output token", "J"),
            rows(DECODE, {"energy_per_output_token": "effective", "energy_per_computed_output_token": "computed"}),
            by_size=True,
        ),
    ]


def _series(one: Pooled, *, with_model: bool = False) -> str:
    axes = one.axes
    engine = "" if axes["engine"] == "eager" else f" {axes['engine']}"
    parts = [axes["model"]] if with_model else []
    return ", ".join([" ".join([*parts, axes["precision"]]) + engine, *([axes["prompts"]] if with_model else [])])


def _row(one: Pooled, x: Any, series: str, estimate: Estimate | None) -> dict[str, Any]:
    ends = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
    return {"x": x, "series": series.strip(", "), **dict(zip(("value", "low", "high"), ends, strict=True))}


def _figure(
    number: str,
    title: str,
    note: str,
    named: tuple[str, str, str],
    rows: list[dict[str, Any]],
    *,
    by_size: bool = False,
) -> Figure:
    frame = pd.DataFrame(rows, columns=["x", "series", "value", "low", "high"])
    known = frame[frame["value"].notna()].astype({"value": float, "low": float, "high": float})
    return Figure(f"figure-{number}", title, note, *named, known.reset_index(drop=True), by_size)


def _summary(configurations: list[Pooled]) -> pd.DataFrame:
    rows = []
    for one in configurations:
        times = [run.inter_token_s for run in one.runs if run.inter_token_s]
        rows.append(
            {
                "configuration": _name(one),
                "prefill, per input token": with_interval(one.per(PREFILL, "energy_per_effective_input_token"), "J"),
                "decode, per output token": with_interval(one.per(DECODE, "energy_per_output_token"), "J"),
                "time to first token": with_interval(one.per(PREFILL, "latency"), "s"),
                "a decode step": with_interval(one.per(DECODE, "latency_per_token"), "s"),
                # Of the slowest draw: a percentile of percentiles is none.
                "between tokens, p50 / p90 / p99": " / ".join(f"{1e3 * q:.1f}" for q in max(times)) + " ms"
                if times
                else "–",
                "output tokens per J": _number(one.per(GENERATE, "output_tokens_per_joule")),
                "per 1,000 output tokens": _watt_hours(one.per(GENERATE, "energy_per_1000_output_tokens")),
                "per request": with_interval(one.per(GENERATE, "energy_per_request"), "J"),
            }
        )
    return pd.DataFrame(rows)


def _number(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3g}"


def _watt_hours(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3g} Wh"


def _doubts(collection: Collection, devices: tuple[str, ...], books: pd.DataFrame) -> list[str]:
    found = []
    if len(devices) > 1:
        found.append(f"The runs are of different devices ({', '.join(devices)}): a difference may be the device's.")
    uuids = {run.facts.device.uuid for run in collection.runs if run.facts.device.uuid}
    if len(uuids) > 1:
        found.append(f"The runs are of {len(uuids)} boards; one takes several percent more than another.")
    without = [run.folder.name for run in collection.runs if run.weighed.counter_j is None]
    if without:
        found.append(
            f"{len(without)} of {len(collection.runs)} runs have no energy, for no counter could be read: "
            f"{', '.join(without[:3])}{' …' if len(without) > 3 else ''}."
        )
    random = {
        run.facts.model.name for run in collection.runs if run.facts.model and run.facts.model.weights == "random"
    }
    if random:
        found.append(f"Random weights of the true architecture: {', '.join(sorted(random))}.")
    if len(books):
        share = float(books["residual_j"].abs().sum() / books["counter_j"].sum())
        found.append(
            f"The counter moved by {books['counter_j'].sum():,.0f} J over the weighed windows of {len(books)} runs: "
            f"{books['windows_j'].sum():,.0f} J in windows, {books['idle_j'].sum():,.0f} J at rest between them, "
            f"{share:.2%} in neither."
        )
    dearer = [ratio for run in collection.runs if (ratio := _first_by_later(run)) is not None and ratio > FIRST_LIMIT]
    if dearer:
        ends = dict.fromkeys(f"{ratio:.1f}" for ratio in (min(dearer), max(dearer)))
        found.append(
            f"In {len(dearer)} of {len(collection.runs)} runs the first generation of its lengths took "
            f"{' to '.join(ends)} times a later one, which is in no figure here; "
            "'llmkern report RUN' tells what it costs for each token."
        )
    fused = [run for run in collection.runs if run.facts.options.engine == "fused"]
    if fused:
        found.append("Times between tokens are not known with the fused engine: its host does not wait for them.")
    return found


def _first_by_later(run: Run) -> float | None:
    """Return what the first generation of a run's lengths took, by what later ones did; None where it is not known."""
    plan, later = run.facts.plan, run.measures.get(GENERATE, {}).get("latency")
    if plan is None or plan.first_generate_s is None or later is None or later.value <= 0:
        return None
    return plan.first_generate_s / later.value
