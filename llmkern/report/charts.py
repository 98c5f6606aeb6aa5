"""The charts of the page, as Vega-Lite specifications; colours and fonts come from the page itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import altair as alt
import pandas as pd

from llmkern.explain.compare import Difference
from llmkern.explain.statement import PhaseStatement, Statement
from llmkern.explain.token_step import TokenStep
from llmkern.report.records import records
from llmkern.text import percent, quantity, short_name

# More bars than this are one bar more.
_MOST_BARS = 12
_ORDER = ["gaps", "kernels"]
_GROUPS = {
    "gaps": "#e0a526",
    "kernels": "#3d7ea6",
    "residual": "#9c89b8",
    "whole": "#7d8a93",
    "more": "#d1495b",
    "less": "#2a9d8f",
}
Spec = dict[str, Any]
# Products blue, conversions red to orange, everything else green to grey; gaps amber, the host grey. All of them can be
# told apart on white and on black.
COLOURS = {
    "gemm": "#1f6fb4",
    "gemv": "#4d9de0",
    "attention": "#7b6fd0",
    "quantize": "#d1495b",
    "dequantize": "#e4572e",
    "outlier": "#b5179e",
    "cast": "#f08a5d",
    "norm": "#2a9d8f",
    "rope": "#52b788",
    "elementwise": "#8ab17d",
    "reduce": "#6a994e",
    "gather": "#94a89a",
    "sampling": "#5c7a89",
    "copy": "#9aa5b1",
    "memset": "#b8c0c8",
    "other": "#808080",
    "gap: launch_bound": "#e9b949",
    "gap: sync_stall": "#c9622b",
    "gap: token_boundary": "#a58a4f",
    "gap: dependency": "#8f6a9f",
    "gap: launch_latency": "#f3dc9a",
    "gap: profiler": "#c3a6c9",
    "gap: unknown": "#bbb3a2",
    "host launches": "#8d99ae",
    "host waits": "#d90429",
}
# What moves fewer bytes than this (3 kB on an H100) has no roof to speak of.
_LEAST_US = 1e-3


def waterfall(statement: Statement, phase: PhaseStatement) -> Spec | None:
    """Return the energy of one unit of *phase* as bars that add up: gaps by cause, kernels by kind, residual."""
    energy = phase.energy_j
    if energy is None or phase.kernels is None:
        return None
    rows: list[dict[Any, Any]] = []
    if "causes" in statement.shown:
        rows += [{"label": f"gaps: {row['cause']}", "group": "gaps", **row} for row in _of(statement, "causes", phase)]
    elif phase.gaps is not None:
        part = phase.gaps.energy_j
        rows.append({"label": "gaps", "group": "gaps", "energy_j": part.value, "low_j": part.low, "high_j": part.high})
    kinds = _of(statement, "kinds", phase)
    shown = max(1, _MOST_BARS - len(rows))
    rows += [{"label": str(row["kind"]), "group": "kernels", **row} for row in kinds[:shown]]
    rest = kinds[shown:]
    if rest:
        # A bar for what has no room of its own.
        sums = {key: sum(row[key] for row in rest) for key in ("energy_j", "low_j", "high_j")}
        rows.append({"label": f"{len(rest)} other kinds", "group": "kernels", **sums})
    rows.sort(key=lambda row: (_ORDER.index(row["group"]), -float(row["energy_j"])))
    if phase.residual is not None:
        rows.append({"label": "residual", "group": "residual", "energy_j": phase.residual.energy_j.value})
    at = 0.0
    bars = []
    for row in rows:
        value = float(row["energy_j"])
        low, high = (row.get(key) for key in ("low_j", "high_j"))
        bars.append(_bar(row["label"], row["group"], (at, at + value), energy.value, _beside(at, low, high)))
        at += value
    bars.append(_bar(f"one {phase.unit}", "whole", (0.0, at), energy.value, (energy.low, energy.high)))
    described = f"Waterfall of the energy of one {phase.unit} of {phase.phase}"
    return _bars(bars, f"J per {phase.unit}", ["gaps", "kernels", "residual", "whole"], described)


def _of(statement: Statement, name: str, phase: PhaseStatement) -> list[dict[Any, Any]]:
    shown = statement.shown[name]
    return shown[shown["phase"] == phase.phase].to_dict("records")


def _beside(at: float, low: float | None, high: float | None) -> tuple[float | None, float | None]:
    """Return the ends of an interval on the axis of a bar that begins *at*."""
    if low is None or high is None or low != low or high != high:
        return None, None
    return at + low, at + high


def difference(compared: Difference) -> Spec | None:
    """Return the change of energy per token as bars that lead from the first run to the second."""
    before, after = compared.before_j, compared.after_j
    if before is None or after is None:
        return None
    rows = compared.bars.to_dict("records")
    rest = rows[_MOST_BARS - 1 :]
    rows = rows[: _MOST_BARS - 1]
    if rest:
        rows.append({"part": "", "name": f"{len(rest)} others", "change_j": sum(r["change_j"] for r in rest)})
    at = before.value
    bars = [_bar("before", "whole", (0.0, at), at, (before.low, before.high))]
    for row in rows:
        change_j = float(row["change_j"])
        label = f"{row['part']}: {row['name']}" if row["part"] in ("gaps", "kernels") else str(row["name"])
        group = "more" if change_j > 0 else "less"
        ends = _beside(at, row.get("low_j"), row.get("high_j"))
        bar = _bar(label, group, (at, at + change_j), after.value - before.value, ends)
        bars.append({**bar, "energy": f"{'+' if change_j > 0 else ''}{bar['energy']}"})
        at += change_j
    bars.append(_bar("after", "whole", (0.0, at), at, (after.low, after.high)))
    described = f"Change of the energy per {compared.per} of {compared.phase}"
    return _bars(bars, f"J per {compared.per}", ["more", "less", "whole"], described)


def _bars(bars: list[dict[str, Any]], title: str, groups: list[str], described: str) -> Spec:
    data = alt.Data(values=records(pd.DataFrame(bars)))
    order = [bar["label"] for bar in bars]
    base = alt.Chart(data).encode(y=alt.Y("label:N", sort=order, title=None, axis=alt.Axis(labelLimit=180)))
    tip = ["label:N", "energy:N", "share:N"]
    scale = alt.Scale(domain=groups, range=[_GROUPS[group] for group in groups])
    drawn = base.mark_bar().encode(
        x=alt.X("start:Q", title=title),
        x2="end:Q",
        color=alt.Color("group:N", scale=scale, legend=alt.Legend(title=None, orient="top")),
        tooltip=tip,
    )
    doubt = base.mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q", tooltip=tip)
    text = base.mark_text(align="left", dx=6).encode(x=alt.X("right:Q"), text="energy:N")
    return _finished(
        (drawn + doubt + text).properties(height=24 * len(bars)),
        f"{described}: " + "; ".join(f"{bar['label']} {bar['energy']}" for bar in bars),
    )


def _bar(
    label: str, group: str, span: tuple[float, float], whole: float, doubt: tuple[float | None, float | None]
) -> dict[str, Any]:
    (start, end), (low, high) = span, doubt
    value = end - start
    told = {"energy": quantity(value, "J"), "share": percent(value / whole, 1) if whole else "", "low": low}
    right = max(start, end, end if high is None else high)
    return {"label": label, "group": group, "start": start, "end": end, "right": right, **told, "high": high}


def roofs(frame: pd.DataFrame, unit: str) -> Spec | None:
    """Return every operator by the time that it needs at its roof and the time that it takes, per call."""
    rows = frame[(frame["floor_ns"] > 0) & (frame["calls"] > 0)]
    if rows.empty:
        return None
    values = pd.DataFrame(
        {
            "operator": rows["op"].str.removesuffix(".default"),
            "module": rows["module"],
            "kind": rows["kind"],
            "bound": rows["bound"],
            "floor_us": (rows["floor_ns"] / rows["calls"] / 1e3).clip(lower=_LEAST_US),
            "time_us": rows["duration_ns"] / rows["calls"] / 1e3,
            "of_roof": rows["roof_share"].map("{:.0%}".format),
            "waste_mj": rows["waste_j"] * 1e3,
            "energy_mj": rows["energy_j"] * 1e3,
        }
    )
    ends = [float(values["time_us"].min()) / 2, float(values["time_us"].max()) * 2]
    line = alt.Chart(alt.Data(values=[{"floor_us": e, "time_us": e} for e in ends])).mark_line(strokeDash=[4, 3])
    line = line.encode(x="floor_us:Q", y="time_us:Q")
    sized = "energy_mj:Q" if values["energy_mj"].notna().any() else "time_us:Q"
    points = (
        alt.Chart(alt.Data(values=records(values)))
        .mark_point(filled=True, opacity=0.75)
        .encode(
            x=alt.X("floor_us:Q", scale=alt.Scale(type="log"), title="µs per call at the roof"),
            y=alt.Y("time_us:Q", scale=alt.Scale(type="log", domain=ends), title="µs per call as it is"),
            color=_coloured("kind:N", values["kind"], alt.Legend(title="kind")),
            size=alt.Size(sized, legend=alt.Legend(title=f"mJ per {unit}"), scale=alt.Scale(range=[20, 500])),
            tooltip=[*("operator:N", "module:N", "kind:N", "bound:N", "floor_us:Q", "time_us:Q", "of_roof:N")],
        )
    )
    worst = values.iloc[0]
    return _finished(
        (line + points).properties(height=320),
        f"Scatter of {len(values)} operators, time at the roof against time taken; the dashed line is the roof. The "
        f"most wasteful is {worst['operator']} in {worst['module']}, at {worst['of_roof']} of its roof.",
    )


def layer_map(layers: pd.DataFrame, phase: str) -> Spec | None:
    """Return the energy of kernels by layer and kind as a heat map."""
    rows = layers[layers["phase"] == phase] if len(layers) else layers
    if rows.empty:
        return None
    value, title, factor = ("energy_j", "mJ", 1e3) if rows["energy_j"].notna().all() else ("duration_ns", "µs", 1e-3)
    values = pd.DataFrame(
        {"layer": rows["layer"].astype(int), "kind": rows["kind"].astype(str), "value": (rows[value] * factor).round(4)}
    )
    chart = (
        alt.Chart(alt.Data(values=records(values)))
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("kind:N", title=None, sort=alt.EncodingSortField("value", op="sum", order="descending")),
            color=alt.Color("value:Q", scale=alt.Scale(type="sqrt", scheme="viridis"), legend=alt.Legend(title=title)),
            tooltip=["layer:O", "kind:N", alt.Tooltip("value:Q", title=title)],
        )
        .properties(height=20 * values["kind"].nunique())
    )
    largest = values.sort_values("value").iloc[-1]
    return _finished(
        chart,
        f"Heat map of {values['layer'].nunique()} layers by {values['kind'].nunique()} kinds of kernels in {phase}; "
        f"the most is {largest['value']} {title} of {largest['kind']} in layer {largest['layer']}.",
    )


def timeline(step: TokenStep) -> Spec:
    """Return one decoded token on the time axis: power, what the host called, kernels by kind, gaps by cause."""
    lines = ["lane,a,b,what,name"]
    short = {name: short_name(name).replace(",", ";").replace('"', "'") for name in step.spans["name"].unique()}
    for lane, a, b, what, name in step.spans.itertuples(index=False):
        lines.append(f"{lane},{a:.1f},{b:.1f},{what},{short[name]}")
    shown = [*step.spans["what"], "host launches", "host waits"]
    data = alt.InlineData(values="\n".join(lines), format=alt.CsvDataFormat(type="csv"))
    # A whole step shows nothing but its density: the page opens on a twentieth of it.
    opened = [round(step.width_us * share, 1) for share in (0.5, 0.55)]
    low, high = alt.param(name="from_us", value=opened[0]), alt.param(name="to_us", value=opened[1])
    scale = alt.Scale(domainMin=low, domainMax=high, nice=False, zero=False)
    axis = alt.X("a:Q", title="µs of this token step", scale=scale)
    lanes = (
        alt.Chart(data)
        .mark_bar(clip=True, height=alt.RelativeBandSize(0.8))
        .encode(
            x=axis,
            x2="b:Q",
            y=alt.Y("lane:N", title=None, sort=step.lanes),
            color=_coloured("what:N", shown, alt.Legend(title=None, orient="bottom", columns=4)),
            tooltip=["name:N", "what:N", alt.Tooltip("a:Q", title="from, µs"), alt.Tooltip("b:Q", title="to, µs")],
        )
        .properties(height=34 * len(step.lanes))
    )
    drawn: Any = lanes
    if step.power is not None:
        line = (
            alt.Chart(alt.Data(values=records(step.power.round({"a": 1}))))
            .mark_line(clip=True, interpolate="step-before")
            .encode(
                x=alt.X("a:Q", title=None, scale=scale, axis=alt.Axis(labels=False)),
                y=alt.Y("watts:Q", title="W", scale=alt.Scale(zero=False)),
            )
            .properties(height=70)
        )
        drawn = alt.vconcat(line, lanes, spacing=4)
    return _finished(
        drawn.add_params(low, high).properties(usermeta={"whole_us": round(step.width_us, 1)}),
        f"Timeline of one decoded token of {step.width_us / 1e3:.1f} ms: {step.kernels} kernels and {step.gaps} idle "
        "gaps. Arrow keys move, plus and minus zoom.",
    )


def _coloured(field: str, values: Iterable[str], legend: Any) -> Any:
    found = set(values)
    domain = [name for name in COLOURS if name in found]
    return alt.Color(field, scale=alt.Scale(domain=domain, range=[COLOURS[name] for name in domain]), legend=legend)


def _finished(chart: Any, description: str) -> Spec:
    spec: Spec = chart.properties(description=description).to_dict()
    if "vconcat" not in spec:
        spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    # The page sets colours for light and dark.
    spec.pop("config", None)
    return spec
