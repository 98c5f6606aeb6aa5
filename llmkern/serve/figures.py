"""The figures of a serving study: joules and waiting by how requests arrive, and batches over time."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llmkern.serve.statement import Arrivals
from llmkern.study.statement import Figure

# Points of a line over time: more are no clearer.
_POINTS = 240


def figures(arrivals: tuple[Arrivals, ...]) -> tuple[Figure, ...]:
    """Return joules per request, idle time's share of them, and the time to the first token, by pattern."""
    found = [
        _figure(
            "figure-3a",
            "Energy per request by how requests arrive",
            "All that the counter moved by finished requests, and without the idle time between iterations.",
            ("arrivals", "J per request", "J"),
            [
                (one.pattern, series, estimate.value, estimate.low, estimate.high)
                for one in arrivals
                for series, estimate in (("with idle", one.request_j), ("without idle", one.own_j))
                if estimate is not None
            ],
        ),
        _figure(
            "figure-3b",
            "Time to the first token, from the intended moment",
            "Percentiles over all answered requests.",
            ("arrivals", "time to the first token", "s"),
            [
                (one.pattern, name, value, None, None)
                for one in arrivals
                for name, value in zip(("p50", "p90", "p99"), one.ttft_s, strict=False)
            ],
        ),
        _figure(
            "figure-3c",
            "Mean batch of an iteration",
            "Requests in an iteration, weighed by how long it took.",
            ("arrivals", "requests", ""),
            [(one.pattern, "batch", one.mean_batch, None, None) for one in arrivals if one.mean_batch > 0],
        ),
    ]
    return tuple(figure for figure in found if len(figure.rows))


def _figure(
    name: str,
    title: str,
    note: str,
    named: tuple[str, str, str],
    rows: list[tuple[str, str, float, float | None, float | None]],
) -> Figure:
    frame = pd.DataFrame(rows, columns=["x", "series", "value", "low", "high"])
    frame = frame.astype({"value": float, "low": float, "high": float})
    return Figure(name, title, note, *named, frame[frame["value"] > 0].reset_index(drop=True))


def over_time(one: Arrivals) -> pd.DataFrame:
    """Return rows of ``second``, ``what``, ``value``: open requests, and requests in the batch, over the window.

    Each is the mean over a part of the window, so that short iterations are not lost between points.
    """
    found = one.found
    edges = np.linspace(found.start_ns, found.end_ns, _POINTS + 1)
    known = found.requests.dropna(subset=["sent_ns", "last_token_ns"])
    spans = found.iterations
    lines = (
        ("open requests", known["sent_ns"], known["last_token_ns"], np.ones(len(known))),
        ("batch", spans["start_ns"], spans["end_ns"], spans["batch"].to_numpy(float)),
    )
    rows = []
    for what, starts, ends, weights in lines:
        area = _area(edges, starts.to_numpy(float), ends.to_numpy(float), weights)
        means = np.diff(area) / np.diff(edges)
        seconds = (edges[:-1] - found.start_ns) / 1e9
        rows += [{"second": s, "what": what, "value": v} for s, v in zip(seconds, means, strict=True)]
    return pd.DataFrame(rows)


def _area(edges: np.ndarray, starts: np.ndarray, ends: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the integral of *weights* over spans up to each of *edges*."""
    total = np.zeros(len(edges))
    for start, end, weight in zip(starts, ends, weights, strict=True):
        total += weight * (np.clip(edges, start, end) - start)
    return total
