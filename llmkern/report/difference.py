"""The comparison of two runs as it is printed in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmkern.estimate import Estimate
from llmkern.explain.compare import NOT_DISTINGUISHABLE, Checked, Difference, change, verdict
from llmkern.report.heading import heading
from llmkern.runfolder.facts import RunFacts
from llmkern.text import count, elided, quantity, with_interval

_BAR = 20
# A narrower terminal needs its columns for names and numbers.
_WIDE = 100
# From here on there is room for a verdict in full.
_ROOMY = 120
_LEAST = 18
_TITLES = ("before", "after", "change", "verdict", "launches")
# The last one is left out where there is no room.
_NARROW = _TITLES[:-1]
_SHORT = {NOT_DISTINGUISHABLE: "unclear"}


def print_difference(
    before: RunFacts, after: RunFacts, differences: list[Difference], console: Console, top: int = 8
) -> None:
    """Print where the difference between the two runs went, phase by phase."""
    for name, facts in (("before", before), ("after", after)):
        for line in heading(facts):
            console.print(Text(f"{name}: ", style="bold").append_text(line), highlight=False)
    names = {facts.device.name for facts in (before, after)}
    if len(names) > 1:
        text = f"These runs are of different devices ({', '.join(sorted(names))}): a difference may be the device's."
        console.print(Text(text, style="bold yellow"))
    for difference in differences:
        console.print()
        console.print(_total(difference), highlight=False)
        per = difference.per
        for table in (
            _bars(difference, "bars", f"Kernels by kind, gaps by cause, per {per}", top, console.width),
            _bars(
                difference, "work", f"By the kind of work, per {per} (gaps: of the kernel after)", top, console.width
            ),
            _bars(difference, "modules", f"By module, per {per}", top, console.width),
        ):
            if table.rows:
                console.print()
                console.print(table)
        for sentence in difference.missing:
            console.print()
            console.print(sentence)
        if difference.checked is not None:
            console.print()
            for said in _checked(difference.checked):
                console.print(Padding(said, (0, 0, 0, 2)), highlight=False)


def _total(difference: Difference) -> Text:
    text = Text(f"{difference.phase.capitalize()}, per {difference.per}: ", style="bold")
    parts = []
    for unit, before, after, times in (
        ("J", difference.before_j, difference.after_j, difference.ratio_j),
        ("s", difference.before_s, difference.after_s, difference.ratio_s),
    ):
        changed = change(before, after)
        if before is None or after is None or changed is None:
            continue
        ratio = f"× {times:.2f}"
        parts.append(f"{with_interval(before, unit)} → {with_interval(after, unit)} ({signed(changed, unit)}, {ratio})")
    return text.append("; ".join(parts) + ".")


def signed(estimate: Estimate, unit: str) -> str:
    """Return *estimate* with its interval and, where it is positive, a plus sign."""
    return ("+" if estimate.value > 0 else "") + with_interval(estimate, unit)


def _bars(difference: Difference, view: str, title: str, top: int, width: int) -> Table:
    wide = width >= _WIDE
    rows = getattr(difference, view)
    has_energy = bool(rows["change_j"].notna().any())
    key, unit = ("change_j", "J") if has_energy else ("change_s", "s")
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1, min_width=_LEAST)
    titles = _TITLES if wide else _NARROW
    for column in titles:
        table.add_column(column, justify="right", no_wrap=True)
    if wide:
        table.add_column("", no_wrap=True, width=_BAR)
    largest = max(float(rows[key].abs().max()), 1e-12) if len(rows) else 1.0
    shown, rest = rows.head(top).to_dict("records"), rows.iloc[top:]
    if len(rest):
        sums = rest.sum(numeric_only=True).to_dict()
        shown.append({**sums, "part": "", "name": f"{len(rest)} others", "module": ""})
    cells: list[list[Any]] = []
    for row in shown:
        estimate = Estimate(row[key], row["low_j"], row["high_j"]) if has_energy else Estimate(row[key])
        words = [f"{row['part']}:" if row["part"] in ("gaps", "kernels") else "", row["name"], row.get("module")]
        name = " ".join(str(word) for word in words if word).replace("model.layers.", "")
        before, after = (quantity(row[f"{side}_{key[-1]}"], unit) for side in ("before", "after"))
        bar = [_bar(row[key] / largest)] if wide else []
        told = verdict(row["low_j"], row["high_j"]) if has_energy else verdict(None, None)
        told = told if width >= _ROOMY else _SHORT.get(told, told)
        numbers = (before, after, signed(estimate, unit), told, _launches(row))
        cells.append([name, *numbers[: len(titles)], *bar])
    # What is left of the line beside the numbers, with two blanks between columns.
    others = sum(2 + max([len(title), *(len(str(c[i])) for c in cells)]) for i, title in enumerate(titles, 1))
    room = max(_LEAST, width - others - (_BAR + 2 if wide else 0))
    for name, *rest in cells:
        table.add_row(elided(name, room), *rest)
    return table


def _launches(row: dict[Any, Any]) -> str:
    before, after = row["launches_before"], row["launches_after"]
    if before != before and after != after:
        return ""
    return " → ".join(
        "0" if value != value else count(value if value < 10 else round(value)) for value in (before, after)
    )


def _bar(share: float) -> Text:
    blocks = "█" * min(_BAR, round(abs(share) * _BAR))
    return Text(blocks, style="red" if share > 0 else "green")


def _checked(checked: Checked) -> list[str]:
    made = checked.prediction
    lines = [f"Predicted for {made.name} ({made.change}), per {made.unit}:"]
    pairs = [("latency", made.latency_s, checked.latency_s, "s", checked.latency_error)]
    if made.energy_j is not None and checked.energy_j is not None and checked.energy_error is not None:
        pairs.append(("energy", made.energy_j, checked.energy_j, "J", checked.energy_error))
    for what, predicted, measured, unit, error in pairs:
        lines.append(
            f"  {what}: predicted {with_interval(predicted, unit)}, measured {with_interval(measured, unit)}, off by "
            f"{error:+.1%}"
        )
    return lines
