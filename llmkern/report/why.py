"""The terminal's words on why: findings with their joules, and what a fix would save."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmkern.explain.statement import Statement, Told
from llmkern.text import percent, quantity, with_interval

# The main phase, which is the last, gets most of the room.
_MOST, _MOST_OF_OTHERS = 5, 2


def print_findings(statement: Statement, console: Console) -> None:
    """Print the largest findings of each phase: what it costs, the claim, what to do."""
    if not statement.findings:
        return
    console.print()
    title = Text("Why", style="bold").append(" (the same joules from several sides: they do not add up)", style="dim")
    console.print(title)
    for i, phase in enumerate(reversed(statement.phases)):
        chosen = [told for told in statement.findings if told.finding.phase == phase.phase]
        for told in chosen[: _MOST_OF_OTHERS if i else _MOST]:
            line = Text("• ").append(price(told), style="bold").append(f" {told.finding.claim}")
            line.append(f" Next: {told.finding.next_step}.", style="dim")
            console.print(Padding(line, (0, 0, 0, 2)), highlight=False)


def price(told: Told) -> str:
    """Return of what and how much a finding is: phase, unit, joules or time, and the share that they are."""
    finding = told.finding
    where = f"{finding.phase}, per {finding.unit}"
    if finding.energy_j is not None:
        return f"{where}: {with_interval(finding.energy_j, 'J')} ({percent(told.share)})."
    if finding.time_s is not None:
        return f"{where}: {quantity(finding.time_s, 's')} ({percent(told.share)} of the time)."
    return f"{where}:"


def print_predictions(statement: Statement, console: Console) -> None:
    """Print what each fix would leave of latency and energy."""
    if not statement.predictions:
        return
    table = Table(title="What if (predicted)", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("fix", no_wrap=True)
    table.add_column("of", no_wrap=True)
    for title in ("latency", "energy", "saves"):
        table.add_column(title, justify="right", no_wrap=True)
    for phase in reversed(statement.phases):
        for made in statement.predictions:
            if made.phase != phase.phase:
                continue
            latency, energy = with_interval(made.latency_s, "s"), with_interval(made.energy_j, "J")
            saved = "" if made.saves is None else percent(made.saves)
            table.add_row(made.name, f"{made.phase} {made.unit}", latency, energy, saved)
    console.print()
    console.print(table)
    for made in {p.name: p for p in statement.predictions}.values():
        text = f"{made.name}: {made.change}, if {made.assumption}."
        console.print(Padding(Text(text, style="dim"), (0, 0, 0, 2)), highlight=False)
