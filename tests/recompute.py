"""The numbers of a report from the files of its run, with pandas and NumPy: tests/recompute.py RUN REPORT.json.

What a reader of the Parquet files would write; it must import nothing of llmkern.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd

run, report = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
facts = json.loads((run / "run.json").read_text())
ranges = pd.read_parquet(run / "ranges.parquet")
rows = pd.read_parquet(run / "attribution.parquet").astype({c: object for c in ("part", "kind", "cause", "op", "name")})
phases = {phase["phase"]: phase for phase in report["phases"]}
compared = 0


def same(what, found, told, rel=1e-6):
    global compared
    compared += 1
    assert abs(found - told) <= rel * max(abs(told), 1e-9), f"{what}: {found} from the files, {told} in the report"


# Latency: prefill = generate(1), decode = (generate(n) - generate(1)) / (n - 1), the median of the rounds.
weighed = ranges[(ranges["pass"] == "weigh") & (ranges["category"] == "generate")]
seconds = (weighed["end_ns"] - weighed["start_ns"]) / 1e9
by_round = seconds.groupby([weighed["round"], weighed["new_tokens"]]).mean().unstack().dropna()
most = by_round.columns.max()
rounds_s = {"prefill": by_round[1], "decode": (by_round[most] - by_round[1]) / (most - 1)}
latency_s = {name: rounds.median() for name, rounds in rounds_s.items()}
tokens = {"prefill": sum(facts["prompts"]["effective_tokens"]), "decode": facts["options"]["batch"]}


def ends(rounds):
    """The 95 % interval of a median: below the k-th of n rounds it lies as often as n coins show fewer than k heads."""
    n = len(rounds)
    heads = np.cumsum([math.comb(n, k) for k in range(n)]) / 2**n
    return np.percentile(np.interp((np.arange(400) + 0.5) / 400, heads, np.sort(rounds)), [2.5, 97.5])


for name, phase in phases.items():
    own = rows[rows["phase"] == name]
    kernels, gaps = (own[own["part"] == part] for part in ("kernels", "gaps"))
    energy_j, time_s = own["energy_j"].sum(), latency_s[name]
    same("latency", time_s, phase["latency_s"]["value"])
    for end, found in zip(("low", "high"), ends(rounds_s[name]), strict=True):
        same(f"latency, {end}", found, phase["latency_s"][end])
        same(f"time in gaps, {end}", found - phase["busy_s"], phase["gap_s"][end])
    same("tokens/s", tokens[name] / time_s, phase["tokens_per_s"])
    same("energy", energy_j, phase["energy_j"]["value"])
    same("J/token", energy_j / tokens[name], phase["energy_per_token_j"]["value"])
    same("mean power", energy_j / time_s, phase["mean_w"])
    same("launches", kernels["launches"].sum(), phase["launches"])
    busy_s = kernels["duration_ns"].sum() / 1e9
    # Kernels of two streams that overlap are longer together than the device was busy.
    same("time in kernels", busy_s, phase["busy_s"], rel=2e-3)
    same("busy", phase["busy_s"] / time_s, phase["busy_share"])
    same("time in gaps", gaps["duration_ns"].sum() / 1e9, phase["gap_s"]["value"])
    same("time in gaps, as what is left", time_s - phase["busy_s"], phase["gap_s"]["value"], rel=1e-3)
    for part in ("kernels", "gaps", "residual"):
        part_j = own.loc[own["part"] == part, "energy_j"].sum()
        same(f"energy in {part}", part_j, phase[part]["energy_j"]["value"])
        same(f"share of {part}", part_j / energy_j, phase[part]["share"])
    gap_s = gaps["duration_ns"].sum() / 1e9
    same("idle floor", gaps["floor_j"].sum() / gap_s, phase["floor_w"]["value"])
    same("busy host adds", gaps["dynamic_j"].sum() / gap_s, phase["host_adds_w"]["value"])

    views = {"kinds": (kernels, ["kind"]), "causes": (gaps, ["cause"]), "kernels": (kernels, ["name"])}
    views |= {"operators": (kernels, ["op", "module"]), "gaps": (gaps, ["cause", "op", "module"])}
    for view, (part, keys) in views.items():
        sums = part.groupby(keys, dropna=False)[["launches", "duration_ns", "energy_j"]].sum()
        shown = [row for row in report["shown"][view] if row["phase"] == name]
        assert shown, view
        for row in shown:
            if row["others"]:
                named = {r["name"] for r in shown if not r["others"]}
                found = sums[~sums.index.isin(named)].sum()
                same(f"{view}: how many others", (~sums.index.isin(named)).sum(), row["others"])
            else:
                found = sums.loc[tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]]
            same(f"{view}: launches", found["launches"], row["launches"])
            same(f"{view}: time", found["duration_ns"] / 1e9, row["time_s"])
            same(f"{view}: each", found["duration_ns"] / 1e9 / found["launches"], row["each_s"])
            same(f"{view}: energy", found["energy_j"], row["energy_j"])
            same(f"{view}: share", found["energy_j"] / energy_j, row["share"])

# What findings and predictions stand on.
for finding in report["findings"]:
    own = rows[rows["phase"] == finding["phase"]]
    gaps = own[own["part"] == "gaps"]
    if finding["name"].startswith("idle_"):
        found = gaps.loc[gaps["cause"] == finding["name"].removeprefix("idle_"), "energy_j"].sum()
        same(finding["name"], found, finding["energy_j"]["value"])
    if finding["name"] == "overhead_kernels":
        converts = own["kind"].isin(["quantize", "dequantize", "outlier", "cast"])
        same(finding["name"], own.loc[converts, "energy_j"].sum(), finding["energy_j"]["value"])
    if finding["name"] == "synchronizations":
        same(finding["name"], gaps.loc[gaps["cause"] == "sync_stall", "energy_j"].sum(), finding["energy_j"]["value"])
    if finding["energy_j"]:
        same("share", finding["energy_j"]["value"] / own["energy_j"].sum(), finding["share"])
for made in report["predictions"]:
    before_j = rows.loc[rows["phase"] == made["phase"], "energy_j"].sum()
    same(f"saves of {made['name']}", 1 - made["energy_j"]["value"] / before_j, made["saves"])
print(f"{compared} numbers are the same.")
