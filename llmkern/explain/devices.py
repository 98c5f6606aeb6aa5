"""The devices of a run beside one another: which was busy, which waited, how long each spent in collectives."""

from __future__ import annotations

import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.time.per_unit import tally_kernels
from llmkern.attribute.time.timeline import read_timeline

COLUMNS = ["phase", "gpu", "name", "file", "latency_s", "busy_s", "communication_s", "gap_s", "launches", "busy_share"]


def devices_table(attribution: Attribution) -> pd.DataFrame:
    """Return a row for each phase of each device of a capture of several: times in s and launches per unit.

    ``communication_s`` is the time in kernels of collectives, waiting for other ranks in them included; ``latency_s``
    is from the first to the last kernel of the phase, in gaps or not. Empty where the run is of one device.
    """
    return attribution.once(("devices",), lambda: _table(attribution))


def _table(attribution: Attribution) -> pd.DataFrame:
    imported = attribution.run.facts.imported
    rows = []
    for one in imported.devices if imported is not None else ():
        run = attribution.run.of_device(one.facts.index)
        timeline = read_timeline(run, one.facts.index)
        kernels = tally_kernels(timeline, None, attribution.ops)
        for phase, spans in timeline.phases.groupby("phase", sort=False, observed=True):
            units = timeline.units(str(phase))
            own = kernels[kernels["phase"] == phase]
            collective_ns = float(own.loc[own["kind"] == "communication", "duration_ns"].sum())
            busy_s, gap_s = (float(spans[name].sum()) / 1e9 / units for name in ("busy_ns", "gap_ns"))
            if busy_s == 0:
                continue
            rows.append(
                {
                    **{"phase": phase, "gpu": one.facts.index, "name": one.facts.name, "file": one.file},
                    **{"latency_s": busy_s + gap_s, "busy_s": busy_s, "communication_s": collective_ns / 1e9},
                    **{"gap_s": gap_s, "launches": float(spans["kernels"].sum()) / units},
                    "busy_share": busy_s / (busy_s + gap_s),
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)
