"""Run folders that nobody wrote: facts, tables and bits changed at random, through every command that reads a run.

python -m bench.mutations [--seed 0] [--count 2000] [--flips 200]

A mutant may be read or refused in a sentence. It fails where a command ends in an unforeseen error (exit code 70),
prints a
figure that is no number or below zero, or, where only bits of a Parquet file were flipped, prints other figures than
before.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.result import case, metric, write

DATA = Path(__file__).parents[1] / "tests" / "data"
BASES = ("h100-qwen-7b-int4", "h100-gap-read-back", "board", "cpu")
# How often each is taken: what is small is quick, what is large has more in it.
_OFTEN, _OFTEN_QUICK = (0.5, 3, 1, 4), (0.1, 3, 0.5, 5)
# What a figure of a report may not be below zero in; residuals and changes may.
_NOT_NEGATIVE = (
    "latency_s",
    "energy_j",
    "energy_per_token_j",
    "gap_s",
    "gap_j",
    "kernel_j",
    "floor_w",
    "busy_s",
    "mean_w",
)
_NOT_NEGATIVE_ROWS = ("launches", "duration_ns", "energy_j")
READ, REFUSED, WRONG = "read", "refused", "wrong"


@dataclass(frozen=True)
class Judged:
    """What one mutant came to: READ, REFUSED or WRONG, and how."""

    number: int
    what: str
    verdict: str
    told: str


def make_bases(folder: Path) -> None:
    """Put the run folders that mutants are made of into *folder*."""
    from llmkern.progress import Stages
    from llmkern.record.options import TraceOptions
    from llmkern.session import trace
    from tests.board import Board

    for name in BASES[:2]:
        shutil.copytree(DATA / name, folder / name)
    board = Board()
    board.play()
    board.write(folder / "board")
    small = TraceOptions(
        "qwen-tiny",
        device="cpu",
        prompt_tokens=8,
        new_tokens=4,
        warmup=1,
        repeats=1,
        trace_repeats=1,
        unweighed_window_s=0.2,
        out=folder / "cpu",
    )
    trace(small, Stages(quiet=True))


def mutate(chance: random.Random, run: Path) -> str:
    """Change one thing in *run*, sign it as llmkern would have, and say what."""
    tables = sorted(run.glob("*.parquet"))
    if not tables or chance.random() < 0.4:
        return _mutate_facts(chance, run)
    return _mutate_table(chance, run, chance.choice(tables))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner: list[tuple[Any, ...]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        inner += [(*path, key), *_places(part, (*path, key))]
    return inner


def _mutate_facts(chance: random.Random, run: Path) -> str:
    file = run / "run.json"
    facts = json.loads(file.read_text())
    path = chance.choice(_places(facts))
    owner = facts
    for key in path[:-1]:
        owner = owner[key]
    old = owner[path[-1]]
    odd: list[Any] = [
        None,
        "",
        "x",
        -1,
        0,
        1,
        2**31,
        2**63,
        10**30,
        1e308,
        -0.5,
        True,
        [],
        {},
        [old],
        {"a": old},
        "\ud800",
    ]
    if isinstance(old, int | float) and not isinstance(old, bool):
        odd += [old + 1, -old, old * 1000, old / 7, str(old)]
    if chance.random() < 0.2:
        del owner[path[-1]]
        said = "removed"
    else:
        owner[path[-1]] = new = chance.choice(odd)
        said = f"{str(old)[:20]} -> {str(new)[:20]!r}"
    file.write_text(json.dumps(facts))
    return f"run.json {'.'.join(map(str, path))}: {said}"


def _mutate_table(chance: random.Random, run: Path, file: Path) -> str:
    table = pq.read_table(file)
    column = chance.choice(table.column_names)
    how = chance.choice(["value", "value", "value", "many", "drop", "type", "rows", "double", "empty", "shuffle"])
    values = table[column].to_pylist()
    if how == "drop":
        table = table.drop_columns([column])
    elif how == "rows":
        first = chance.randrange(len(values) or 1)
        table = pa.concat_tables([table.slice(0, first), table.slice(first + chance.randrange(1, 50))])
    elif how == "double":
        table = pa.concat_tables([table, table.slice(chance.randrange(len(values) or 1), 3)])
    elif how == "empty":
        table = table.slice(0, 0)
    elif how == "shuffle":
        table = table.take(pa.array(chance.sample(range(len(values)), len(values)), pa.int64()))
    else:
        odd: list[Callable[[Any], Any]] = [
            lambda _: None,
            lambda _: 0,
            lambda _: -1,
            lambda _: 2**62,
            lambda v: -v if isinstance(v, int | float) else v,
            lambda v: v * 1000 if isinstance(v, int | float) else "x",
            lambda v: v + 10**9 if isinstance(v, int | float) else "",
            lambda v: v - 10**9 if isinstance(v, int | float) else "decode",
            lambda _: float("nan"),
            lambda _: float("inf"),
            lambda _: chance.choice(values) if values else None,
        ]
        rows = (
            range(len(values))
            if how == "type"
            else chance.sample(range(len(values)), min(len(values), 1 if how == "value" else chance.randrange(1, 200)))
        )
        change = str if how == "type" else chance.choice(odd)
        for row in rows:
            values[row] = change(values[row])
        array = _as_array(values, table.schema.field(column).type)
        table = table.set_column(table.column_names.index(column), column, array)
    pq.write_table(table, file)
    _sign(run, file)
    return f"{file.stem} {column}: {how}"


def _as_array(values: list[Any], kind: pa.DataType) -> pa.Array:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    for wanted in (plain, None, pa.float64(), pa.string()):
        with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
            if pa.types.is_string(wanted) if wanted is not None else False:
                return pa.array([None if v is None else str(v) for v in values], pa.string())
            return pa.array(values, wanted)
    return pa.nulls(len(values))


def _sign(run: Path, file: Path) -> None:
    from llmkern.runfolder.writer import crc32_of

    facts = json.loads((run / "run.json").read_text())
    if file.stem in facts.get("tables", {}):
        rows = pq.read_metadata(file).num_rows
        facts["tables"][file.stem] = {"rows": rows, "bytes": file.stat().st_size, "crc32": crc32_of(file)}
        (run / "run.json").write_text(json.dumps(facts))


def called(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this process and return its exit code, what it printed, and how it failed."""
    import click

    from llmkern.commands import cli
    from llmkern.errors import LlmkernError

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main(args=list(arguments), prog_name="llmkern", standalone_mode=False)
        except LlmkernError as error:
            return error.exit_code, out.getvalue(), str(error)
        except click.ClickException as error:
            return error.exit_code, out.getvalue(), error.format_message()
        except Exception:
            return 70, out.getvalue(), traceback.format_exc()[-1500:]
    return 0, out.getvalue(), ""


def commands(run: Path, other: Path, scratch: Path) -> list[tuple[str, ...]]:
    """Return the command lines that read *run*; *other* is a sound run to compare it with."""
    return [
        ("report", str(run), "--json"),
        ("report", str(run)),
        ("report", str(run), "--html", str(scratch / "page.html")),
        ("diff", str(other), str(run), "--json"),
        ("export", str(run), "--to", "parquet", "-o", str(scratch / "tables")),
        ("export", str(run), "--to", "perfetto", "-o", str(scratch / "trace.json.gz")),
    ]


def wrong_figures(text: str) -> str | None:
    """Return what of a report in JSON is no number or below zero, None where nothing is."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        document = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return f"not strict JSON: {error}"
    tables = document.get("tables", {})
    for row in tables.get("phases", []) if document["document"] == "report" else []:
        for name in _NOT_NEGATIVE:
            for key in (name, f"{name}_low", f"{name}_high"):
                if row.get(key) is not None and row[key] < 0:
                    return f"{row['phase']} {key} = {row[key]}"
    for name in ("kinds", "operators", "causes"):
        for row in tables.get(name, []):
            for key in _NOT_NEGATIVE_ROWS:
                if row.get(key) is not None and row[key] < -1e-9:
                    return f"{name} {key} = {row[key]}"
    return None


def judge(bases: Path, seed: int, number: int, thorough: bool = True) -> Judged:
    """Make mutant *number* and put it through every command, or through JSON and one other where not *thorough*."""
    chance = random.Random(seed * 1_000_003 + number)
    base = chance.choices(BASES, _OFTEN if thorough else _OFTEN_QUICK)[0]
    with tempfile.TemporaryDirectory() as folder:
        run, scratch = Path(folder) / "run", Path(folder) / "out"
        shutil.copytree(bases / base, run)
        scratch.mkdir()
        what = f"{base}: {mutate(chance, run)}"
        verdicts = set()
        lines = commands(run, bases / base, scratch)
        for line in lines if thorough else [lines[0], chance.choice(lines[1:])]:
            code, out, told = called(*line)
            shown = f"llmkern {line[0]} {' '.join(line[2:3])}"
            if code == 70:
                return Judged(number, what, WRONG, f"{shown}: {told}")
            if code == 0 and "--json" in line:
                figure = wrong_figures(out)
                if figure is not None:
                    return Judged(number, what, WRONG, f"{shown}: {figure}")
            if code == 0 and (" nan" in out.lower() or "inf " in out.lower()):
                return Judged(number, what, WRONG, f"{shown}: prints nan or inf")
            verdicts.add(READ if code == 0 else REFUSED)
        return Judged(number, what, READ if READ in verdicts else REFUSED, "")


@cache
def sound(run: Path) -> dict[str, Any]:
    """Return the tables of a report of *run* as it was recorded."""
    found: dict[str, Any] = json.loads(called("report", str(run), "--json")[1])["tables"]
    return found


def judge_flip(bases: Path, seed: int, number: int) -> Judged:
    """Flip one bit of one Parquet file of a finished run and compare what is printed."""
    chance = random.Random(seed * 7_000_003 + number)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "cpu"
        shutil.copytree(bases / "cpu", run)
        file = chance.choice([f for f in sorted(run.glob("*.parquet")) if f.stem != "attribution"])
        content = bytearray(file.read_bytes())
        bit = chance.randrange(len(content) * 8)
        content[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(bytes(content))
        code, after, told = called("report", str(run), "--json")
        what = f"bit {bit} of {file.name}"
        if code == 70:
            return Judged(number, what, WRONG, told)
        if code == 0 and json.loads(after)["tables"] != sound(bases / "cpu"):
            return Judged(number, what, WRONG, "other figures, and nothing was said")
        return Judged(number, what, READ if code == 0 else REFUSED, "")


def run_all(bases: Path, seed: int, counts: tuple[int, int], workers: int, thorough: bool) -> dict[str, list[Judged]]:
    """Return what so many mutants and flipped bits (*counts*) came to."""
    count, flips = counts
    with ProcessPoolExecutor(workers) as pool:
        mutants = [pool.submit(judge, bases, seed, number, thorough) for number in range(count)]
        bits = [pool.submit(judge_flip, bases, seed, number) for number in range(flips)]
        return {"mutants": [f.result() for f in mutants], "flips": [f.result() for f in bits]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="JSON and one other command for each mutant")
    parser.add_argument("--results", type=Path)
    chosen = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        make_bases(Path(folder))
        found = run_all(Path(folder), chosen.seed, (chosen.count, chosen.flips), chosen.workers, not chosen.quick)
    for name, judged in found.items():
        counts = Counter(one.verdict for one in judged)
        for one in judged:
            if one.verdict == WRONG:
                print(f"{name} {one.number}: {one.what}\n    {one.told}", flush=True)
        print(f"{name}: {dict(counts)}", flush=True)
        metrics = {verdict: metric(counts[verdict], "1") for verdict in (READ, REFUSED, WRONG)}
        parameters: dict[str, Any] = {"seed": chosen.seed, "count": len(judged)}
        cases.append(case(name, parameters, metrics, counts[WRONG] == 0 and not math.isnan(len(judged))))
    print(write("mutations", cases, chosen.results))


if __name__ == "__main__":
    main()
