"""Text of others is never markup, control or formula; and standard output is whatever it is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa

from llmkern.attribute.attribution import attribute
from llmkern.explain import Explanation
from llmkern.explain.statement import state
from llmkern.report.console import PlainConsole
from llmkern.report.records import write_csv
from llmkern.report.terminal import print_report
from llmkern.runfolder import RunFolder
from llmkern.text import visible
from tests.synthetic import synthetic_run
from tests.tables import write_table

NAMES = ("[/b]evil[red]", "f[abi:cxx11]", "\x1b]0;title\x07kernel", "=cmd()|' /C calc'!A0", ":smile: kernel")


def with_names(path: Path) -> RunFolder:
    run, _ = synthetic_run(path)
    kernels = run.table("kernels")
    kernels["name"] = [NAMES[i % len(NAMES)] for i in range(len(kernels))]
    columns = {c: pa.array(kernels[c].astype(object), from_pandas=True) for c in kernels.columns}
    write_table(run.path, "kernels", columns)
    return RunFolder(run.path)


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    run = with_names(tmp_path / "run[red]x")
    console = PlainConsole(file=io.StringIO(), width=200)
    attribution = attribute(run)
    print_report(state(Explanation(attribution)), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in ("[/b]evil[red]", "f[abi:cxx11]", "␛]0;title", ":smile: kernel", "run[red]x"):
        assert shown in text
    assert "\x1b" not in text


def test_control_characters_are_shown() -> None:
    assert visible("a\x1b[2J\x7f\n\u202eb\x9b") == "a␛[2J␡\n<U+202E>b<U+009B>"


def test_a_spreadsheet_finds_no_formula(tmp_path: Path) -> None:
    table = pd.DataFrame({"name": ["=1+1", "+a", "-a", "@a", "plain", "\tx"], "change_j": [-1.0, 1, 2, 3, 4, 5]})
    write_csv({"rows": table}, tmp_path / "csv")
    read = pd.read_csv(tmp_path / "csv" / "rows.csv")
    assert list(read["name"]) == ["'=1+1", "'+a", "'-a", "'@a", "plain", "'␉x"]
    assert list(read["change_j"]) == [-1.0, 1, 2, 3, 4, 5]


def report(run: RunFolder, shell: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m llmkern.report '{run.path}' {shell}"
    return subprocess.run(
        ["/bin/sh", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        errors="replace",
    )


def test_standard_output_may_be_full_closed_or_ascii(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "run")
    plain = report(run, "", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert "Per phase" in plain.stdout
    for shell in ("> /dev/full", ">&-"):
        done = report(run, shell)
        assert done.returncode == 4, done.stderr
        assert done.stderr.startswith("llmkern: ")
        assert "fault of llmkern" not in done.stderr
        assert len(done.stderr.splitlines()) == 1
