"""JSON and CSV: one schema, documented, with plain values only."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from llmkern.errors import RecordingError
from llmkern.explain import Explanation
from llmkern.explain.compare import compare
from llmkern.explain.devices import COLUMNS
from llmkern.explain.statement import state
from llmkern.explain.tables import run_tables
from llmkern.explain.versus import versus
from llmkern.report.comparison import versus_facts
from llmkern.report.document import difference_document, report_document, run_facts
from llmkern.report.records import difference_tables, records, statement_tables, write_csv
from tests.recorded import recorded

DOCS = (Path(__file__).parents[2] / "docs" / "json.md").read_text()


def documented(title: str) -> set[str]:
    """Return the names in code style in the first column of the table under *title* of docs/json.md."""
    part = DOCS.split(f"## {title}\n")[1].split("\n## ")[0]
    return {name for row in re.findall(r"^\| (`.*?) \|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    explanation = Explanation(recorded("int8"))
    return report_document(replace(state(explanation), doubts=("a doubt",)), run_tables(explanation))


def test_the_report_is_strict_json(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["schema"], document["document"], document["uncertain"]) == (2, "report", ["a doubt"])
    assert document["run"]["device"]["name"] == "NVIDIA H100 80GB HBM3"


def test_what_the_report_holds_is_documented(document: dict[str, Any]) -> None:
    assert set(document) == documented("report")
    assert {key for phase in document["phases"] for key in phase} == documented("phase")
    assert {book["name"] for book in document["books"]} <= documented("books")
    assert set(document["shown"]) <= documented("shown")
    assert set(document["run"]) <= documented("run")
    assert {key for finding in document["findings"] for key in finding} == documented("finding")
    assert {key for made in document["predictions"] for key in made} == documented("prediction")
    assert set(document["tables"]) == documented("tables of report")
    columns = documented("columns")
    assert document["tables"].pop("devices") == []
    assert set(COLUMNS) <= columns
    for name, rows in (*document["tables"].items(), *document["shown"].items()):
        assert rows, name
        assert {key for row in rows for key in row} <= columns, name


def test_the_tables_carry_what_the_accounts_say(document: dict[str, Any]) -> None:
    account = recorded("int8").accounts["decode"]
    (phase,) = (row for row in document["phases"] if row["phase"] == "decode")
    assert account.weight.energy_j is not None
    assert phase["energy_j"]["value"] == account.weight.energy_j.value
    kinds = sum(row["energy_j"] for row in document["tables"]["kinds"] if row["phase"] == "decode")
    assert kinds == pytest.approx(phase["kernels"]["energy_j"]["value"])
    layers = {row["layer"] for row in document["tables"]["layers"]}
    assert layers == set(range(28))


def test_the_comparison_is_strict_json_and_documented() -> None:
    pair = recorded("bf16-operators"), recorded("int8")
    facts = [run_facts(a.run.facts, str(a.run.path), a.run.status) for a in pair]
    lines = versus_facts(["before", "after"], versus(pair[0], [pair[1]]))
    document = difference_document(facts, [compare(*pair, "graph")], lines)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert set(document) == documented("diff")
    assert {key for phase in document["phases"] for key in phase} == documented("phase of diff")
    assert set(document["tables"]) == documented("tables of diff")
    assert {key for line in document["versus"] for key in line} == documented("line of versus")
    for rows in document["tables"].values():
        assert {key for row in rows for key in row} <= documented("columns")
    # Of more than two runs there are lines alone.
    lines = versus_facts(["a", "b", "c"], versus(pair[0], [pair[1], recorded("int4")]))
    many = difference_document([*facts, facts[0]], [[], []], lines)
    assert set(many) == {"schema", "document", "before", "runs", "versus"}
    assert [line["run"] for line in many["versus"]] == ["b", "b", "c", "c"]
    assert json.loads(json.dumps(many, allow_nan=False)) == many


def test_every_table_is_written_as_csv(tmp_path: Path) -> None:
    explanation = Explanation(recorded("int4"))
    tables = {**statement_tables(state(explanation)), **run_tables(explanation)}
    written = write_csv(tables, tmp_path / "csv")
    assert {path.stem for path in written} >= {"phases", "kinds", "causes", "findings", "predictions", "roofline"}
    assert {"energy_j", "energy_j_low", "energy_j_high"} <= set(tables["findings"].columns)
    for name in ("phases", "findings", "predictions"):
        # Fault R13: a twin column with nothing in it.
        assert not [c for c in tables[name] if tables[name][c].isna().all() and f"{c}_value" in tables[name]]
    kinds = pd.read_csv(tmp_path / "csv" / "kinds.csv")
    assert {"phase", "kind", "energy_j", "low_j", "high_j"} <= set(kinds.columns)
    changes = difference_tables(compare(recorded("int4"), recorded("int8")))
    assert {path.stem for path in write_csv(changes, tmp_path / "diff")} == {"phases", "bars", "work", "modules"}


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="choose another folder"):
        write_csv({"a": pd.DataFrame({"b": [1]})}, tmp_path / "file")


def test_what_is_missing_is_null() -> None:
    frame = pd.DataFrame({"a": [1.5, float("nan")], "b": ["x", None], "c": [float("inf"), 2.0]})
    assert records(frame) == [{"a": 1.5, "b": "x", "c": None}, {"a": None, "b": None, "c": 2.0}]
