"""How long it takes to load, attribute and explain a run of many kernels, how much memory, and how that compares.

python -m bench.analysis [--run RUN] [--kernels 10000000] [--peer-kernels 100000 1000000]

The large run is RUN repeated: its generations of passes calls and time follow each other until there are enough. The
peer is Holistic Trace Analysis (pip install HolisticTraceAnalysis, in this environment or the one of --peer-python) on
the same kernels and host calls, written as a Chrome trace of the kind that it reads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.result import case, metric, write
from llmkern.runfolder import RunFolder
from llmkern.runfolder.schema import ADDED, TABLES
from llmkern.runfolder.writer import grouped

REPEATED = ("calls", "time")
DEFAULT_RUN = Path(__file__).parents[1] / "tests" / "data" / "h100-qwen-7b-int4"
MOST_S, MOST_BYTES = 5.0, 2.5e9
REPORT_S = 2.5
IMPORT = ["-c", "import pandas"]
CORES, REPEATS = 2, 5
# Of this process alone: getrusage also counts what its parent had before it was executed.
_PEAK = """
import json, sys, time
def peak_bytes():
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
_OURS = f"""{_PEAK}
begin = time.perf_counter()
from pathlib import Path
from llmkern.attribute.attribution import attribute
from llmkern.explain import Explanation
from llmkern.runfolder import RunFolder
imported = time.perf_counter()
found = attribute(RunFolder(Path(sys.argv[1])))
attributed = time.perf_counter()
explanation = Explanation(found)
explanation.findings, explanation.predictions, explanation.roofs
done = time.perf_counter()
print(json.dumps({{
    "import_s": imported - begin, "attribute_s": attributed - imported, "explain_s": done - attributed,
    "findings": len(explanation.findings), "peak_bytes": peak_bytes(),
}}))
"""
_THEIRS = f"""{_PEAK}
begin = time.perf_counter()
from hta.trace_analysis import TraceAnalysis
imported = time.perf_counter()
found = TraceAnalysis(trace_files={{0: sys.argv[1]}}, trace_dir="")
loaded = time.perf_counter()
found.get_gpu_kernel_breakdown(visualize=False)
found.get_idle_time_breakdown(ranks=[0], visualize=False)
found.get_cuda_kernel_launch_stats(ranks=[0], visualize=False)
done = time.perf_counter()
print(json.dumps({{
    "import_s": imported - begin, "load_s": loaded - imported, "analyse_s": done - loaded,
    "peak_bytes": peak_bytes(),
}}))
"""


def _with_all_columns(name: str, table: pa.Table) -> pa.Table:
    """Return *table* in today's schema; what an older run lacks is empty."""
    for column in ADDED.get(name, ()):
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table), TABLES[name].field(column).type))
    return table.select(TABLES[name].names).cast(TABLES[name])


def repeat_run(run: RunFolder, kernels: int, folder: Path) -> int:
    """Write *run* to *folder* with its traced generations repeated to at least *kernels* kernels; return how many.

    Passes follow each other in the order in which a run has them, and row groups are as large.
    """
    folder.mkdir(parents=True)
    shutil.copy(run.path / "run.json", folder)
    tables = {name: run.path / f"{name}.parquet" for name in TABLES}
    read = {name: _with_all_columns(name, pq.read_table(file)) for name, file in tables.items() if file.exists()}
    traced = [_of_pass(read["kernels"], name) for name in REPEATED]
    once = sum(part.num_rows for part in traced)
    times = max(1, -(-(kernels - read["kernels"].num_rows) // max(1, once)) + 1)
    # Each repetition is later than the one before, and its correlation ids are its own.
    marks = [pc.min_max(_of_pass(read["ranges"], name)[edge]) for name in REPEATED for edge in ("start_ns", "end_ns")]
    known = [m for m in marks if m["min"].as_py() is not None]
    step_ns = max(m["max"].as_py() for m in known) - min(m["min"].as_py() for m in known) + 1_000_000
    steps = {
        "start_ns": step_ns,
        "end_ns": step_ns,
        "correlation_id": 1 + max(pc.max(part["correlation_id"]).as_py() or 0 for part in traced),
    }
    for name, table in read.items():
        parts = [table]
        if "pass" in table.column_names and "start_ns" in table.column_names:
            rest = table.filter(pc.invert(pc.is_in(table["pass"].cast(pa.string()), pa.array(REPEATED))))
            parts = [_shifted(_of_pass(table, p), steps, n) for p in REPEATED for n in range(times)] + [rest]
        with pq.ParquetWriter(folder / f"{name}.parquet", TABLES[name], compression="zstd") as writer:
            for group in grouped(parts, rows=1_000_000):
                writer.write_table(group)
    return read["kernels"].num_rows + (times - 1) * once


def _of_pass(table: pa.Table, name: str) -> pa.Table:
    return table.filter(pc.equal(table["pass"].cast(pa.string()), name))


def _shifted(table: pa.Table, steps: dict[str, int], number: int) -> pa.Table:
    for column, step in steps.items():
        if column in table.column_names:
            place = table.column_names.index(column)
            table = table.set_column(place, column, pc.add(table[column], number * step))
    return table


def chrome_trace(run: RunFolder, file: Path) -> int:
    """Write kernels and host calls of pass calls (time where there is none) as a Chrome trace; return how many."""
    launches = run.table("launches")
    name = "calls" if (launches["pass"] == "calls").any() else "time"
    launches = launches[launches["pass"] == name]
    kernels = run.table("kernels", where={"pass": name})
    events = 0
    base_ns = int(min(launches["start_ns"].min(), kernels["start_ns"].min()))

    def told() -> Iterator[dict[str, Any]]:
        called = launches[["start_ns", "end_ns", "correlation_id", "api"]]
        for start, end, correlation, api in called.itertuples(index=False):
            args = {"External id": correlation, "correlation": correlation}
            yield _event("cuda_runtime", str(api), start - base_ns, end - start, 1, 1, args)
        ran = kernels[["start_ns", "end_ns", "correlation_id", "name", "kind", "stream"]]
        for start, end, correlation, label, kind, stream in ran.itertuples(index=False):
            category = {"memcpy": "gpu_memcpy", "memset": "gpu_memset"}.get(str(kind), "kernel")
            args = {"External id": correlation, "correlation": correlation, "stream": stream, "device": 0}
            yield _event(category, str(label), start - base_ns, end - start, 0, stream, args)

    with file.open("w") as out:
        out.write('{"schemaVersion": 1, "distributedInfo": {"rank": 0}, "deviceProperties": [], "traceEvents": [\n')
        for event in told():
            out.write((",\n" if events else "") + json.dumps(event))
            events += 1
        out.write("\n]}\n")
    return events


def _event(category: str, name: str, ns: int, length_ns: int, process: int, thread: int, args: dict[str, int]) -> Any:
    span = {"ts": int(ns) / 1e3, "dur": int(length_ns) / 1e3, "pid": process, "tid": int(thread)}
    return {"ph": "X", "cat": category, "name": name, **span, "args": {k: int(v) for k, v in args.items()}}


def timed(code: str, argument: Path, python: str = sys.executable, limit_s: float = 1800) -> dict[str, float] | str:
    """Run *code* with *argument* on CORES cores in a process of its own; return what it prints, or why it did not."""
    cores = set(sorted(os.sched_getaffinity(0))[:CORES])
    try:
        done = subprocess.run(
            [python, "-c", code, str(argument)],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:.0f} s"
    if done.returncode != 0:
        killed = " (killed, probably for memory)" if done.returncode < 0 else ""
        return f"exit code {done.returncode}{killed}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def ours(run: RunFolder, kernels: int, scratch: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the case of llmkern on *kernels* kernels, and its times."""
    folder = scratch / f"run-{kernels}"
    # Two sizes that are asked for may be the same.
    shutil.rmtree(folder, ignore_errors=True)
    count = repeat_run(run, kernels, folder)
    runs: list[dict[str, float]] = []
    for _ in range(REPEATS):
        one = timed(_OURS, folder)
        if isinstance(one, str):
            raise SystemExit(f"llmkern failed on {count} kernels: {one}")
        runs.append(one)
    took = [one["attribute_s"] + one["explain_s"] for one in runs]
    # One core of a shared machine is a third faster or slower from minute to minute.
    found = runs[int(np.argsort(took)[REPEATS // 2])]
    seconds = found["attribute_s"] + found["explain_s"]
    passed = seconds <= MOST_S and found["peak_bytes"] <= MOST_BYTES
    print(f"llmkern, {count:,} kernels: {seconds:.1f} s, {found['peak_bytes'] / 1e9:.2f} GB", flush=True)
    metrics = {
        "kernels": metric(count, "1"),
        "load_attribute_explain": metric(seconds, "s", took),
        "import": metric(found["import_s"], "s"),
        "peak_memory_of_process": metric(found["peak_bytes"], "B"),
        "findings": metric(found["findings"], "1"),
    }
    bar = kernels >= 10_000_000
    note = "" if passed or not bar else f"the bar is {MOST_S:.0f} s and {MOST_BYTES / 1e9:.0f} GB"
    facts = {"run": run.path.name, "cores": CORES}
    return case(f"llmkern, {kernels:,} kernels", facts, metrics, passed if bar else None, note), found


def theirs(run: RunFolder, kernels: int, scratch: Path, python: str) -> dict[str, Any]:
    """Return the case of Holistic Trace Analysis on the same *kernels*, beside llmkern's."""
    own, found = ours(run, kernels, scratch)
    trace = scratch / f"trace-{kernels}.json"
    events = chrome_trace(RunFolder(scratch / f"run-{kernels}"), trace)
    peer = timed(_THEIRS, trace, python)
    name = f"Holistic Trace Analysis, {kernels:,} kernels"
    metrics = {"events": metric(events, "1"), "trace": metric(trace.stat().st_size, "B"), **own["metrics"]}
    trace.unlink()
    if isinstance(peer, str):
        print(f"{name}: {peer}", flush=True)
        return case(name, {"cores": CORES}, metrics, None, peer)
    seconds = peer["load_s"] + peer["analyse_s"]
    ratio = seconds / (found["attribute_s"] + found["explain_s"])
    print(f"{name}: {seconds:.1f} s, {peer['peak_bytes'] / 1e9:.2f} GB, {ratio:.1f} x llmkern", flush=True)
    metrics |= {
        "peer_load_analyse": metric(seconds, "s"),
        "peer_peak_memory": metric(peer["peak_bytes"], "B"),
        "peer_over_llmkern": metric(ratio, "1"),
    }
    return case(
        name, {"cores": CORES}, metrics, None, "kernel and idle-time breakdown and launch statistics; no energy"
    )


def report(folder: Path, repeats: int = 7) -> dict[str, Any]:
    """Return the case of ``llmkern report``: seconds from command to text, and what pandas alone takes to import."""
    took: dict[str, list[float]] = {"report": [], "import_pandas": []}
    for _ in range(repeats):
        for name, arguments in (("report", ["-m", "llmkern", "report", str(folder)]), ("import_pandas", IMPORT)):
            begin_s = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            took[name].append(time.perf_counter() - begin_s)
    metrics = {n: metric(statistics.median(s), "s", s) for n, s in took.items()}
    seconds = statistics.median(took["report"])
    print(f"llmkern report {folder.name}: {seconds:.2f} s", flush=True)
    note = "" if seconds <= REPORT_S else f"the bar is {REPORT_S} s"
    return case(f"llmkern report {folder.name}", {}, metrics, seconds <= REPORT_S, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=DEFAULT_RUN)
    parser.add_argument("--kernels", type=int, default=10_000_000)
    parser.add_argument("--peer-kernels", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has HolisticTraceAnalysis")
    parser.add_argument("--results", type=Path, default=None)
    chosen = parser.parse_args()
    run = RunFolder(chosen.run)
    with tempfile.TemporaryDirectory() as scratch:
        cases = [report(DEFAULT_RUN.parent / "h100-qwen-7b-int8")]
        cases += [ours(run, chosen.kernels, Path(scratch))[0]]
        cases += [theirs(run, count, Path(scratch), chosen.peer_python) for count in chosen.peer_kernels]
    print(write("analysis", cases, chosen.results))


if __name__ == "__main__":
    main()
