"""Faults that were found from outside at 255c3fb, through the command line: every test here fails at that commit.

It needs nothing of a tree but ``python -m llmkern``, tests.synthetic and tests/data, so it can be run there:
git worktree add ../old 255c3fb; cp tests/test_faults.py ../old/tests; cd ../old; python -m pytest tests/test_faults.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.synthetic import synthetic_run

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"


def llmkern(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmkern", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", **environment},
        encoding="utf-8",
        errors="replace",
    )


def report(run: Path, *arguments: object) -> str:
    done = llmkern("report", run, *arguments)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def document(run: Path) -> dict[str, Any]:
    return json.loads(report(run, "--json"))


def rewrite(run: Path, name: str, table: pa.Table) -> None:
    """Write table *name* of *run* anew; where the facts have its checksum, that too."""
    file = run / f"{name}.parquet"
    pq.write_table(table, file)
    facts = json.loads((run / "run.json").read_text())
    if name in facts.get("tables", {}):
        data = file.read_bytes()
        facts["tables"][name] = {"rows": table.num_rows, "bytes": len(data), "crc32": zlib.crc32(data)}
        (run / "run.json").write_text(json.dumps(facts))


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, pa.string()).cast(table.schema.field(name).type))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic_run(tmp_path / "run", jitter=0.05)[0].path


def test_r2_throttling_in_the_tools_own_tests_is_none_of_the_run(run: Path) -> None:
    power, ranges = pq.read_table(run / "power.parquet"), pd.read_parquet(run / "ranges.parquet")
    windows = ranges[(ranges["pass"] == "weigh") & (ranges["category"] == "window")]
    times = power["timestamp_ns"].to_numpy()
    inside = np.zeros(len(times), bool)
    for start_ns, end_ns in windows[["start_ns", "end_ns"]].itertuples(index=False):
        inside |= (times >= start_ns) & (times <= end_ns)
    assert (~inside).sum() > 10
    throttle = pa.array(np.where(inside, 0, 4)).cast(power.schema.field("throttle").type)
    rewrite(run, "power", power.set_column(power.column_names.index("throttle"), "throttle", throttle))
    assert "held down" not in report(run)


def test_r3_intervals_have_two_ends(run: Path) -> None:
    text = report(run)
    assert "±" not in text
    assert re.search(r"latency\s+\S+ \[\S+, \S+\] ms", text)


def test_r4_a_latency_that_holds_zero_is_no_answer(tmp_path: Path) -> None:
    path = synthetic_run(tmp_path / "run", token_s=0.0004, busy_per_token_s=0.0001, new_tokens=2, jitter=0.2)[0].path
    text = report(path)
    assert "The latency of decode is not known" in text
    assert not re.search(r"-\d\S* (ms|µs|s)\b", text.split("What is uncertain")[0])


def test_r5_no_share_is_more_than_the_whole(tmp_path: Path) -> None:
    path = synthetic_run(tmp_path / "run", busy_per_token_s=0.12, energy=False)[0].path
    shares = [float(share) for share in re.findall(r"(\d+(?:\.\d+)?)%", report(path).split("Books and sensors")[0])]
    assert shares
    assert max(shares) <= 100


def test_r7_a_product_of_one_row_is_gemv_at_every_precision() -> None:
    times: dict[str, float] = {}
    for row in document(DATA / "h100-qwen-7b-int8")["tables"]["kinds"]:
        if row["phase"] == "decode":
            times[row["kind"]] = row["duration_ns"]
    assert times["gemv"] > 1e6
    assert times.get("gemm", 0.0) == 0.0


def test_r9_a_run_does_not_differ_from_itself(run: Path) -> None:
    text = llmkern("diff", run, run).stdout
    assert "±" not in text
    assert "not distinguishable" in text
    assert not re.search(r"\b(more|less)\b", text.split("per token")[-1])


def test_r9_a_run_without_operators_is_not_compared_by_module() -> None:
    text = llmkern("diff", DATA / "h100-qwen-7b-bf16", DATA / "h100-qwen-7b-int8").stdout
    assert "no operators" in text
    assert "By module" not in text


def test_r10_the_host_is_not_said_to_need_what_is_latency_by_launches(tmp_path: Path) -> None:
    text = report(DATA / "h100-qwen-7b-int8")
    assert not re.search(r"the host needs \d", text)
    assert "-0%" not in text
    bare = tmp_path / "bare"
    shutil.copytree(DATA / "h100-qwen-7b-int8", bare)
    facts = json.loads((bare / "run.json").read_text())
    facts["model"]["layers"] = 0
    (bare / "run.json").write_text(json.dumps(facts))
    assert "a layer launches 0" not in report(bare)


def test_r11_no_roof_is_above_the_data_sheet() -> None:
    rows = document(DATA / "h100-qwen-7b-int8")["tables"]["roofline"]
    rates = [row["flops"] / row["floor_ns"] * 1e9 for row in rows if row["bound"] == "compute"]
    assert rates
    # 1,979 TOPS in int8, dense.
    assert max(rates) <= 1.985e15


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("traced") / "run"
    how = ("--device", "cpu", "--prompt-tokens", 16, "--new-tokens", 4, "--repeats", 3, "--quick", "--out", out)
    how += ("--unweighed-window-s", 0.2)
    done = llmkern("trace", "--model", "qwen-tiny", "--precision", "fp32", *how)
    assert done.returncode == 0, done.stderr[-800:]
    return out


def test_r12_the_attribution_says_why_and_where(traced: Path) -> None:
    rows = pd.read_parquet(traced / "attribution.parquet")
    assert {"part", "kind", "cause", "op", "module", "name"} <= set(rows.columns)
    assert rows["op"].notna().any()


def test_r13_the_json_holds_what_the_terminal_shows() -> None:
    text = json.dumps(document(DATA / "h100-qwen-7b-int8"))
    for what in ("counter_j", "idle_j", "samples_j", "condition_number", "memory_j"):
        assert f'"{what}"' in text, what


def test_r13_no_column_of_findings_is_an_empty_twin(tmp_path: Path) -> None:
    report(DATA / "h100-qwen-7b-int8", "--csv", tmp_path / "csv")
    findings = pd.read_csv(tmp_path / "csv" / "findings.csv")
    for column in findings.columns:
        twins = [c for c in findings.columns if c != column and c.startswith(f"{column}_value")]
        assert not twins or findings[column].notna().any(), column


@pytest.mark.parametrize(("table", "never"), [("kernels", "recorded no kernels"), ("energy", "gave no counter")])
def test_r14_a_table_that_is_missing_is_named(tmp_path: Path, table: str, never: str) -> None:
    path = tmp_path / "run"
    shutil.copytree(DATA / "h100-qwen-7b-int8", path)
    (path / f"{table}.parquet").unlink()
    text = report(path)
    assert never not in text
    assert re.search(rf"[Tt]able {table}\b", text)


def test_r15_a_residual_that_is_large_is_a_doubt(tmp_path: Path) -> None:
    path = synthetic_run(tmp_path / "run", kernel_w=2000.0)[0].path
    text = " ".join(report(path).split("What is uncertain")[1].split())
    assert re.search(r"add up to \d+% (less|more) than the counter says", text)


def renamed(run: Path, name: str) -> None:
    kernels = pq.read_table(run / "kernels.parquet")
    every = kernels["name"].cast(pa.string())
    rewrite(run, "kernels", with_column(kernels, "name", pc.replace_substring(every, every[0].as_py(), name)))


@pytest.mark.parametrize("name", ["k[/b]", "k[abi:cxx11]", "k[red]x[/red]"])
def test_u8_names_are_no_markup(run: Path, name: str) -> None:
    renamed(run, name)
    assert name in report(run)


def test_u8_no_control_character_reaches_the_terminal(run: Path) -> None:
    renamed(run, "k\x1b[2Jgone")
    assert "\x1b[2J" not in report(run)


def test_u8_no_cell_of_a_csv_is_a_formula(run: Path, tmp_path: Path) -> None:
    renamed(run, "=cmd|' /C calc'!A0")
    report(run, "--csv", tmp_path / "csv")
    for file in (tmp_path / "csv").glob("*.csv"):
        assert not re.search(r'(^|,)"?=', file.read_text(), re.MULTILINE), file.name


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_u9_a_full_disk_is_one_sentence(run: Path) -> None:
    command = f"{sys.executable} -m llmkern report {run} > /dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode not in (0, 70)
    assert "Traceback" not in done.stderr
    assert "fault of llmkern" not in done.stderr


def test_u9_a_terminal_that_knows_ascii_only_gets_a_report(run: Path) -> None:
    done = llmkern("report", run, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr[-300:]
    assert "latency" in done.stdout


def test_u6_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m llmkern report {run} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode in (0, 141), done.stderr[-300:]
