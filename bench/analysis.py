"""How long it takes to load, attribute and explain a run of many kernels, and how much memory.

python -m bench.analysis --run RUN [--kernels 10000000]

The large run is RUN repeated: its generations of passes calls and time follow each other until there are enough.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmkern.run import TABLES, RunFolder, grouped

REPEATED = ("calls", "time")


def repeat_run(run: RunFolder, kernels: int, folder: Path) -> int:
    """Write *run* to *folder* with its traced generations repeated to at least *kernels* kernels; return how many.

    Passes follow each other in the order in which a run has them, and row groups are as large.
    """
    folder.mkdir(parents=True)
    shutil.copy(run.path / "run.json", folder)
    tables = {name: run.path / f"{name}.parquet" for name in TABLES}
    read = {name: pq.read_table(file).cast(TABLES[name]) for name, file in tables.items() if file.exists()}
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
