"""The report as one self-contained page: its answer first, then charts, tables, doubts, method and environment."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import vl_convert

from llmkern import __version__
from llmkern.estimate import Estimate
from llmkern.explain.page_data import PageData
from llmkern.explain.statement import PhaseStatement, Statement, Told
from llmkern.report import charts
from llmkern.report.difference import signed
from llmkern.report.heading import called
from llmkern.report.why import price
from llmkern.runfolder.facts import RunFacts
from llmkern.runfolder.place import begins_with, placed
from llmkern.text import count, percent, quantity, short_name, with_interval

_ROWS = 60


def write_page(statement: Statement, data: PageData, file: Path) -> None:
    """Write the page of a run to *file*, replacing an older one when it is whole.

    Raises UsageError where *file* is no page of ours, RecordingError where the disk refuses.
    """
    text = page(statement, data)
    with placed(file, is_page, force=True, option="--html") as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


is_page = begins_with(b'<meta name="generator" content="llmkern">', within=1024)


def page(statement: Statement, data: PageData) -> str:
    """Return the page of a run as HTML that needs no other file and no network."""
    facts = statement.facts
    uncertain = list(statement.doubts)
    options, prompts = facts.options, facts.prompts
    source = resources.files("llmkern.report") / "page"
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (source / "page.html.j2").read_text()
    )
    return template.render(
        title=f"{called(facts)}, batch {options.batch}: "
        f"{prompts.tokens if prompts is not None else '?'} prompt tokens, {options.new_tokens} new",
        device=facts.device.name,
        incomplete="" if statement.complete else uncertain.pop(0),
        answer=" ".join(statement.answer),
        against=_against(data),
        tiles=_tiles(statement),
        findings=[_finding(told) for told in statement.findings],
        predictions=[
            {"phase": f"{phase.phase}, per {phase.unit}", "html": _predictions(statement, phase)}
            for phase in reversed(statement.phases)
        ],
        fixes=list({p.name: p for p in statement.predictions}.values()),
        charts=_charts(statement, data),
        tables=[t for t in (_table(name, data.tables) for name in _TITLES) if t is not None],
        uncertain=uncertain,
        method=[*_METHOD, *(book.sentence for book in statement.books)],
        environment=_environment(facts),
        style=(source / "page.css").read_text(),
        script=(source / "page.js").read_text(),
        library=_library(),
    )


_METHOD = (
    "Latency and energy per phase were weighed with nothing in the process but a thread that reads the sensors; decode "
    "= (generate(n) - generate(1)) / (n - 1). Kernels and host calls were recorded by CUPTI in passes of their own.",
    "Energy of a gap = (idle floor + what a busy host adds) x its time; energy of a kernel = idle floor x its time + "
    "the joules that a launch adds, from replays of the operators alone where there are any, else by equal power. "
    "Kernels + gaps + residual = what the counter moved. Intervals are 95 %.",
)
_TITLES = {
    "kinds": "Kernels by kind",
    "causes": "Gaps by cause",
    "operators": "Operators",
    "kernels": "Kernels",
    "gaps": "Gaps: what the host was at",
    "roofline": "Operators against their roof",
    "host_calls": "Host calls",
    "devices": "Devices",
}


def _against(data: PageData) -> str:
    """Return in one sentence by how much this run's main phase differs from the baseline's, and where."""
    if data.baseline is None or not data.compared:
        return ""
    facts, first = data.baseline, data.compared[0]
    name = called(facts)
    if first.before_j is None or first.after_j is None:
        return f"Per {first.per} {first.ratio_s:.2f} times the time of {name} in {first.phase}."
    parts = [
        f"{signed(Estimate(row['change_j'], row['low_j'], row['high_j']), 'J')} "
        f"{'in gaps before' if row['part'] == 'gaps' else 'in'} {row['name']} kernels"
        for row in first.work.head(4).to_dict("records")
    ]
    return (
        f"{first.ratio_j:.2f} times the energy of {name} per {first.per} of {first.phase} "
        f"({with_interval(first.before_j, 'J')} to {with_interval(first.after_j, 'J')}): {'; '.join(parts)}."
    )


def _tiles(statement: Statement) -> list[dict[str, str]]:
    tiles = []
    for phase in reversed(statement.phases):
        name = phase.phase
        if phase.energy_per_token_j is not None:
            tiles.append(_tile(phase.energy_per_token_j, "J", f"{name}, per token"))
        elif phase.energy_j is not None:
            tiles.append(_tile(phase.energy_j, "J", f"{name}, per {phase.unit}"))
        tiles.append(_tile(phase.latency_s, "s", f"{name}, per {phase.unit}"))
        tiles.append({"value": percent(phase.busy_share), "label": f"{name}: device busy", "doubt": ""})
    return tiles


def _tile(estimate: Estimate, unit: str, label: str) -> dict[str, str]:
    value, _, doubt = with_interval(estimate, unit).partition(" [")
    ends, _, name = doubt.rpartition("] ")
    return {"value": f"{value} {name}".strip(), "label": label, "doubt": f"{ends.replace(', ', ' to ')} {name}".strip()}


def _finding(told: Told) -> dict[str, Any]:
    finding = told.finding
    words = {name: getattr(finding, name) for name in ("claim", "formula", "assumption", "next_step")}
    return {"price": price(told), **words, "evidence": _frame(finding.evidence)}


def _predictions(statement: Statement, phase: PhaseStatement) -> str:
    rows = [
        {
            "fix": p.name,
            "latency": with_interval(p.latency_s, "s"),
            "energy": with_interval(p.energy_j, "J"),
            "change": "" if p.saves is None else f"{-p.saves:+.0%}",
        }
        for p in statement.predictions
        if p.phase == phase.phase
    ]
    return _rendered(pd.DataFrame(rows), {"latency", "energy", "change"}) if rows else ""


def _charts(statement: Statement, data: PageData) -> list[dict[str, Any]]:
    phases = list(reversed(statement.phases))
    made: list[tuple[str, str, str, charts.Spec | None, str]] = []
    changes = []
    for one in data.compared:
        title = f"From the baseline to this run: {one.phase}, per {one.per}"
        note = "Bars add up from the energy of the baseline to that of this run; lines are 95 % intervals."
        changes.append((f"change-{one.phase}", title, note, charts.difference(one), _frame(one.modules.head(20))))
    for phase in phases:
        title = f"Where the energy of one {phase.unit} of {phase.phase} goes"
        note = "Bars add up from left to right to the measured energy; lines are 95 % intervals."
        made.append((f"energy-{phase.phase}", title, note, charts.waterfall(statement, phase), ""))
    made.insert(
        1,
        (
            "timeline",
            "One decoded token",
            "The token of median length in the pass that records host calls. Drag or use the arrow keys to move, + and "
            "- or Alt and the wheel to zoom.",
            None if data.step is None else charts.timeline(data.step),
            "",
        ),
    )
    for phase in phases:
        every = data.tables["roofline"]
        roof = every[every["phase"] == phase.phase] if len(every) else every
        made.append(_roof_chart(phase, roof))
        spec = charts.layer_map(data.tables["layers"], phase.phase)
        title = f"Layers of the model in {phase.phase}"
        note = f"{'Energy' if phase.kernels is not None else 'Time'} in kernels, without the gaps between them."
        made.append((f"layers-{phase.phase}", title, note, spec, ""))
    return [
        {
            "id": name,
            "title": title,
            "note": note,
            "spec": spec,
            "json": json.dumps(spec).replace("<", "\\u003c"),
            "zooms": name == "timeline",
            "table": table,
        }
        for name, title, note, spec, table in [*changes[:1], *made, *changes[1:]]
        if spec is not None
    ]


def _roof_chart(phase: PhaseStatement, roof: pd.DataFrame) -> tuple[str, str, str, charts.Spec | None, str]:
    note = (
        "Each point is an operator of one kind of module. On the dashed line it takes only the time that its bytes "
        "need at full bandwidth, or its FLOPs at full rate; far above it, it waits for something else."
    )
    columns = ["kind", "op", "module", "bound", "calls", "duration_ns", "floor_ns", "roof_share", "waste_j"]
    return (
        f"roof-{phase.phase}",
        f"Operators of {phase.phase} against their roof",
        note,
        charts.roofs(roof, phase.unit) if len(roof) else None,
        _frame(roof[columns].head(20)) if len(roof) else "",
    )


def _table(name: str, tables: dict[str, pd.DataFrame]) -> dict[str, str] | None:
    table = tables.get(name)
    if table is None or table.empty:
        return None
    by = next((c for c in ("energy_j", "duration_ns") if c in table and table[c].notna().any()), None)
    shown = table if by is None else table.sort_values(["phase", by], ascending=[True, False])
    hidden = [c for c in ("floor_j", "dynamic_j", "signature", "kernels", "moved_bytes", "flops") if c in shown]
    shown = shown.drop(columns=hidden)
    parts = [shown[shown["phase"] == phase].head(_ROWS) for phase in shown["phase"].unique()]
    cut = "" if all(len(part) < _ROWS for part in parts) else f"<p class='note'>The first {_ROWS} of each phase.</p>"
    return {"title": _TITLES[name], "html": cut + _frame(pd.concat(parts))}


_SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "duration_ns": ("time", lambda v: quantity(v / 1e9, "s")),
    "floor_ns": ("at the roof", lambda v: quantity(v / 1e9, "s")),
    "time_ms": ("time", lambda v: quantity(v / 1e3, "s")),
    "energy_j": ("energy", lambda v: quantity(v, "J")),
    "floor_energy_j": ("energy at the roof", lambda v: quantity(v, "J")),
    "waste_j": ("waste", lambda v: quantity(v, "J")),
    "roof_share": ("of roof", "{:.0%}".format),
    "launches": ("count", count),
    "calls": ("calls", count),
    "bytes_per_s": ("TB/s", lambda v: f"{v / 1e12:.2f}"),
    "flops_per_s": ("TFLOP/s", lambda v: f"{v / 1e12:.1f}"),
}


def _frame(frame: pd.DataFrame) -> str:
    """Return *frame* as an HTML table: units in words, energies with their intervals, short kernel names."""
    if frame.empty:
        return ""
    shown = frame.copy()
    if {"energy_j", "low_j", "high_j"} <= set(shown.columns):
        estimates = zip(shown["energy_j"], shown["low_j"], shown["high_j"], strict=True)
        shown["energy_j"] = [_interval(*row) for row in estimates]
        shown = shown.rename(columns={"energy_j": "energy"})
    shown = shown.drop(columns=[c for c in ("low_j", "high_j") if c in shown])
    numbers = {"energy"}
    for column in list(shown.columns):
        if column in _SHOWN:
            title, render = _SHOWN[column]
            shown[column] = ["–" if v is None or v != v else render(v) for v in shown[column]]
            shown = shown.rename(columns={column: title})
            numbers.add(title)
        elif column in ("name", "op"):
            shown[column] = [short_name(str(v)).removesuffix(".default") for v in shown[column]]
        elif pd.api.types.is_float_dtype(shown[column]):
            shown[column] = ["–" if v != v else f"{v:,.2f}" for v in shown[column]]
            numbers.add(column)
    return _rendered(shown, numbers)


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or value != value:
        return "–"
    known = low is not None and high is not None and low == low and high == high
    return with_interval(Estimate(value, low, high), "J") if known else quantity(value, "J")


def _rendered(frame: pd.DataFrame, numbers: set[str]) -> str:
    def kind(column: object) -> str:
        return "n" if column in numbers else "name"

    head = "".join(
        f'<th scope="col" class="{kind(c)}">{html.escape(str(c).replace("_", " "))}</th>' for c in frame.columns
    )
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind(c)}">{html.escape(_text(v))}</td>' for c, v in row.items()) + "</tr>"
        for row in frame.to_dict("records")
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(value: Any) -> str:
    return "–" if value is None or value != value else str(value)


def _environment(facts: RunFacts) -> list[tuple[str, str]]:
    device, host = asdict(facts.device), asdict(facts.host)
    rows = [("llmkern", __version__), ("started", facts.started), ("command", facts.command)]
    rows += [(name, str(version)) for name, version in facts.versions.items() if version]
    rows += [(name.replace("_", " "), str(value)) for name, value in device.items() if value is not None]
    rows += [(f"host {name.replace('_', ' ')}", str(value)) for name, value in host.items() if value is not None]
    return [row for row in rows if row[1]]


@cache
def _library() -> str:
    """Return the charts' library; bundling it takes seconds."""
    return _script_safe(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _script_safe(code: str) -> str:
    """Return *code* so that nothing in it ends the script element that it stands in."""
    return re.sub(r"<(/script|!--)", r"<\\\1", code, flags=re.IGNORECASE)
