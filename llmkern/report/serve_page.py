"""A serving study as one self-contained page in the style of the run page."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import altair as alt
import jinja2

from llmkern.report.charts import Spec, _finished
from llmkern.report.heading import called
from llmkern.report.html import _library, is_page
from llmkern.report.records import records
from llmkern.report.serve import columns_of, iteration_columns, iteration_rows, row_of, told_of
from llmkern.report.study_charts import _told, figure_spec
from llmkern.runfolder.place import placed
from llmkern.serve.figures import figures, over_time
from llmkern.serve.statement import Arrivals, ServeStatement
from llmkern.text import percent, with_interval

_METHOD = (
    "An iteration's joules, the idle floor and what is above it apart, go to the requests in it by the tokens that it "
    "computed of each; idle is the floor over the time in which none ran. What these leave of the counter is told.",
    "Requests are sent at their intended times whatever the server does; times are counted from there. Sequential is a "
    "closed loop: each when the one before is answered. Intervals are 95 %, over blocks of requests in their order.",
)


def write_serve_page(statement: ServeStatement, file: Path) -> None:
    """Write the page of a serving study to *file*; raises UsageError where something else is."""
    with placed(file, is_page, force=True) as beside:
        beside.write_text(serve_page(statement), encoding="utf-8", errors="replace")


def serve_page(statement: ServeStatement) -> str:
    """Return the page of a serving study as HTML that needs no other file and no network."""
    source = resources.files("llmkern.report") / "page"
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (source / "serve.html.j2").read_text()
    )
    drawn: list[dict[str, Any]] = []
    for figure in figures(statement.arrivals):
        rows = [{"x": r["x"], "series": r["series"], "told": _told(r, figure.unit)} for r in records(figure.rows)]
        spec = figure_spec(figure)
        drawn.append(
            {"id": figure.name, "title": figure.title, "note": figure.note, "spec": spec, "rows": rows}
            | {"y": figure.y}
        )
    for number, one in enumerate(statement.arrivals):
        title = f"Requests over time: {one.pattern}"
        note = "Open: sent and not answered yet. Batch: in an iteration."
        drawn.append(
            {"id": f"time-{number}", "title": title, "note": note, "spec": _over_time(one), "rows": [], "y": ""}
        )
    first = statement.arrivals[0]
    return template.render(
        title=f"{called(first.facts)}: {len(first.found.requests)} requests",
        device=first.facts.device.name,
        answer=_answer(statement),
        columns=columns_of(wide=True),
        rows=[row_of(one, wide=True) for one in statement.arrivals],
        figures=[{**one, "json": json.dumps(one["spec"]).replace("<", "\\u003c")} for one in drawn],
        iteration_columns=iteration_columns(wide=True),
        iterations=[row for one in statement.arrivals for row in iteration_rows(one, wide=True)],
        books=[sentence for one in statement.arrivals for sentence in told_of(one)],
        doubts=statement.doubts,
        failed=statement.failed,
        method=_METHOD,
        versions={name: version for name, version in first.facts.versions.items() if version},
        style=(source / "page.css").read_text(),
        script=(source / "page.js").read_text(),
        library=_library(),
    )


def _answer(statement: ServeStatement) -> list[str]:
    known = [(one, one.request_j) for one in statement.arrivals if one.request_j is not None]
    if len(known) < 2:
        return []
    (least, low), (most, high) = (pick(known, key=lambda pair: pair[1].value) for pick in (min, max))
    idle = [percent(one.idle_share or 0.0) for one in (least, most)]
    return [
        f"A request takes from {with_interval(low, 'J')} ({least.pattern}: {least.mean_batch:.1f} requests an "
        f"iteration, {idle[0]} of the joules idle) to {with_interval(high, 'J')} ({most.pattern}: "
        f"{most.mean_batch:.1f}, {idle[1]})."
    ]


def _over_time(one: Arrivals) -> Spec:
    """Return open requests and batch over the window, with the power above them where there is energy."""
    frame = over_time(one).round(4)
    lines: Any = (
        alt.Chart(alt.Data(values=records(frame)))
        .mark_line(interpolate="step-after", strokeWidth=1.5)
        .encode(
            x=alt.X("second:Q", title="s since the first request"),
            y=alt.Y("value:Q", title="requests"),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=["open requests", "batch"], range=["#e0a526", "#1f6fb4"]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
        )
        .properties(height=160)
    )
    told = f"Open requests and batch over {one.found.seconds:.1f} s of {one.pattern} arrivals"
    if one.found.power is None:
        return _finished(lines, told)
    power = (
        alt.Chart(alt.Data(values=records(one.found.power.round(2))))
        .mark_line(interpolate="step-after", strokeWidth=1.5, color="#e4572e")
        .encode(x=alt.X("second:Q", title=None, axis=alt.Axis(labels=False)), y=alt.Y("watts:Q", title="W"))
        .properties(height=90)
    )
    return _finished(alt.vconcat(power, lines, spacing=4), f"{told}, and the power that it took")
