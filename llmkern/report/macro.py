"""A day of requests by two runs, in the terminal and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmkern.estimate import Estimate
from llmkern.report.document import SCHEMA
from llmkern.report.records import estimate_facts
from llmkern.study.macro import Macro
from llmkern.text import signed, with_interval


def macro_document(found: Macro) -> dict[str, Any]:
    """Return *found* as plain values."""
    measures = ("request_j", "kwh", "households", "co2_kg")
    days = {
        side: {"run": day.name, **{name: estimate_facts(getattr(day, name)) for name in measures}}
        for side, day in (("before", found.before), ("after", found.after))
    }
    return {
        "schema": SCHEMA,
        "document": "macro",
        "requests": found.requests,
        **days,
        "saved": estimate_facts(found.saved),
        "formulas": list(found.formulas),
    }


def print_macro(found: Macro, console: Console) -> None:
    """Print a column for each run, what the second saves, and how every number came about."""
    table = Table(title=f"A day of {found.requests:,.0f} requests", title_justify="left", box=None, pad_edge=False)
    for number, title in enumerate(("", found.before.name, found.after.name)):
        table.add_column(title, justify="left" if number == 0 else "right", overflow="fold")
    days = (found.before, found.after)
    table.add_row("J per request", *(with_interval(day.request_j, "J") for day in days))
    table.add_row("kWh", *(_plain(day.kwh) for day in days))
    table.add_row("households", *(_plain(day.households) for day in days))
    if found.before.co2_kg is not None:
        table.add_row("kg of CO2", *(_plain(day.co2_kg) for day in days))
    console.print(table)
    console.print()
    saved = found.saved
    noise = "" if saved.is_known else "; that cannot be told from nothing"
    if saved.value >= 0:
        told = f"The second saves {signed(saved).replace('+', '')} of it{noise}."
    else:
        more = signed(saved.map(lambda share: -share)).replace("+", "")
        told = f"The second saves nothing: it takes {more} more{noise}."
    console.print(Text(told, style="bold"), highlight=False)
    for formula in found.formulas:
        console.print(Padding(f"• {formula}.", (0, 0, 0, 2)), highlight=False)


def _plain(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:,.4g}"
    return f"{estimate.value:,.4g} [{estimate.low:,.4g}, {estimate.high:,.4g}]"
