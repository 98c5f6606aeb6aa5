"""The terminal's words on why: findings with their joules, and what a fix would save."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmkern.attribute.account import PhaseAccount
from llmkern.explain import Explanation
from llmkern.explain.finding import Finding, share_of
from llmkern.explain.whatif import Prediction
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
            line = Text("• ").append(_price(finding, account), style="bold").append(f" {finding.claim}")
            line.append(f" Next: {finding.next_step}.", style="dim")
            console.print(Padding(line, (0, 0, 0, 2)), highlight=False)


def _price(finding: Finding, account: PhaseAccount) -> str:
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
    accounts = list(reversed(explanation.attribution.accounts.values()))
    table = Table(title="What if (predicted)", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("fix", no_wrap=True)
    for account in accounts:
        table.add_column(f"{account.phase}, per {account.unit}", justify="right", no_wrap=True)
        if account.weight.energy_j is not None:
            table.add_column("energy", justify="right", no_wrap=True)
            table.add_column("saves", justify="right", no_wrap=True)
    by_name: dict[str, dict[str, Prediction]] = {}
    for prediction in explanation.predictions:
        by_name.setdefault(prediction.name, {})[prediction.phase] = prediction
    for name, by_phase in by_name.items():
        cells: list[str] = []
        for account in accounts:
            cells += _cells(by_phase.get(account.phase), account)
        table.add_row(name, *cells)
    console.print()
    console.print(table)
    for prediction in {p.name: p for p in explanation.predictions}.values():
        text = f"{prediction.name}: {prediction.change}, if {prediction.assumption}."
        console.print(Padding(Text(text, style="dim"), (0, 0, 0, 2)), highlight=False)


def _cells(prediction: Prediction | None, account: PhaseAccount) -> list[str]:
    has_energy = account.weight.energy_j is not None
    if prediction is None:
        return [""] * (3 if has_energy else 1)
    cells = [with_interval(prediction.latency_s, "s")]
    if has_energy:
        before, after = prediction.energy_before_j, prediction.energy_j
        cells.append(with_interval(after, "J"))
        cells.append("" if before is None or after is None else f"{1 - after.value / before:.0%}")
    return cells
