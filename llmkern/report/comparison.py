"""Several runs beside a baseline: a line for each phase of each, in the terminal and on a page with what differs."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmkern.explain.compare import Difference
from llmkern.explain.versus import Versus
from llmkern.report.heading import called, heading
from llmkern.report.records import estimate_facts
from llmkern.runfolder.facts import RunFacts
from llmkern.runfolder.place import begins_with, check_file_target, placed
from llmkern.text import signed, with_interval

# More charts than these are no page any more; the table has all.
_MOST_CHARTS = 12
_is_page = begins_with(b'<meta name="generator" content="llmkern">', within=1024)


def versus_facts(names: list[str], lines: list[Versus]) -> list[dict[str, Any]]:
    """Return *lines* as plain values for JSON."""
    return [
        {
            "run": names[line.run],
            "phase": line.phase,
            "per": line.per,
            **{key: estimate_facts(getattr(line, key)) for key in ("before_s", "after_s", "before_j", "after_j")},
            "change_s": estimate_facts(line.change_s),
            "change_j": estimate_facts(line.change_j),
            "verdict": line.verdict,
        }
        for line in lines
    ]


def versus_table(names: list[str], lines: list[Versus]) -> pd.DataFrame:
    """Return *lines* as a table with three columns for every estimate."""
    rows = []
    for facts in versus_facts(names, lines):
        row: dict[str, Any] = {}
        for key, value in facts.items():
            if isinstance(value, dict):
                row |= {key: value["value"], f"{key}_low": value["low"], f"{key}_high": value["high"]}
            else:
                row[key] = value
        rows.append(row)
    return pd.DataFrame(rows)


def print_versus(runs: list[RunFacts], names: list[str], lines: list[Versus], console: Console) -> None:
    """Print the baseline, then a line for each phase of each run."""
    console.print(Text("baseline: ", style="bold").append_text(heading(runs[0])[0]), highlight=False)
    for sentence in _doubts(runs):
        console.print(Text(sentence, style="bold yellow"))
    for phase in dict.fromkeys(line.phase for line in lines):
        chosen = [line for line in lines if line.phase == phase]
        console.print()
        table = Table(
            title=f"{phase.capitalize()}, per {chosen[0].per}",
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
        )
        wide = console.width >= 110
        for number, title in enumerate(["run", "time", "energy", "verdict"] if wide else ["run", "energy", "verdict"]):
            table.add_column(title, justify="left" if number == 0 else "right", overflow="fold")
        base = chosen[0]
        time, energy = with_interval(base.before_s, "s"), with_interval(base.before_j, "J")
        table.add_row(*([names[0], time, energy, "baseline"] if wide else [names[0], energy, "baseline"]))
        for line in chosen:
            time, energy = with_interval(line.after_s, "s"), with_interval(line.after_j, "J")
            told = [names[line.run], time, energy, line.verdict]
            table.add_row(*(told if wide else [told[0], *told[2:]]))
        console.print(table)


def _doubts(runs: list[RunFacts]) -> list[str]:
    devices = sorted({facts.device.name for facts in runs})
    if len(devices) > 1:
        return [f"These runs are of different devices ({', '.join(devices)}): a difference may be the device's."]
    return []


def check_page(file: Path) -> None:
    """Refuse *file* where something is that is no page of ours; raises UsageError."""
    check_file_target(file, _is_page, force=True, option="--html")


def write_page(text: str, file: Path) -> None:
    """Write a page to *file*, replacing an older one when it is whole."""
    with placed(file, _is_page, force=True, option="--html") as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


def page(runs: list[RunFacts], names: list[str], lines: list[Versus], differences: list[list[Difference]]) -> str:
    """Return the comparison as HTML that needs no other file and no network."""
    from llmkern.report import charts
    from llmkern.report.html import _library

    drawn: list[dict[str, Any]] = []
    for number, found in enumerate(differences, start=1):
        for compared in found[:1]:
            spec = charts.difference(compared)
            if spec is not None and len(drawn) < _MOST_CHARTS:
                title = f"{names[number]}: what changed in {compared.phase}, per {compared.per}"
                text = json.dumps(spec).replace("<", "\\u003c")
                drawn.append({"id": f"difference-{number}", "title": title, "spec": spec, "json": text})
    rows = [
        {
            "run": names[line.run],
            "called": called(runs[line.run]),
            "phase": f"{line.phase}, per {line.per}",
            "time": with_interval(line.after_s, "s"),
            "change_s": signed(line.change_s),
            "energy": with_interval(line.after_j, "J"),
            "change_j": "–" if line.change_j is None else signed(line.change_j),
            "verdict": line.verdict,
        }
        for line in lines
    ]
    base = {line.phase: line for line in reversed(lines)}
    source = resources.files("llmkern.report") / "page"
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (source / "comparison.html.j2").read_text()
    )
    return template.render(
        title=f"{len(runs) - 1} run{'s' if len(runs) > 2 else ''} beside {called(runs[0])}",
        device=runs[0].device.name,
        baseline=str(heading(runs[0])[0]),
        baselines=[
            f"{name}, per {line.per}: {with_interval(line.before_s, 's')}, {with_interval(line.before_j, 'J')}"
            for name, line in sorted(base.items())
        ],
        answer=[f"{names[line.run]}: {line.phase} {line.verdict}." for line in lines if line.phase == lines[0].phase],
        rows=rows,
        charts=drawn,
        doubts=_doubts(runs),
        style=(source / "page.css").read_text(),
        script=(source / "page.js").read_text(),
        library=_library() if drawn else "",
    )
