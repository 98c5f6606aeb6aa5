"""The tables of README.md, docs/measured.md, docs/decode.md and others, written from bench/results.

python -m bench.tables --write
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import argument, client, decode, fused, fuzz, serving, study
from bench.result import RESULTS, interval
from llmkern.attribute.attribution import attribute
from llmkern.explain import Explanation
from llmkern.explain.statement import state
from llmkern.report.console import PlainConsole
from llmkern.report.terminal import print_report
from llmkern.runfolder import RunFolder

_ROOT = Path(__file__).parents[1]
PAGES = (
    _ROOT / "README.md",
    _ROOT / "docs" / "measured.md",
    _ROOT / "docs" / "decode.md",
    _ROOT / "docs" / "method.md",
    _ROOT / "docs" / "serving.md",
    _ROOT / "docs" / "study.md",
)
Cases = dict[str, dict[str, Any]]


def load(bench: str) -> dict[str, Any] | None:
    """Return the newest result file of *bench*, None without one."""
    found: list[dict[str, Any]] = [json.loads(file.read_text()) for file in RESULTS.glob(f"{bench}-*.json")]
    # A name may begin another: kernels, kernels-energy.
    return max((d for d in found if d["bench"] == bench), key=lambda d: str(d["date"]), default=None)


def measured_on(document: dict[str, Any]) -> str:
    where = document["environment"]
    if "code" in document and "recorded" in document:
        # The runs were made elsewhere, and only read here.
        recorded = document["recorded"]
        versions = recorded["versions"]
        libraries = ", ".join(f"{k} {versions[k]}" for k in ("torch", "transformers", "bitsandbytes") if k in versions)
        made = f"{recorded['started'][:10]}, code of commit {document['code']}"
        return f"*{where['gpu']}; {libraries}; {made}: `{document['command']}`*"
    libraries = ", ".join(f"{k} {where[k]}" for k in ("torch", "transformers", "bitsandbytes") if where.get(k))
    driver = f", driver {where['driver']}" if where.get("driver") else f" ({where['host_cpu']})"
    when = f"{document['date']}, code of commit {document['commit']}"
    return f"*{where['gpu']}{driver}; {libraries}; {when}: `{document['command']}`*"


def matrix(document: dict[str, Any]) -> list[str]:
    cases: Cases = {c["name"]: c["metrics"] for c in document["cases"]}
    rows = [
        "| precision | prefill, ms | prefill, J | decode, ms/token | decode, J/token | launches/token | GPU busy | "
        "J in gaps | command to report |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("fp32", "bf16", "fp16", "int8", "int8 without outliers", "int4"):
        m = cases.get(name)
        if not m:
            continue
        gaps = m["decode_gap_energy"]["value"] / m["decode_energy"]["value"]
        rows.append(
            f"| {name} | {interval(m['prefill_latency'], 1e3, 0)} | {interval(m['prefill_energy'], 1, 1)} "
            f"| {interval(m['decode_latency'], 1e3, 1)} | {interval(m['decode_energy'], 1, 2)} "
            f"| {m['decode_launches']['value']:,.0f} | {m['decode_busy_share']['value']:.0%} | {gaps:.0%} "
            f"| {m['command_to_report_s']['value']:.0f} s |"
        )
    told = []
    for name in ("int8 / fp32", "int8 without outliers / fp32", "int4 / fp32", "bf16 / fp32"):
        if name in cases:
            told.append(f"{name} = {interval(cases[name]['decode_energy_ratio'], 1, 2)}")
    return [*rows, "", f"Energy per decoded token: {'; '.join(told)}."]


def completeness(document: dict[str, Any]) -> list[str]:
    rows = ["| one decode step | kernels, llmkern | kernels, torch.profiler | dropped |", "|---|---|---|---|"]
    for found in document["cases"]:
        m = found["metrics"]
        ours, theirs, lost = (m[k]["value"] for k in ("llmkern", "torch_profiler", "dropped_records"))
        rows.append(f"| {found['name']} | {ours:,} | {theirs:,} | {lost} |")
    return rows


def kernels(document: dict[str, Any]) -> list[str]:
    found = [(case["parameters"], case["metrics"]) for case in document["cases"]]
    shapes = sorted({(p["n"], p["k"]) for p, _ in found}, reverse=True)
    cases = {(p["kernel"], p["format"], p["n"], p["k"], p["m"]): metrics for p, metrics in found}
    titles = ["N x K, M", "cuBLAS bf16", "int8: ours, packed, best peer", "NF4", "int4"]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    peers = ("bitsandbytes", "GemLite", "tinygemm")

    def cell(format: str, n: int, k: int, m: int) -> str:
        told = []
        for names in (("llmkern",), ("llmkern packed",), peers):
            there = [(cases[x, format, n, k, m], x) for x in names if (x, format, n, k, m) in cases]
            timed = [(metrics["cold"]["value"], metrics["share_of_data_sheet"]["value"], x) for metrics, x in there]
            us, share, name = min(timed)
            told.append(f"{us:.1f} ({share:.0%})" if name.startswith("llmkern") else f"{us:.1f} {name}")
        return ", ".join(told)

    for n, k in shapes:
        for m in sorted({p["m"] for p, _ in found}):
            bf16 = cases["cuBLAS bf16", "int8", n, k, m]["cold"]["value"]
            rows.append(f"| {n} x {k}, {m} | {bf16:.1f} | " + " | ".join(cell(f, n, k, m) for f in FORMATS) + " |")
    return rows


FORMATS = ("int8", "nf4", "int4")


def kernels_energy(document: dict[str, Any]) -> list[str]:
    rows = ["| N x K, M = 1 | kernel | mJ per call | J/GB |", "|---|---|---|---|"]
    for found in document["cases"]:
        p, m = found["parameters"], found["metrics"]
        # cuBLAS computes the same for every format.
        large = p["n"] * p["k"] > 5e7
        if (
            large
            and "energy" in m
            and "Triton" not in p["kernel"]
            and ("bf16" not in p["kernel"] or p["format"] == "int8")
        ):
            name = p["kernel"] if "bf16" in p["kernel"] else f"{p['kernel']}, {p['format']}"
            told = f"{interval(m['energy'], 1, 2)} | {m['joules_per_gb']['value']:.3f}"
            rows.append(f"| {p['n']} x {p['k']} | {name} | {told} |")
    roof = document["roof"]
    for name, bytes_of in (("copy", "copied_bytes"), ("read", "read_bytes")):
        value, low, high = (mj / 1e3 / (roof[bytes_of] / 1e9) for mj in roof[f"{name}_energy"]["total_mj"])
        rows += ["", f"A {name} of 1 GiB, per byte moved: {value:.3f} [{low:.3f}, {high:.3f}] J/GB."]
    return rows


def stages(document: dict[str, Any]) -> list[str]:
    cases: Cases = {c["name"]: c["metrics"] for c in document["cases"]}
    beside = ", ".join(f"a {n} {interval(cases[n]['joules_per_gb'], 1, 3)}" for n in ("read", "copy") if n in cases)
    return [*_by_format(document, "stage"), "", f"Beside them, per byte moved: {beside} J/GB."]


def variants(document: dict[str, Any]) -> list[str]:
    return _by_format(document, "variant")


def _by_format(document: dict[str, Any], key: str) -> list[str]:
    """Return a row for each *key* of the cases, a column for each format."""
    formats = list(dict.fromkeys(c["parameters"]["format"] for c in document["cases"] if "format" in c["parameters"]))
    rows = ["| J/GB (µs) | " + " | ".join(formats) + " |", "|---" * (1 + len(formats)) + "|"]
    names = dict.fromkeys(c["parameters"][key] for c in document["cases"] if key in c["parameters"])
    for name in names:
        cells = []
        for format in formats:
            mine = {key: name, "format": format}
            own = [c["metrics"] for c in document["cases"] if mine.items() <= c["parameters"].items()]
            cells += [f"{interval(m['joules_per_gb'], 1, 3)} ({m['cold']['value']:.1f})" for m in own] or ["–"]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def overhead(document: dict[str, Any]) -> list[str]:
    rows = ["| what is switched on | decode latency | bar |", "|---|---|---|"]
    for found in document["cases"]:
        m = found["metrics"]
        if "added_per_launch" in m:
            added, bare = m["added_per_launch"], m["bare_launch"]["value"]
            rows.append(f"| {found['name']} | +{interval(added, 1, 2)} µs on {bare:.1f} µs | |")
            continue
        entry = m.get("effect") or m["own_threads"]
        text = f"{entry['value']:+.1%}"
        if entry.get("low") is not None:
            text += f" [{entry['low']:+.1%}, {entry['high']:+.1%}]"
        if "own_threads" in m:
            text = f"at most {text}"
        if "with_own_threads" in m:
            text += f", with its own threads {m['with_own_threads']['value']:+.1%}"
        verdict = {None: "", True: "met", False: f"missed: {found['note']}"}[found["passed"]]
        rows.append(f"| {found['name']} | {text} | {verdict} |")
    return rows


def recorder_load(document: dict[str, Any]) -> list[str]:
    (found,) = document["cases"]
    m = {k: v["value"] for k, v in found["metrics"].items()}
    wanted = found["parameters"]
    return [
        f"{m['kernels']:,.0f} kernel records ({wanted['seconds']} s of {wanted['kernels_per_second']:,} kernels/s) "
        f"took {m['recording']:.0f} s to decode and write ({m['kernels_per_second_sustained']:,.0f} kernels/s), "
        f"{m['peak_memory_above_start'] / 2**20:.0f} MiB of memory above the start, "
        f"{m['peak_memory_of_process'] / 2**20:.0f} MiB for the whole process, and "
        f"{m['run_folder'] / 2**20:.0f} MiB on disk; {m['dropped_records']:.0f} were dropped."
    ]


def analysis(document: dict[str, Any]) -> list[str]:
    rows = [
        "| kernels | llmkern: load, attribute, explain | peak memory | Holistic Trace Analysis | peak memory |",
        "|---|---|---|---|---|",
    ]
    told = []
    for found in document["cases"]:
        m = {k: v["value"] for k, v in found["metrics"].items()}
        if "report" in m:
            told += [
                "",
                f"`{found['name']}` takes {m['report']:.1f} s from command to text, where `import pandas` alone takes "
                f"{m['import_pandas']:.1f} s.",
            ]
            continue
        peer = ["", ""]
        if "peer_over_llmkern" in m:
            seconds = f"{m['peer_load_analyse']:.1f} s ({m['peer_over_llmkern']:.1f} ×)"
            peer = [seconds, f"{m['peer_peak_memory'] / 1e9:.1f} GB"]
        elif "events" in m:
            peer = [found["note"], ""]
        own = f"{m['load_attribute_explain']:.1f} s | {m['peak_memory_of_process'] / 1e9:.1f} GB"
        rows.append(f"| {m['kernels']:,.0f} | {own} | {' | '.join(peer)} |")
    return rows + told


def export(document: dict[str, Any]) -> list[str]:
    told = []
    for found in document["cases"]:
        m = {k: v["value"] for k, v in found["metrics"].items()}
        told.append(f"`--to {found['name']}` {m['export']:.0f} s, {m['size'] / 1e6:.0f} MB")
    kernels = document["cases"][0]["metrics"]["kernels"]["value"]
    what = "kernels with their gaps, host calls and joules, read, attributed and written"
    return [f"{kernels:,.0f} {what}: {'; '.join(told)}."]


def closure(document: dict[str, Any]) -> list[str]:
    rows = ["| workload, phase | counter, J | predicted, J | error | of it guessed |", "|---|---|---|---|---|"]
    for found in document["cases"]:
        m = found["metrics"]
        error = f"{m['error']['value']:+.1%} [{m['error']['low']:+.1%}, {m['error']['high']:+.1%}]"
        energies = " | ".join(interval(m[name], 1, 3) for name in ("counter", "predicted"))
        note = f" ({found['note']})" if found["note"] else ""
        rows.append(f"| {found['name']} | {energies} | {error}{note} | {m['guessed']['value']:.1%} |")
    return rows


def split(document: dict[str, Any]) -> list[str]:
    rows = [
        "| phase, kind | launches | ms | above the floor, mJ | by duration within operators, mJ | times |",
        "|---|---|---|---|---|---|",
    ]
    for found in document["cases"]:
        m = found["metrics"]
        old = m["dynamic_by_duration"]["value"] * 1e3
        rows.append(
            f"| {found['name']} | {m['launches']['value']:,.0f} | {m['time']['value'] * 1e3:.2f} | "
            f"{interval(m['dynamic'], 1e3, 1)} | {old:.1f} | {m['times']['value']:.2g} |"
        )
    return rows


def report() -> list[str]:
    """Return how the report of the recorded run of qwen-7b int8 begins, as it is printed today."""
    attribution = attribute(RunFolder(_ROOT / "tests" / "data" / "h100-qwen-7b-int8"))
    console = PlainConsole(file=io.StringIO(), width=100)
    print_report(state(Explanation(attribution), top=4), console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in text.partition("\n  • prefill")[0].strip().splitlines()]
    return ["```text", *lines, "```"]


# What an audit found of the code of commit 255c3fb, on boards of its own: cover in % of kernel rows of at least 2 % in
# decode, and of the floor in prefill and decode.
_AUDIT = {
    "base": "83, 82/73",
    "replay differs by 2 %": "83, 80/71",
    "replay differs by 10 %": "65, 82/74",
    "hard power cap": "85, 43/64",
    "hot board": "91, 0/74",
    "host adds 2 W in gaps": "90, 84/78",
    "90 % gaps, host adds 3 W": "84, 43/71",
    "recorder lengthens by 0.5 us": "34, 84/76",
    "nothing alone": "64, 83/74",
    "replay with warm L2": "77, 79/78",
    "counter gain +3 %": "56, 3/0",
    "no replays (--quick)": "1, –",
}
_CLASSES = ("single", "main", "minor", "never", "floor")


def coverage(document: dict[str, Any]) -> list[str]:
    head = " | ".join(f"{name}, prefill / decode" for name in _CLASSES)
    rows = [f"| scenario | audit: rows, floor | {head} |", f"|---|---|{'---|' * len(_CLASSES)}"]
    cases: Cases = {c["name"]: c["metrics"] for c in document["cases"]}
    for scenario, audit in _AUDIT.items():
        cells = []
        for name in _CLASSES:
            found = [cases.get(f"{scenario}, {name} {phase}") for phase in ("prefill", "decode")]
            told = [
                "–" if m is None else f"{m['cover']['value']:.0%} ({m['median_error']['value']:.1%})" for m in found
            ]
            cells.append(" / ".join(told) if any(found) else "–")
        rows.append(f"| {scenario} | {audit} | {' | '.join(cells)} |")
    return rows


def attribution(document: dict[str, Any]) -> list[str]:
    rows = ["| planted | counter, mJ | account, mJ | error | held | equal power |", "|---|---|---|---|---|---|"]
    for found in document["cases"]:
        m, parameters = found["metrics"], found["parameters"]
        name = f"{found['name']} ({parameters['kind']}, {parameters['precision']})"
        energies = " | ".join(interval(m[key], 1e3, 2) for key in ("truth", "estimate"))
        held = "yes" if m["held"]["value"] else "no"
        equal = f"{m['error_by_equal_power']['value']:+.0%}"
        rows.append(f"| {name} | {energies} | {m['error']['value']:+.1%} | {held} | {equal} |")
    return rows


def stretch(document: dict[str, Any]) -> list[str]:
    keys = ("inside_s", "step_s", "step_recorded_s", "recorded_duration_s")
    rows = [
        "| blocks | inside, µs | start to start, µs | recorded, µs | recorded duration, µs |",
        "|---|---|---|---|---|",
    ]
    for found in document["cases"]:
        values = " | ".join(f"{found['metrics'][key]['value'] * 1e6:.2f}" for key in keys)
        rows.append(f"| {found['parameters']['blocks']} | {values} |")
    return rows


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "matrix": matrix,
    "completeness": completeness,
    "kernels": kernels,
    "kernels-energy": kernels_energy,
    "stages": stages,
    "variants": variants,
    "overhead": overhead,
    "recorder_load": recorder_load,
    "analysis": analysis,
    "export": export,
    "closure": closure,
    "closure-runs": closure,
    "split": split,
    "coverage": coverage,
    "attribution": attribution,
    "stretch": stretch,
    "decode": decode.table,
    "saving": decode.saving,
    "client": client.table,
    "fused": fused.table,
    "argument": argument.table,
    "fuzz": fuzz.table,
    "serving": serving.table,
    "study-precision": study.table,
    "study-batch": study.table,
}


# What is made of the results of another bench.
_OF = {"saving": "decode"}


def filled(text: str) -> str:
    """Return *text* with what stands between ``<!-- NAME -->`` and ``<!-- end -->`` written anew."""

    def table(match: re.Match[str]) -> str:
        if match[1] == "report":
            return "\n".join(["<!-- report -->", *report(), "<!-- end -->"])
        document = load(_OF.get(match[1], match[1]))
        if document is None:
            raise SystemExit(f"there is no result of bench.{match[1]} under {RESULTS}: run it first.")
        lines = [*TABLES[match[1]](document), "", measured_on(document)]
        return "\n".join([f"<!-- {match[1]} -->", *lines, "<!-- end -->"])

    return re.sub(rf"<!-- ({'|'.join(['report', *TABLES])}) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write them into the pages instead of printing those")
    write = parser.parse_args().write
    for page in PAGES:
        text = filled(page.read_text())
        if write:
            page.write_text(text)
        else:
            print(text)


if __name__ == "__main__":
    main()
