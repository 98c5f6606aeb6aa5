"""How often the host waits for the device, and for which operator of which layer."""

from __future__ import annotations

from llmkern.attribute.attribution import Attribution
from llmkern.explain.finding import Finding, layer_waits, layers, operator_name, readable


def synchronizations(attribution: Attribution) -> list[Finding]:
    """Return the synchronisations inside the layers of the model; a token's own read-back is no finding."""
    depth = layers(attribution)
    found = []
    for phase, account in attribution.accounts.items():
        calls = layer_waits(attribution, phase)
        count = float(calls["launches"].sum())
        if not depth or count < 1:
            continue
        blocked_s = float(calls["duration_ns"].sum()) / 1e9
        # The device runs dry in the wait, and stays so until the host has issued the next kernel.
        energy_j, time_s = attribution.cost(phase, gaps=lambda gaps: gaps["cause"] == "sync_stall")
        by_op = calls.groupby(["op", "module"], sort=False)[["launches", "duration_ns"]].sum().reset_index()
        busiest = by_op.sort_values("launches", ascending=False)
        first = operator_name(busiest["op"].iloc[0])
        found.append(
            Finding(
                "synchronizations",
                phase,
                account.unit,
                f"The host waits for the device {count:,.0f} times per {account.unit}, {count / depth:.1f} times per "
                f"layer, {blocked_s * 1e3:.2f} ms in all; each time the queue runs empty and every launch after it "
                f"comes late. The gaps that begin in such a wait last {time_s * 1e3:.2f} ms.",
                energy_j,
                time_s,
                "calls of the host that return when the device is done, inside layers; the joules are those of the "
                "gaps that began while the host was in one (idle floor x their time)",
                "gaps that begin later but follow from the empty queue are counted as launch_bound, not here",
                f"remove them from {first}: nothing can be queued ahead or captured in a graph while they are there",
                readable(busiest, ["op", "module"], top=8),
            )
        )
    return found
