"""The terminal's words on why: findings with their joules, and what a fix would save."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmkern.attribute.account import PhaseAccount
from llmkern.explain import Explanation
from llmkern.explain.finding import Finding, share_of
from llmkern.text import quantity, with_interval

# The phase that the report is about gets most of the room.
_MOST = {"decode": 5, "prefill": 2}


def print_findings(explanation: Explanation, console: Console) -> None:
    """Print the largest findings of each phase: what it costs, the claim, what to do."""
    if not explanation.findings:
        return
    console.print()
    title = Text("Why", style="bold").append(" (the same joules from several sides: they do not add up)", style="dim")
    console.print(title)
    for phase, most in _MOST.items():
        chosen = [f for f in explanation.findings if f.phase == phase]
        for finding in chosen[:most]:
            account = explanation.attribution.accounts[phase]
            line = Text("• ").append(price(finding, account), style="bold").append(f" {finding.claim}")
            line.append(f" Next: {finding.next_step}.", style="dim")
            console.print(Padding(line, (0, 0, 0, 2)), highlight=False)


def price(finding: Finding, account: PhaseAccount) -> str:
    """Return of what and how much a finding is: phase, unit, joules or time, and the share that they are."""
    where = f"{finding.phase}, per {finding.unit}"
    share = share_of(account, finding.energy_j, finding.time_s)
    if finding.energy_j is not None:
        return f"{where}: {with_interval(finding.energy_j, 'J')} ({share:.0%})."
    if finding.time_s is not None:
        return f"{where}: {quantity(finding.time_s, 's')} ({share:.0%} of the time)."
    return f"{where}:"


def print_predictions(explanation: Explanation, console: Console) -> None:
    """Print what each fix would leave of latency and energy."""
    if not explanation.predictions:
        return
    table = Table(title="What if (predicted)", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("fix", no_wrap=True)
    table.add_column("of", no_wrap=True)
    for title in ("latency", "energy", "saves"):
        table.add_column(title, justify="right", no_wrap=True)
    for phase in reversed(explanation.attribution.accounts):
        for made in explanation.predictions:
            if made.phase != phase:
                continue
            before, after = made.energy_before_j, made.energy_j
            saved = "" if before is None or after is None else f"{1 - after.value / before:.0%}"
            table.add_row(
                made.name,
                f"{made.phase} {made.unit}",
                with_interval(made.latency_s, "s"),
                with_interval(after, "J"),
                saved,
            )
    console.print()
    console.print(table)
    for made in {p.name: p for p in explanation.predictions}.values():
        text = f"{made.name}: {made.change}, if {made.assumption}."
        console.print(Padding(Text(text, style="dim"), (0, 0, 0, 2)), highlight=False)
