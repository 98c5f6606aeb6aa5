"""The figures of a study, as Vega-Lite specifications and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from llmkern.estimate import Estimate
from llmkern.report.charts import Spec, _finished
from llmkern.report.records import records
from llmkern.study.statement import Figure
from llmkern.text import quantity, with_interval

# Precisions keep their colour in every figure; what is none of them takes the next.
_COLOURS = {"fp32": "#7d8a93", "bf16": "#1f6fb4", "fp16": "#2a9d8f", "int8": "#e4572e", "int4": "#b5179e"}
_OTHERS = ("#e0a526", "#7b6fd0", "#6a994e", "#4d9de0", "#d1495b", "#52b788", "#a58a4f", "#8d99ae")
# Marks beside colours: series can be told apart without these.
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
# Room above and below the points, as a factor.
_MARGIN = 1.25


def figure_spec(figure: Figure) -> Spec:
    """Return *figure* as a Vega-Lite specification: points with their intervals, joined over sizes."""
    series = list(dict.fromkeys(figure.rows["series"]))
    rows = figure.rows.copy()
    rows["told"] = [_told(row, figure.unit) for row in rows.to_dict("records")]
    data = alt.Data(values=records(rows))
    colours = alt.Scale(domain=series, range=_colours(series))
    shapes = alt.Scale(domain=series, range=[_SHAPES[i % len(_SHAPES)] for i in range(len(series))])
    with_names = any(len(name) > len("int8 fused") for name in series)
    legend = alt.Legend(title=None, orient="bottom", columns=2 if with_names else 6, labelLimit=300, symbolLimit=0)
    tip = [alt.Tooltip("x:N", title=figure.x), "series:N", alt.Tooltip("told:N", title=figure.y)]
    if figure.by_size:
        sizes = sorted({int(x) for x in rows["x"]})
        x = alt.X("x:Q", title=figure.x, scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=sizes, format="d"))
        beside: dict[str, Any] = {}
    else:
        x = alt.X("x:N", title=None, sort=list(dict.fromkeys(rows["x"])), axis=alt.Axis(labelAngle=-30, labelLimit=120))
        # Beside each other, so that intervals do not hide one another.
        beside = {"xOffset": alt.XOffset("series:N", sort=series)}
    known = pd.concat([rows[name].dropna() for name in ("value", "low", "high")])
    known = known[known > 0]
    ends = [float(known.min()) / _MARGIN, float(known.max()) * _MARGIN]
    scale = alt.Scale(type="log", domain=ends, nice=False)
    y = alt.Y("value:Q", title=f"{figure.unit or figure.y} (log)", scale=scale, axis=alt.Axis(format="~s"))
    base = alt.Chart(data)
    coloured = alt.Color("series:N", scale=colours, legend=legend)
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=x, y=y, color=coloured, shape=alt.Shape("series:N", scale=shapes, legend=legend), tooltip=tip, **beside
    )
    has_ends = "isValid(datum.low) && isValid(datum.high) && datum.low > 0"
    doubt = (
        base.transform_filter(has_ends)
        .mark_rule(strokeWidth=1.5)
        .encode(
            x=x,
            y=alt.Y("low:Q", title=f"{figure.unit or figure.y} (log)", scale=scale),
            y2="high:Q",
            color=coloured,
            tooltip=tip,
            **beside,
        )
    )
    drawn: Any = doubt + points
    if figure.by_size:
        drawn = base.mark_line(strokeWidth=1.5).encode(x=x, y=y, color=coloured) + drawn
    told = "; ".join(f"{row['x']} {row['series']} {row['told']}" for row in rows.to_dict("records")[:40])
    return _finished(drawn.properties(height=320), f"{figure.title}: {told}")


def _colours(series: list[str]) -> list[str]:
    others = iter(_OTHERS * (1 + len(series) // len(_OTHERS)))
    return [_COLOURS.get(name) or next(others) for name in series]


def _told(row: dict[Any, Any], unit: str) -> str:
    if not unit:
        return f"{row['value']:.3g}"
    if pd.isna(row["low"]) or pd.isna(row["high"]):
        return quantity(row["value"], unit)
    return with_interval(Estimate(row["value"], row["low"], row["high"]), unit)


def write_pictures(figures: tuple[Figure, ...], folder: Path) -> list[Path]:
    """Write every figure as SVG and PNG into *folder* and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for figure in figures:
        spec = figure_spec(figure) | {"width": 640, "background": "white", "title": figure.title}
        svg, png = (folder / f"{figure.name}.{kind}" for kind in ("svg", "png"))
        svg.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
        png.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
        found += [svg, png]
    return found
