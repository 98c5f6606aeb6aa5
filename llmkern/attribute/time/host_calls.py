"""What the host did while the device ran: the pass with host calls, its gaps by cause, its calls by operator."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmkern.attribute.time.causes import gap_causes
from llmkern.attribute.time.operators import Identified, Inspected, identify
from llmkern.attribute.time.per_unit import described, summed_by, tally_gaps
from llmkern.attribute.time.timeline import Timeline, containing, read_calls, read_timeline
from llmkern.runfolder import RunFolder
from llmkern.runfolder.vocabulary import NONE

# Calls that return only when the device has done what was queued before them. A copy to pageable host memory
# (cudaMemcpyAsync of a read-back) is followed by a synchronisation of its own in PyTorch.
WAITS = r"Synchronize|^cudaMemcpy(?:2D|3D)?(?:_v\d+)?$|^cuMemcpy(?:DtoH|HtoD)(?:_v\d+)?$"


@dataclass(frozen=True)
class HostTrace:
    """The pass that recorded host calls.

    ``calls``: its host calls by their start (start_ns, end_ns, correlation_id, api). ``caused``: every gap with its
    cause (see gap_causes). ``gaps`` and ``tally``: gaps and calls of one unit of each phase (see tally_gaps and
    tally_calls).
    """

    timeline: Timeline
    identified: Identified | None
    calls: pd.DataFrame
    caused: pd.DataFrame
    gaps: pd.DataFrame
    tally: pd.DataFrame


def read_host(run: RunFolder, inspected: Inspected | None, ops: pd.DataFrame) -> HostTrace | None:
    """Return what the host did in pass *calls*, None where there was none."""
    calls = read_calls(run, "calls")
    if calls.empty:
        return None
    timeline = read_timeline(run, run.facts.device.index, "calls", calls)
    overheads = run.table("overheads", where={"pass": "calls"})
    with ThreadPoolExecutor(1) as beside:
        # The two halves know nothing of each other; with millions of kernels each takes a second.
        causes = beside.submit(gap_causes, timeline, calls, overheads)
        identified = identify(inspected, timeline) if inspected is not None else None
        tally = tally_calls(timeline, identified, ops, calls)
        caused = causes.result()
    return HostTrace(timeline, identified, calls, caused, tally_gaps(timeline, identified, ops, caused), tally)


def host_of(run: RunFolder, timed: Timeline, identified: Identified | None, ops: pd.DataFrame) -> HostTrace | None:
    """Return what the host did in pass *time*, *timed*, where its calls were recorded there: so older runs have it."""
    calls = read_calls(run, "time")
    if calls.empty:
        return None
    caused = gap_causes(timed, calls, run.table("overheads", where={"pass": "time"}))
    gaps = tally_gaps(timed, identified, ops, caused)
    return HostTrace(timed, identified, calls, caused, gaps, tally_calls(timed, identified, ops, calls))


def _launched_last(timeline: Timeline, calls: pd.DataFrame) -> np.ndarray:
    """Return the kernel (position in the timeline) that was launched last before or by each of *calls*, else NONE."""
    issued_ns, times_ns = timeline.kernels["issued_ns"].to_numpy(), calls["start_ns"].to_numpy()
    order = None
    if (issued_ns[1:] < issued_ns[:-1]).any():
        order = np.argsort(issued_ns, kind="stable")
        issued_ns = issued_ns[order]
    last = np.searchsorted(issued_ns, times_ns, side="right") - 1
    return last if order is None else np.append(order, NONE)[last]


def tally_calls(
    timeline: Timeline, identified: Identified | None, ops: pd.DataFrame, calls: pd.DataFrame
) -> pd.DataFrame:
    """Return the host calls of one unit of each phase, a row per api and operator.

    A call belongs to the operator whose kernel was launched last before or by it: a read-back launches a copy and then
    waits for it. Columns: phase, api, waits, op, module, layer, shapes, dtypes, signature, launches (how many calls),
    duration_ns.
    """
    phases = timeline.phases
    instance = containing(calls["start_ns"].to_numpy(), phases)
    inside = instance >= 0
    calls, instance = calls[inside], instance[inside]
    api = calls["api"].astype("category").cat
    op = np.full(len(calls), NONE, np.int32)
    if identified is not None and len(timeline.kernels):
        op = np.append(identified.op, np.int32(NONE))[_launched_last(timeline, calls)]
    phase, names = pd.factorize(phases["phase"].astype(object))
    duration_ns = (calls["end_ns"] - calls["start_ns"]).to_numpy(float)
    codes, (count, total_ns) = summed_by([phase[instance], api.codes.to_numpy(), op + 1], duration_ns)
    texts = api.categories.astype(str).to_numpy(object)
    named = texts[codes[1]]
    waits = np.array([bool(re.search(WAITS, text)) for text in texts], bool)
    units = np.array([float(timeline.units(str(name))) for name in names])[codes[0]]
    return pd.DataFrame(
        {
            "phase": np.asarray(names, object)[codes[0]],
            "api": named,
            "waits": waits[codes[1]],
            **described(ops, codes[2] - 1),
            "launches": count / units,
            "duration_ns": total_ns / units,
        }
    )
