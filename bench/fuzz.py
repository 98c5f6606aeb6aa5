"""Captures that no tool wrote: bytes, structure, types and times changed at random, then imported and reported.

python -m bench.fuzz [--seed 0] [--count 10000]

Each is imported, reported, compared with itself and exported. It may be read or refused in a sentence. It fails where a
command ends in an unforeseen error (exit code 70), takes more than 20 s, prints a figure that is no number or below
zero, or where a process grows beyond 1 GB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from bench.mutations import DATA, READ, REFUSED, WRONG, Judged, called, wrong_figures
from bench.result import case, metric, write

MOST_S, MOST_BYTES = 20.0, 10**9
# What stands where another value stood.
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**53, 2**63, -(2**63), 1e308, -1e-9, 0.5, "", "x", "1e999", "1e9"),
    *([], {}, [1, 2, 3], {"a": 1}, "\x00", "=1+1", "<b>", "é" * 300),
)
_TIMES = ("ts", "dur", "start", "end")


@cache
def sources() -> tuple[Path, ...]:
    """Return the captures that are changed."""
    return tuple(sorted(p for p in (DATA / "captures").glob("*/*") if p.suffix in (".json", ".sqlite")))


def changed(chance: random.Random, source: Path, target: Path) -> str:
    """Write *source* changed as *target* and return what was done."""
    content = source.read_bytes()
    how = chance.choice(("bytes", "values", "values", "times", "structure"))
    if how == "bytes":
        data = bytearray(content)
        for _ in range(chance.choice((1, 1, 4, 32))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        target.write_bytes(bytes(data))
    elif source.suffix == ".sqlite":
        target.write_bytes(content)
        _change_tables(chance, how, target)
    else:
        try:
            trace = json.loads(content)
        except ValueError:
            # It is one of those that are no JSON to begin with.
            target.write_bytes(content[: chance.randrange(len(content))])
            return f"{source.parent.name}/{source.name}: cut"
        _change_events(chance, how, trace)
        target.write_text(json.dumps(trace))
    return f"{source.parent.name}/{source.name}: {how}"


def _change_events(chance: random.Random, how: str, trace: Any) -> None:
    events = trace["traceEvents"] if isinstance(trace, dict) else trace
    for _ in range(chance.choice((1, 1, 3, 10))):
        if not events:
            return
        event = chance.choice(events)
        places = [event]
        if isinstance(event, dict) and isinstance(event.get("args"), dict):
            places.append(event["args"])
        place = chance.choice(places)
        if how == "structure" or not isinstance(place, dict) or not place:
            act = chance.choice(("drop", "double", "move"))
            if act == "drop":
                events.remove(event)
            elif act == "double":
                events.insert(chance.randrange(len(events)), event)
            elif isinstance(trace, dict):
                trace[chance.choice(list(trace))] = chance.choice(_VALUES)
                return
        elif how == "times":
            key = chance.choice([k for k in event if k in _TIMES] or ["ts"])
            was = event.get(key)
            factor = chance.choice((-1, 0, 1e-9, 1e3, 1e9, 1e18))
            event[key] = was * factor if isinstance(was, (int, float)) else factor
        else:
            place[chance.choice(list(place))] = chance.choice(_VALUES)


def _change_tables(chance: random.Random, how: str, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for _ in range(chance.choice((1, 1, 3))):
            table = chance.choice(tables)
            columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
            if not columns:
                continue
            times = [column for column in columns if column in _TIMES]
            column = chance.choice(times if how == "times" and times else columns)
            value = chance.choice([v for v in _VALUES if not isinstance(v, (list, dict)) and v not in (2**63,)])
            try:
                if how == "structure":
                    act = chance.choice(("DROP TABLE", "DELETE FROM"))
                    connection.execute(f'{act} "{table}"')
                    if act == "DROP TABLE":
                        tables.remove(table)
                else:
                    rows = f'SELECT rowid FROM "{table}" ORDER BY rowid LIMIT {chance.choice((1, 2, 10**6))}'
                    connection.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE rowid IN ({rows})', (value,))
            except sqlite3.Error:
                # A column may not hold it.
                continue
        connection.commit()


def judge(folder: Path, seed: int, number: int) -> Judged:
    """Make capture *number*, import it and put the run through the commands."""
    chance = random.Random(seed * 1_000_003 + number)
    source = chance.choice(sources())
    with tempfile.TemporaryDirectory(dir=folder) as own:
        path, run = Path(own) / f"changed{source.suffix}", Path(own) / "run"
        what = changed(chance, source, path)
        # Now and then it is one file of several of a job.
        beside = [str(chance.choice(sources()))] if chance.random() < 0.1 else []
        lines = [
            ("import", str(path), *beside, "-o", str(run), "--json"),
            ("report", str(run)),
            ("diff", str(run), str(run), "--json"),
            ("export", str(run), "--to", chance.choice(("perfetto", "nsys")), "-o", str(Path(own) / "out.x")),
        ]
        verdict = READ
        for line in lines:
            begin_s = time.monotonic()
            code, out, told = called(*line)
            shown = f"llmkern {line[0]}"
            if code == 70:
                return Judged(number, what, WRONG, f"{shown}: {told}")
            if time.monotonic() - begin_s > MOST_S:
                return Judged(number, what, WRONG, f"{shown}: takes {time.monotonic() - begin_s:.0f} s")
            if code == 0 and line[0] == "import":
                figure = wrong_figures(out)
                if figure is not None:
                    return Judged(number, what, WRONG, f"{shown}: {figure}")
            # A schema may be called so.
            figures = "".join(part for part in out.lower().splitlines(keepends=True) if ", schema " not in part)
            if code == 0 and line[0] == "report" and (" nan" in figures or "inf " in figures):
                return Judged(number, what, WRONG, f"{shown}: prints nan or inf")
            if code != 0:
                verdict = REFUSED
                break
        if peak_bytes() > MOST_BYTES:
            return Judged(number, what, WRONG, "the process grew beyond 1 GB")
        return Judged(number, what, verdict, "")


def _pool(workers: int) -> ProcessPoolExecutor:
    # New processes: one that was forked begins with the memory of whoever asked.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def peak_bytes() -> int:
    """Return the most memory that this process ever had; getrusage also counts what came before it was executed."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run_all(seed: int, count: int, workers: int) -> list[Judged]:
    """Return what *count* changed captures came to."""
    with tempfile.TemporaryDirectory() as folder, _pool(workers) as pool:
        futures = [pool.submit(judge, Path(folder), seed, number) for number in range(count)]
        return [future.result() for future in futures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path)
    chosen = parser.parse_args()
    judged = run_all(chosen.seed, chosen.count, chosen.workers)
    counts = Counter(one.verdict for one in judged)
    for one in judged:
        if one.verdict == WRONG:
            print(f"{one.number}: {one.what}\n    {one.told}", flush=True)
    print(dict(counts), flush=True)
    metrics = {verdict: metric(counts[verdict], "1") for verdict in (READ, REFUSED, WRONG)}
    parameters = {"seed": chosen.seed, "count": chosen.count}
    print(write("fuzz", [case("captures", parameters, metrics, counts[WRONG] == 0)], chosen.results))
    sys.exit(1 if counts[WRONG] else 0)


def table(document: dict[str, Any]) -> list[str]:
    """Return the lines of docs/measured.md."""
    rows = ["| captures | seed | read | refused in a sentence | wrong |", "|---|---|---|---|---|"]
    for found in document["cases"]:
        m = {name: f"{entry['value']:,.0f}" for name, entry in found["metrics"].items()}
        told = found["parameters"]
        rows.append(f"| {told['count']:,} | {told['seed']} | {m[READ]} | {m[REFUSED]} | {m[WRONG]} |")
    return rows


if __name__ == "__main__":
    main()
