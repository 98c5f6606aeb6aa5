"""Kernels far from what their bytes and FLOPs allow."""

from __future__ import annotations

from llmkern.attribute.attribution import Attribution
from llmkern.explain.finding import WORTH_TELLING, Finding, operator_name, readable, share_of
from llmkern.explain.roofline import roofline

FAR = 0.5


def low_roof(attribution: Attribution) -> list[Finding]:
    """Return the operators under half of their roof, by the floor power that is burned beyond it."""
    found = []
    for phase, account in attribution.accounts.items():
        rows = roofline(attribution, phase)
        own = rows[rows["roof_share"] < FAR]
        if own.empty:
            continue
        above_s = float((own["duration_ns"] - own["floor_ns"]).sum()) / 1e9
        energy_j = None
        if account.floor_w is not None and own["waste_j"].notna().all():
            energy_j = account.floor_w.scaled(above_s)
        share = share_of(account, energy_j, above_s)
        if share < WORTH_TELLING:
            continue
        first = own.iloc[0]
        where = f"{operator_name(first['op'])} in {first['module'] or 'the model'}"
        rate = f"{first['bytes_per_s'] / 1e12:.2f} TB/s"
        if first["bound"] == "compute":
            rate = f"{first['flops_per_s'] / 1e12:.0f} TFLOP/s"
        launches = own.rename(columns={"kernels": "launches"})
        found.append(
            Finding(
                "low_roof",
                phase,
                account.unit,
                f"{len(own)} operators run below {FAR:.0%} of their roof, {above_s * 1e3:.2f} ms longer than their "
                f"bytes and FLOPs need; the most wasteful, {where}, reaches {first['roof_share']:.0%} ({rate}).",
                energy_j,
                above_s,
                "idle floor (W) x (time - max(bytes / peak bandwidth, FLOPs / peak rate))",
                "bytes are each argument read once and each result written once; at its roof a kernel would still "
                "spend its dynamic joules, so this is the least that is wasted; its interval is of the floor alone",
                "replace these kernels by ones that stream their weights at full bandwidth",
                readable(launches, ["kind", "op", "module", "bound", "roof_share", "waste_j"]),
            )
        )
    return found
