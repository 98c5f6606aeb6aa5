"""A report reads each file once."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import pytest

from llmkern.attribute.attribution import attribute
from llmkern.explain import Explanation
from llmkern.explain.statement import state
from llmkern.report.console import PlainConsole
from llmkern.report.terminal import print_report
from llmkern.runfolder import RunFolder, reader
from tests.recorded import DATA


def test_a_report_reads_every_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    real = reader.pq.ParquetFile

    def counted(file: Any, *rest: Any, **how: Any) -> Any:
        reads[file.stem] += 1
        return real(file, *rest, **how)

    monkeypatch.setattr(reader.pq, "ParquetFile", counted)
    run = RunFolder(DATA / "h100-qwen-7b-int8")
    attribution = attribute(run)
    print_report(state(Explanation(attribution)), PlainConsole(file=io.StringIO(), width=100))
    assert {"kernels", "launches", "ranges", "ops", "power", "energy"} <= set(reads)
    assert set(reads.values()) == {1}


def test_what_a_caller_does_to_a_table_stays_with_the_caller() -> None:
    run = RunFolder(DATA / "h100-qwen-7b-int8")
    first = run.table("ranges")
    first["name"] = "changed"
    first.loc[first.index[0], "start_ns"] = -1
    assert (run.table("ranges")["name"] != "changed").all()
    assert (run.table("ranges")["start_ns"] > 0).all()
