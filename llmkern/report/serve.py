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
from llmkern.serve.statement import Arrivals, ServeStatement
from llmkern.text import percent, quantity, signed, with_interval


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


def _facts(one: Arrivals) -> dict[str, Any]:
    names = ("50", "90", "99")
    return {
        "pattern": one.pattern,
        "request_j": estimate_facts(one.request_j),
        "request_without_idle_j": estimate_facts(one.own_j),
        "saved": estimate_facts(one.saved),
        "counter_j": one.found.counter_j,
        "idle_j": one.found.idle_j,
        "mean_w": one.mean_w,
        "mean_batch": one.mean_batch,
        "busy_share": one.busy_share,
        "window_s": one.found.seconds,
        **{key: dict(zip(names, getattr(one, key), strict=False)) for key in ("ttft_s", "between_s", "latency_s")},
        "status": one.status,
        "latest_s": one.latest_s,
    }
