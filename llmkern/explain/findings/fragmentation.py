"""Work cut into kernels shorter than the time to launch them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.time.per_unit import SHORT_NS
from llmkern.explain.finding import Finding, layers, readable

# Below this share of short kernels the host keeps ahead of the device without help.
_MOSTLY = 0.5


def fragmentation(attribution: Attribution) -> list[Finding]:
    """Return how many kernels a layer launches and how short they are, where most are short and the device waits."""
    depth = layers(attribution)
    found = []
    for phase, account in attribution.accounts.items():
        kernels = attribution.kernels_of(phase)
        count, short = float(kernels["launches"].sum()), float(kernels["short"].sum())
        if not depth or count == 0 or short / count < _MOSTLY or account.busy_share > 0.9:
            continue
        keys = ["kind", "op", "module"]
        rows = attribution.split(phase, keys)
        each = rows["duration_ns"] / rows["launches"]
        own = rows[each < SHORT_NS].sort_values("launches", ascending=False)
        short_ones = pd.MultiIndex.from_frame(own[keys].astype(str))
        energy_j, time_s = attribution.cost(phase, kernels=partial(_among, keys=keys, wanted=short_ones))
        inside = float(kernels.loc[kernels["layer"].notna(), "launches"].sum()) / depth
        each_ns = (kernels["duration_ns"] / kernels["launches"]).to_numpy()
        order = np.argsort(each_ns, kind="stable")
        launched = f", one every {account.latency_s / count * 1e6:.1f} µs on average"
        next_step = "fuse neighbours, or launch them all at once: a CUDA graph"
        if _in_graphs(attribution, phase) > _MOSTLY:
            launched, next_step = ", all at once in a CUDA graph", "fuse neighbours"
        middle = int(np.searchsorted(kernels["launches"].to_numpy()[order].cumsum(), count / 2))
        median_us = float(each_ns[order[min(middle, len(order) - 1)]]) / 1e3
        found.append(
            Finding(
                "fragmentation",
                phase,
                account.unit,
                f"{short / count:.0%} of {count:,.0f} kernels take less than {SHORT_NS / 1e3:.0f} µs (median about "
                f"{median_us:.1f} µs); a layer launches {inside:,.0f} of them{launched}.",
                energy_j,
                time_s,
                "energy of the operators whose kernels take less than 5 µs on average, gaps not counted",
                "a kernel shorter than its own launch leaves the device waiting whatever it computes",
                next_step,
                readable(own, ["kind", "op", "module"]),
            )
        )
    return found


def _among(rows: pd.DataFrame, keys: list[str], wanted: pd.MultiIndex) -> np.ndarray:
    """Return which of *rows* have *keys* that are *wanted*."""
    return pd.MultiIndex.from_frame(rows[keys]).isin(wanted)


def _in_graphs(attribution: Attribution, phase: str) -> float:
    """Return the share of the kernels that were launched together with the one before."""
    kernels = attribution.timeline.kernels
    launched = kernels["correlation_id"].to_numpy()[(kernels["phase"] == phase).to_numpy()]
    return float((launched[1:] == launched[:-1]).mean()) if len(launched) > 1 else 0.0
