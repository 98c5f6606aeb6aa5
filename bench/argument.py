"""The whole argument: a run and the run with the fix beside one another, and what the first predicted of the second.

python -m bench.argument --of BEFORE AFTER [--of BEFORE AFTER …] --fix fused-layers --code COMMIT (that made the runs):
the first pair is told joule by joule, of others how far off the prediction was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.result import case, interval, metric, write
from llmkern.attribute.attribution import attribute
from llmkern.explain.compare import Difference, compare
from llmkern.runfolder import RunFolder

# So far off a prediction may be.
BAR = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs=2, type=Path, required=True, action="append", metavar=("BEFORE", "AFTER"))
    parser.add_argument("--code", default="", help="commit whose code made the runs")
    parser.add_argument("--fix", default="fused-layers")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    found = []
    for pair in arguments.of:
        before, after = (attribute(RunFolder(path)) for path in pair)
        options = before.run.facts.options
        name = f"{options.model} {options.precision}, {'replayed' if before.run.has('replays') else 'timeline alone'}"
        found += [_case(d, name) for d in compare(before, after, arguments.fix) if d.checked is not None]
    facts = after.run.facts
    recorded = {"started": facts.started, "versions": {k: v for k, v in facts.versions.items() if v}}
    more = {"fix": arguments.fix, "code": arguments.code, "recorded": recorded}
    print(write("argument", found, arguments.results, facts.device.name, **more))


def _case(difference: Difference, name: str) -> dict[str, Any]:
    checked = difference.checked
    assert checked is not None
    metrics = {
        "before": metric(difference.before_s, "s"),
        "after": metric(difference.after_s, "s"),
        "predicted": metric(checked.prediction.latency_s, "s"),
        "latency_error": metric(checked.latency_error, "1"),
    }
    if difference.before_j is not None and difference.after_j is not None and checked.prediction.energy_j is not None:
        metrics |= {
            "before_energy": metric(difference.before_j, "J"),
            "after_energy": metric(difference.after_j, "J"),
            "predicted_energy": metric(checked.prediction.energy_j, "J"),
            "energy_error": metric(checked.energy_error or 0.0, "1"),
        }
    for row in difference.bars.to_dict("records"):
        metrics[f"{row['part']}: {row['name']}"] = {
            **{"value": row["change_j"], "low": row["low_j"], "high": row["high_j"], "unit": "J", "samples": 1},
            "interval": "95 % confidence",
        }
    errors = [abs(checked.latency_error), abs(checked.energy_error or 0.0)]
    parameters = {"phase": difference.phase, "per": difference.per}
    return case(name, parameters, metrics, max(errors) <= BAR)


def table(document: dict[str, Any]) -> list[str]:
    """Return the lines of docs/decode.md."""
    rows = ["| per token of decode | | eager | fused | predicted of it | off by |", "|---|---|---|---|---|---|"]
    for found in document["cases"]:
        m = found["metrics"]
        for what, unit, factor, error in (("", "ms", 1e3, "latency_error"), ("_energy", "J", 1.0, "energy_error")):
            before, after = (f"{m[f'{name}{what}']['value'] * factor:.2f}" for name in ("before", "after"))
            predicted = interval(m[f"predicted{what}"], factor, 2)
            rows.append(f"| {found['name']} | {unit} | {before} | {after} | {predicted} | {m[error]['value']:+.0%} |")
    m = document["cases"][0]["metrics"]
    bars = [(name, entry) for name, entry in m.items() if ": " in name and entry["value"] == entry["value"]]
    bars.sort(key=lambda bar: -abs(bar[1]["value"]))
    parts = [
        f"| {name} | {entry['value']:+.2f} [{entry['low']:.2f}, {entry['high']:.2f}] |"
        for name, entry in bars[:10]
        if entry["low"] is not None
    ]
    return [*rows, "", f"| {document['cases'][0]['name']}, joule by joule | change, J |", "|---|---|", *parts]


if __name__ == "__main__":
    main()
