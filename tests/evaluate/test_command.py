"""``llmkern evaluate`` as a user calls it, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "candidates.py"
ROOT = Path(__file__).parents[2]


def evaluated(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmkern.evaluate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)


def test_candidates_that_crash_or_hang_take_nothing_with_them(tmp_path: Path) -> None:
    page, tables = tmp_path / "page.html", tmp_path / "csv"
    names = [f"{FILE}:{name}" for name in ("good", "crashes", "hangs")]
    done = evaluated(
        *(*names, "--no-peers", "--shapes", "256x512", "--batch", "1", "--timeout", "25", "--json"),
        *("--html", str(page), "--csv", str(tables)),
    )
    assert done.returncode == 1
    assert "crashes, hangs did not pass" in done.stderr
    assert "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    sentences = {verdict["name"]: verdict["sentence"] for verdict in told["verdicts"]}
    assert sentences["good"] == "good: right on 6 inputs; how fast it is needs a GPU."
    assert sentences["crashes"] == "crashes: it crashed with SIGSEGV in correctness of int8 256x512, M = 1 (random)."
    assert sentences["hangs"].startswith(
        "hangs: it did not come back within 25 s in correctness of int8 256x512, M = 1"
    )
    assert [case["candidate"] for case in told["cases"]] == ["good"]
    assert "There is no GPU here" in told["doubts"][0]
    assert '<meta name="generator" content="llmkern">' in page.read_text()
    assert (tables / "verdicts.csv").exists()


def test_our_triton_kernels_and_a_model_without_a_gpu() -> None:
    done = evaluated(
        f"{FILE}:good", "--format", "int8", "--shapes", "qwen-tiny", "--batch", "2", "--in-model", "qwen-tiny"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("good: right on ")
    assert "llmkern Triton" in done.stdout
    assert "Decode of qwen-tiny" in done.stdout
    assert "as it is" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--no-peers",), "there is nothing to evaluate"),
        (("--format", "int5"), "'int5' must be of int8, nf4, int4"),
        (("--batch", "0"), "'0' must be numbers from 1 to 4096"),
        (("--shapes", "gpt-9"), "gpt-9"),
        (("--shapes", "100x100", "--format", "int4"), "int4 in groups of 64 needs K to divide by it"),
        (("--fail-above", "3%"), "--fail-above needs --baseline FILE"),
        (("--baseline", "/nowhere.json"), "--baseline /nowhere.json cannot be read as JSON"),
        (("a=x.py:f", "a=y.py:f"), "two candidates are called 'a'"),
        (("--in-model", "qwen-tiny", "--format", "int8,nf4"), "--in-model needs one --format"),
        (("--dtype", "bf16"), "--dtype bf16 needs a GPU"),
    ],
)
def test_bad_options_get_a_sentence(arguments: tuple[str, ...], told: str) -> None:
    done = evaluated(*arguments)
    assert done.returncode not in (0, 70)
    assert told in done.stderr
    assert "Traceback" not in done.stderr
