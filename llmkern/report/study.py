"""A study in the terminal and as one self-contained page."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmkern.runfolder.place import placed
from llmkern.study.statement import StudyStatement

_VERDICTS = {"seen": "green", "seen in part": "yellow", "not seen": "red", "cannot be told": "dim"}
_METHOD = (
    "Each configuration ran in a process of its own, in random order; latency and energy were weighed in windows of at "
    "least two seconds (half a second where there is no energy) with nothing attached but the sensors. "
    "Decode = generate(n) - generate(1).",
    "Effective tokens are those of prompts without padding, and of answers as long as they were wanted; computed "
    "tokens are rows times the longest. Draws of one configuration are joined: all joules by all tokens. "
    "Intervals are 95 %.",
    "An optimum's interval holds the sizes that were the cheapest in 95 % of the draws of all measured curves.",
)
# Columns of the summary that a terminal of 80 and one of 120 columns has room for.
_NARROW, _WIDE = 3, 5


def print_study(statement: StudyStatement, console: Console) -> None:
    """Print the answer, a line per configuration, the claims, doubts and what failed."""
    console.print(Text(statement.title, style="bold"))
    console.print(f"{', '.join(statement.devices)}; {len(statement.summary)} configurations", highlight=False)
    for sentence in statement.answer:
        console.print(Padding(sentence, (1, 0, 0, 0)), highlight=False)
    console.print()
    table = Table(box=None, pad_edge=False)
    summary = statement.summary
    told = [name for name in summary.columns if not (summary[name] == "–").all()]
    columns = told[: _WIDE if console.width >= 120 else _NARROW]
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in summary[columns].itertuples(index=False):
        table.add_row(*map(str, row))
    console.print(table)
    known = [claim for claim in statement.claims if claim.verdict != "not measured"]
    if known:
        console.print()
        console.print(Text("Claims of the study", style="bold"))
        for claim in known:
            said = Text("• ").append(claim.verdict, style=_VERDICTS.get(claim.verdict, "")).append(f": {claim.said}")
            console.print(Padding(said, (0, 0, 0, 2)), highlight=False)
            for line in claim.numbers:
                console.print(Padding(line, (0, 0, 0, 6)), highlight=False)
    print_open(statement.doubts, statement.failed, console)


def print_open(doubts: tuple[str, ...], failed: dict[str, str], console: Console) -> None:
    """Print what is uncertain, and why runs are missing."""
    missing = [f"{name}: {reason}" for name, reason in failed.items()]
    for title, lines in (("What is uncertain", doubts), ("Not here", missing)):
        if lines:
            console.print()
            console.print(Text(title, style="bold"))
            for line in lines:
                console.print(Padding(f"• {line}", (0, 0, 0, 2)), highlight=False)


def study_page(statement: StudyStatement) -> str:
    """Return the page of a study as HTML that needs no other file and no network."""
    from llmkern.report.html import _library
    from llmkern.report.study_charts import _told, figure_spec

    source = resources.files("llmkern.report") / "page"
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (source / "study.html.j2").read_text()
    )
    figures = []
    for figure in statement.figures:
        spec = figure_spec(figure)
        rows = [{"x": r["x"], "series": r["series"], "told": _told(r, figure.unit)} for r in _rows(figure.rows)]
        figures.append({"figure": figure, "spec": spec, "rows": rows, "json": _script_safe(spec)})
    return template.render(
        title=statement.title,
        devices=", ".join(statement.devices),
        answer=statement.answer,
        figures=figures,
        columns=list(statement.summary.columns),
        summary=statement.summary.values.tolist(),
        claims=statement.claims,
        books=_rows(statement.books),
        totals={name: statement.books[name].sum() for name in statement.books.columns if name != "run"},
        doubts=statement.doubts,
        failed=statement.failed,
        method=_METHOD,
        versions=statement.versions,
        style=(source / "page.css").read_text(),
        script=(source / "page.js").read_text(),
        library=_library() if figures else "",
    )


def _script_safe(spec: dict[str, Any]) -> str:
    return json.dumps(spec).replace("<", "\\u003c")


def _rows(frame: Any) -> list[dict[Any, Any]]:
    found: list[dict[Any, Any]] = frame.to_dict("records")
    return found


def write_study(statement: StudyStatement, folder: Path) -> list[Path]:
    """Write page, pictures and tables of a study into *folder* and return the files.

    Raises UsageError where something else is, RecordingError where the disk refuses.
    """
    from llmkern.report.html import is_page
    from llmkern.report.records import write_csv
    from llmkern.report.study_charts import write_pictures
    from llmkern.runfolder.place import begins_with

    page = folder / "study.html"
    with placed(page, is_page, force=True) as beside:
        beside.write_text(study_page(statement), encoding="utf-8", errors="replace")
    tables = {"numbers": statement.frame, "books": statement.books, "summary": statement.summary}
    found = [page, *write_csv({name: table for name, table in tables.items() if len(table)}, folder / "tables")]
    parquet = folder / "numbers.parquet"
    with placed(parquet, begins_with(b"PAR1"), force=True) as beside:
        statement.frame.to_parquet(beside)
    return [*found, parquet, *write_pictures(statement.figures, folder / "figures")]
