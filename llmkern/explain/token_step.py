"""One decoded token on the time axis: what the host called, which kernels ran, where the device was idle, its power."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.time.host_calls import WAITS, HostTrace
from llmkern.attribute.time.per_unit import labelled
from llmkern.runfolder.vocabulary import NONE

# Samples of power come every 20 ms: one beyond either end of a short step.
_MARGIN_NS = 30_000_000


@dataclass(frozen=True)
class TokenStep:
    """The decoded token of median length in the pass that recorded host calls.

    ``spans``: lane (host, "stream N" or idle), a and b (from and to, in µs of the step), what (host launches or waits,
    the kernel's kind, or "gap: " and the cause) and name. ``power``: a in µs and watts, None without samples.
    """

    width_us: float
    kernels: int
    gaps: int
    lanes: list[str]
    spans: pd.DataFrame
    power: pd.DataFrame | None


def token_step(attribution: Attribution) -> TokenStep | None:
    """Return the step to look at, None where no host calls or no decoded token were recorded."""
    trace = attribution.host_trace
    rows = _median_token(trace) if trace is not None else None
    if trace is None or rows is None:
        return None
    kernels = trace.timeline.kernels.iloc[rows]
    begin_ns, end_ns = int(kernels["issued_ns"].min()), int(kernels["end_ns"].max())
    calls = trace.calls[(trace.calls["start_ns"] >= begin_ns) & (trace.calls["end_ns"] <= end_ns)]
    api = calls["api"].astype(object).astype(str)
    waits = np.array([bool(re.search(WAITS, name)) for name in api], bool)
    gaps = trace.caused[trace.caused["kernel"].isin(rows)]
    cause = "gap: " + gaps["cause"].astype(object).astype(str)
    op = trace.identified.op[rows] if trace.identified is not None else np.full(len(rows), NONE)
    kind = labelled(attribution.ops, op, kernels["name"].astype("category").array)["kind"].astype(object)
    lane = "stream " + kernels["stream"].astype(str)
    parts = [
        pd.DataFrame(
            {
                "lane": "host",
                "a": calls["start_ns"],
                "b": calls["end_ns"],
                "what": np.where(waits, "host waits", "host launches"),
                "name": api,
            }
        ),
        pd.DataFrame(
            {
                "lane": lane.to_numpy(),
                "a": kernels["start_ns"].to_numpy(),
                "b": kernels["end_ns"].to_numpy(),
                "what": kind.to_numpy(),
                "name": kernels["name"].astype(object).astype(str).to_numpy(),
            }
        ).sort_values("lane", kind="stable"),
        pd.DataFrame(
            {
                "lane": "idle",
                "a": gaps["start_ns"],
                "b": gaps["start_ns"] + gaps["duration_ns"].astype(np.int64),
                "what": cause,
                "name": cause,
            }
        ),
    ]
    spans = pd.concat(parts, ignore_index=True)
    spans = spans.assign(a=(spans["a"] - begin_ns) / 1e3, b=(spans["b"] - begin_ns) / 1e3)
    lanes = ["host", *(f"stream {s}" for s in np.unique(kernels["stream"].to_numpy())), "idle"]
    power = _power(attribution, begin_ns, end_ns)
    return TokenStep((end_ns - begin_ns) / 1e3, len(kernels), len(gaps), lanes, spans, power)


def _median_token(trace: HostTrace) -> np.ndarray | None:
    """Return the rows of the timeline's kernels of the decoded token of median length."""
    kernels = trace.timeline.kernels
    inside = ((kernels["phase"] == "decode") & (kernels["token"] != NONE)).to_numpy()
    if not inside.any():
        return None
    first = kernels["instance"].to_numpy()[np.flatnonzero(inside)[0]]
    rows = np.flatnonzero(inside & (kernels["instance"].to_numpy() == first))
    token = kernels["token"].to_numpy()[rows]
    own = kernels.iloc[rows].groupby(token)
    length = (own["end_ns"].max() - own["start_ns"].min()).sort_values()
    result: np.ndarray = rows[token == length.index[len(length) // 2]]
    return result


def _power(attribution: Attribution, begin_ns: int, end_ns: int) -> pd.DataFrame | None:
    power = attribution.run.table("power", ["timestamp_ns", "sensor", "power_mw", "device"])
    samples = power[(power["sensor"] == "samples") & (power["device"] == attribution.device)]
    near = samples[samples["timestamp_ns"].between(begin_ns - _MARGIN_NS, end_ns + _MARGIN_NS)]
    if len(near) < 2:
        return None
    near = near.sort_values("timestamp_ns")
    return pd.DataFrame({"a": (near["timestamp_ns"] - begin_ns) / 1e3, "watts": near["power_mw"] / 1e3})
