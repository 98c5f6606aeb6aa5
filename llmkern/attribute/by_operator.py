"""Kernels of a phase summed by the operator and module that launched them."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from llmkern.attribute.equal_power import Attribution, PhaseAccount
from llmkern.attribute.identify import NONE, UNIDENTIFIED, Identified
from llmkern.run import RunFolder


def by_operator(
    run: RunFolder, attribution: Attribution, account: PhaseAccount, identified: Identified
) -> pd.DataFrame:
    """Return op, module, kernels, duration_ns and energy_j per unit of the phase, the longest first.

    The number of a layer is written as ``*``. Energy goes by duration, as in the account; NaN without one.
    """
    ops = run.table("ops", ["op", "module"])
    timeline, found = attribution.timeline, identified.op
    kernels = timeline.kernels.reset_index(drop=True)
    chosen = (kernels["phase"] == account.phase).to_numpy()
    rows, op = kernels[chosen], found[chosen]
    steps = max(1, int(timeline.phases.loc[timeline.phases["phase"] == account.phase, "tokens"].sum()))
    names = ops["op"].astype(object).to_numpy()
    modules = np.array([re.sub(r"\.\d+(?=\.|$)", ".*", str(m)) for m in ops["module"]], object)
    known = op != NONE
    frame = pd.DataFrame(
        {
            "op": np.where(known, names[op], UNIDENTIFIED),
            "module": np.where(known, modules[op], ""),
            "duration_ns": (rows["end_ns"] - rows["start_ns"]).to_numpy(float) / steps,
        }
    )
    grouped = frame.groupby(["op", "module"], sort=False)["duration_ns"].agg(kernels="size", duration_ns="sum")
    summed = grouped.reset_index().sort_values("duration_ns", ascending=False, ignore_index=True)
    summed["kernels"] = summed["kernels"] / steps
    total = account.kernel_j.value if account.kernel_j is not None else np.nan
    summed["energy_j"] = total * summed["duration_ns"] / max(summed["duration_ns"].sum(), 1.0)
    return summed
