"""Runs of a server in the terminal and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmkern.report.document import SCHEMA
from llmkern.report.heading import called
from llmkern.report.records import estimate_facts
from llmkern.report.study import print_open
from llmkern.runfolder.vocabulary import PREFILL
from llmkern.serve.statement import SEQUENTIAL, Arrivals, Served, ServeStatement
from llmkern.text import percent, quantity, short_name, signed, with_interval


def print_serve(statement: ServeStatement, console: Console) -> None:
    """Print a row for each way that requests came, then what is uncertain and what is missing."""
    if statement.arrivals:
        first = statement.arrivals[0]
        console.print(Text(f"{called(first.facts)}: {len(first.found.requests)} requests", style="bold"))
        server = first.facts.labels.get("server", "in process")
        where = "Transformers' continuous batching, in process" if server == "in process" else server
        console.print(f"{first.facts.device.name}; {where}", highlight=False)
        console.print()
        wide = console.width >= 120
        table = Table(box=None, pad_edge=False)
        for number, title in enumerate(columns_of(wide=wide)):
            table.add_column(title, justify="left" if number == 0 else "right", overflow="fold")
        for one in statement.arrivals:
            table.add_row(*row_of(one, wide=wide))
        console.print(table)
        if any(one.kinds for one in statement.arrivals):
            console.print()
            console.print(Text("Iterations", style="bold"))
            table = Table(box=None, pad_edge=False)
            for number, title in enumerate(iteration_columns(wide=wide)):
                left = number < 2 or title == "longest kernel"
                table.add_column(title, justify="left" if left else "right", overflow="fold")
            for one in statement.arrivals:
                for row in iteration_rows(one, wide=wide):
                    table.add_row(*row)
            console.print(table)
        told = [sentence for one in statement.arrivals for sentence in told_of(one)]
        if told:
            console.print()
            console.print(Text("Books", style="bold"))
            for sentence in told:
                console.print(Text(f"  {sentence}"), highlight=False)
    print_open(statement.doubts, statement.failed, console)


def columns_of(*, wide: bool) -> list[str]:
    """Return the titles of the table of patterns."""
    titles = ["arrivals", "J per request", "idle J", "saved", "batch", "first token p50 / p90 / p99"]
    return titles + (["between tokens p50 / p90 / p99", "mean W", "busy"] if wide else [])


def row_of(one: Arrivals, *, wide: bool) -> list[str]:
    """Return the cells of one pattern."""
    row = [
        one.pattern,
        with_interval(one.request_j, "J"),
        "–" if one.idle_share is None else percent(one.idle_share),
        "–" if one.saved is None else signed(one.saved).replace("+", ""),
        f"{one.mean_batch:.1f}",
        _times(one.ttft_s),
    ]
    return row + ([_times(one.between_s), quantity(one.mean_w, "W"), percent(one.busy_share)] if wide else [])


def iteration_columns(*, wide: bool) -> list[str]:
    """Return the titles of the table of iterations."""
    titles = ["arrivals", "iterations that", "batch", "launches", "take", "in kernels", "J of one", "in gaps"]
    return [*titles, "longest kernel"] if wide else titles


def iteration_rows(one: Arrivals, *, wide: bool) -> list[list[str]]:
    """Return the cells of one pattern's iterations by kind: as recorded, and the joules of weighed ones like them."""
    rows = []
    for kind in one.kinds:
        row = [
            one.pattern,
            "prefill" if kind.kind == PREFILL else "decode only",
            f"{kind.batch:.1f}",
            f"{kind.launches:,.0f}",
            quantity(kind.span_s.value, "s"),
            percent(kind.busy_s / kind.span_s.value) if kind.span_s.value else "–",
            with_interval(kind.joules, "J"),
            "–" if kind.gaps_j is None or not kind.joules else percent(kind.gaps_j.value / kind.joules.value),
        ]
        if wide:
            row.append(f"{short_name(kind.longest[0][0])} {quantity(kind.longest[0][1], 's')}" if kind.longest else "–")
        rows.append(row)
    return rows


def told_of(one: Arrivals) -> list[str]:
    """Return what the counter of each run of a pattern is the sum of, and what came after its last request."""
    several = len(one.runs) > 1
    names = [f"{one.pattern}, run {n}" if several else one.pattern for n in range(1, len(one.runs) + 1)]
    return [line for name, run in zip(names, one.runs, strict=True) for line in _books(name, run, one.pattern)]


def _books(name: str, found: Served, pattern: str) -> list[str]:
    if found.counter_j is None or found.idle_j is None or not found.counter_j:
        return []
    parts = [f"requests {quantity(found.requests_j, 'J')}", f"idle {quantity(found.idle_j, 'J')}"]
    if found.unclaimed_j > 0:
        parts.append(f"iterations of no request {quantity(found.unclaimed_j, 'J')}")
    # Nothing is no less than nothing.
    counter, rest = quantity(found.counter_j, "J"), round(found.residual_j / found.counter_j, 4) + 0.0
    told = [f"{name}: {' + '.join(parts)} = counter {counter}, but for {rest:+.2%} of it."]
    if found.drain_s > 0 and found.drain_j is not None and pattern != SEQUENTIAL:
        told.append(
            f"{name}: {quantity(found.drain_s, 's')} and {quantity(found.drain_j, 'J')} of it after the last "
            "request had come."
        )
    return told


def _times(percentiles: tuple[float, ...]) -> str:
    if not percentiles:
        return "–"
    factor, unit = (1.0, "s") if max(percentiles) >= 1 else (1e3, "ms")
    return " / ".join(f"{value * factor:.3g}" for value in percentiles) + f" {unit}"


def serve_document(statement: ServeStatement) -> dict[str, Any]:
    """Return *statement* as plain values."""
    return {
        "schema": SCHEMA,
        "document": "serve",
        "arrivals": [_facts(one) for one in statement.arrivals],
        "uncertain": list(statement.doubts),
        "missing": statement.failed,
    }


def _run(run: Served) -> dict[str, Any]:
    estimate, known = run.per_request_j(), run.counter_j is not None
    return {
        "window_s": run.seconds,
        "request_j": None if estimate is None else estimate.value,
        "counter_j": run.counter_j,
        "requests_j": run.requests_j if known else None,
        "idle_j": run.idle_j,
        "unclaimed_j": run.unclaimed_j,
        "residual_j": run.residual_j if known else None,
        "drain_s": run.drain_s,
        "drain_j": run.drain_j,
    }


def _facts(one: Arrivals) -> dict[str, Any]:
    names = ("50", "90", "99")
    return {
        "pattern": one.pattern,
        "request_j": estimate_facts(one.request_j),
        "request_without_idle_j": estimate_facts(one.own_j),
        "saved": estimate_facts(one.saved),
        "runs": [_run(run) for run in one.runs],
        "mean_w": one.mean_w,
        "mean_batch": one.mean_batch,
        "busy_share": one.busy_share,
        **{key: dict(zip(names, getattr(one, key), strict=False)) for key in ("ttft_s", "between_s", "latency_s")},
        "status": one.status,
        "iterations": [
            {
                "kind": kind.kind,
                "count": kind.count,
                "batch": kind.batch,
                "launches": kind.launches,
                "span_s": estimate_facts(kind.span_s),
                "busy_s": kind.busy_s,
                "weighed_s": kind.weighed_s,
                "energy_j": estimate_facts(kind.joules),
                "gaps_j": estimate_facts(kind.gaps_j),
                "longest": [{"name": name, "seconds": seconds} for name, seconds in kind.longest],
            }
            for kind in one.kinds
        ],
        "latest_s": one.latest_s,
    }
