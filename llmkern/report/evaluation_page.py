"""An evaluation as one self-contained page in the style of the run page."""

from __future__ import annotations

import json
from importlib import resources as files
from typing import Any

import altair as alt
import jinja2
import pandas as pd

from llmkern.evaluate.verdict import Statement
from llmkern.report import evaluation as terminal
from llmkern.report.charts import Spec, _finished
from llmkern.report.html import _library

_MOST_CHARTS = 12
_NOTE = "Shorter is faster; pale is wrong."
_METHOD = (
    "Each contender ran in a process of its own. Its output was held against fp32 on the dequantized weights, in "
    "memory "
    "that was filled with NaN before, on random, outlier-heavy, large, small and oddly sized inputs, and once more "
    "after "
    "timing. A value matches within 1 % of itself and 2 % of the output's root mean square.",
    "Latency: distinct copies of the weights take turns inside one CUDA graph, six times the L2 in all, so that each "
    "call reads its weights from memory; µs per call of 30 replays, median with 5th and 95th percentile. Warm: one "
    "copy.",
    "Energy per call: windows of 1.2 s of nothing else less the idle floor of this board, by the estimator of the "
    "attribution, plus the floor for as long as the call ran. Intervals are 95 %.",
    "Share of the data sheet counts the bytes of the weights' codes alone; share of what was read in the same call "
    "counts "
    "codes and scales.",
)


def page(statement: Statement) -> str:
    """Return the page of *statement* as HTML that needs no other file and no network."""
    source = files.files("llmkern.report") / "page"
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (source / "evaluation.html.j2").read_text()
    )
    charts = _charts(statement)
    return template.render(
        title=_title(statement),
        device=statement.evaluation.device,
        verdicts=statement.verdicts,
        roof=terminal.roof_sentence(statement),
        cases=[{"title": key, "rows": list(map(_row, lines))} for key, lines in terminal.by_case(statement).items()],
        timed=any(line.cold_us is not None for line in statement.lines),
        fits=statement.fits,
        in_model=statement.in_model,
        model=statement.evaluation.request.in_model,
        launches=terminal.resources(list(statement.lines)),
        charts=[{**chart, "json": json.dumps(chart["spec"]).replace("<", "\\u003c")} for chart in charts],
        doubts=statement.doubts,
        method=_METHOD,
        environment={name: value for name, value in statement.evaluation.versions.items() if value},
        style=(source / "page.css").read_text(),
        script=(source / "page.js").read_text(),
        library=_library() if charts else "",
    )


def _title(statement: Statement) -> str:
    own = [verdict.name for verdict in statement.verdicts]
    formats = sorted({case.format for case in statement.evaluation.request.cases})
    return f"{', '.join(own) or 'llmkern and its peers'}: {', '.join(formats)} linear layers"


def _row(line: Any) -> dict[str, Any]:
    rel_l2, matched = terminal.accuracy(line)
    return {
        "name": line.row.candidate,
        "own": line.own,
        "right": line.right,
        "judgement": line.judgement,
        "rel_l2": rel_l2,
        "matched": matched,
        "cold": terminal.spread_text(line.cold_us),
        "warm": terminal.number(line.warm_us, 2),
        "sheet": terminal.percent(line.share_of_sheet),
        "read": terminal.percent(line.share_of_read),
        "energy": terminal.energy_text(line),
        "per_gb": terminal.number(line.joules_per_gb, 3),
    }


def _charts(statement: Statement) -> list[dict[str, Any]]:
    """Return a chart per case of µs per call, cold, by contender; only what was timed."""
    found = []
    for number, (key, lines) in enumerate(terminal.by_case(statement).items()):
        rows = [
            {
                "contender": line.row.candidate,
                "µs per call, cold": line.cold_us.value,
                "who": "candidate" if line.own else "peer",
                "right": "right" if line.right else "wrong",
            }
            for line in lines
            if line.cold_us is not None
        ]
        if rows and number < _MOST_CHARTS:
            title = f"{key}: µs per call with cold weights"
            found.append({"id": f"speed-{number}", "title": title, "note": _NOTE, "spec": _bars(rows, title)})
    return found


def _bars(rows: list[dict[str, Any]], title: str) -> Spec:
    who = alt.Scale(domain=["candidate", "peer"], range=["#e4572e", "#4d9de0"])
    right = alt.Scale(domain=["right", "wrong"], range=[1.0, 0.35])
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar()
        .encode(
            y=alt.Y("contender:N", title=None, sort="x"),
            x=alt.X("µs per call, cold:Q"),
            color=alt.Color("who:N", title=None, scale=who),
            opacity=alt.Opacity("right:N", title=None, scale=right),
            tooltip=["contender", "µs per call, cold", "right"],
        )
        .properties(width="container", height=26 * len(rows))
    )
    return _finished(chart, title)
