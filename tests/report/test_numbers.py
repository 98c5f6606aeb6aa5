"""Every number that the terminal prints is in the JSON of the same report, and in the files of the run."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from llmkern.explain import Explanation
from llmkern.explain.statement import state
from llmkern.explain.tables import run_tables
from llmkern.report.console import PlainConsole
from llmkern.report.document import report_document
from llmkern.report.terminal import print_report
from tests.recorded import DATA, recorded
from tests.tables import write_table

ROOT = Path(__file__).parents[2]
# What a printed unit is in that of the JSON.
UNITS = {"s": ("s", 1.0), "ms": ("s", 1e-3), "µs": ("s", 1e-6), "kJ": ("j", 1e3), "J": ("j", 1.0), "mJ": ("j", 1e-3)}
UNITS |= {"µJ": ("j", 1e-6), "W": ("w", 1.0), "%": ("share", 0.01), "GiB": ("bytes", 2.0**30), "": ("", 1.0)}
SUFFIXES = {"_ns": ("s", 1e-9), "_ms": ("s", 1e-3), "_s": ("s", 1.0), "_j": ("j", 1.0), "_w": ("w", 1.0)}
SUFFIXES |= {"_share": ("share", 1.0), "_bytes": ("bytes", 1.0)}
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\] (ms|µs|s|kJ|J|mJ|µJ|W|GiB)\b")
SINGLE = re.compile(rf"(?<![\w.<])({NUMBER})(?:(%)| (ms|µs|s|kJ|J|mJ|µJ|W|GiB)\b)?(?![\w.>])")


def document(name: str) -> dict[str, Any]:
    explanation = Explanation(recorded(name))
    return report_document(state(explanation), run_tables(explanation))


def printed(name: str) -> str:
    out = io.StringIO()
    print_report(state(Explanation(recorded(name))), PlainConsole(file=out, width=400))
    return out.getvalue()


def known(value: Any, key: str = "", found: dict[str, list[float]] | None = None) -> dict[str, list[float]]:
    """Return the numbers of a JSON document by their unit, which the last name above them says."""
    found = defaultdict(list) if found is None else found
    if isinstance(value, dict):
        for name, inner in value.items():
            known(inner, key if name in ("value", "low", "high") else name, found)
    elif isinstance(value, list):
        for inner in value:
            known(inner, key, found)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        unit, factor = next(((u, f) for s, (u, f) in SUFFIXES.items() if key.endswith(s)), ("", 1.0))
        unit = "share" if key in ("share", "saves") else unit
        found[unit].append(value * factor)
        # tokens_per_s is a number of tokens.
        if key.endswith("_per_s"):
            found[""].append(value)
    return found


def sentences(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in sentences(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in sentences(inner)]
    return [value] if isinstance(value, str) else []


def missing(text: str, told: dict[str, Any]) -> list[str]:
    """Return what of the printed *text* is neither in a sentence of *told* nor one of its numbers, as printed."""
    numbers = known(told)
    for sentence in sorted(sentences(told), key=len, reverse=True):
        # A version may look like a number.
        if len(sentence) > 6:
            text = text.replace(sentence, " ")
    lost = []

    def look(printed: str, unit: str) -> None:
        plain = printed.replace(",", "")
        name, factor = UNITS[unit]
        places = len(plain.partition(".")[2])
        room = 0.5001 * 10.0**-places * factor
        if not any(abs(value - float(plain) * factor) <= room for value in numbers[name]):
            lost.append(f"{printed} {unit}".strip())

    def of_interval(match: re.Match[str]) -> str:
        for part in match.groups()[:3]:
            look(part, match[4])
        return " "

    for match in SINGLE.finditer(INTERVAL.sub(of_interval, text)):
        look(match[1], match[2] or match[3] or "")
    return lost


def test_every_printed_number_is_in_the_json() -> None:
    assert missing(printed("int8"), document("int8")) == []


@pytest.mark.parametrize("part", ["phases", "predictions", "shown", "books", "findings", "answer"])
def test_a_number_that_is_not_there_is_missed(part: str) -> None:
    told = document("int8")
    # What is also there as a table would make up for the loss.
    assert missing(printed("int8"), {**told, part: None, "tables": None}) != []


def test_a_few_lines_of_pandas_find_the_same_numbers(tmp_path: Path) -> None:
    run, told = tmp_path / "run", tmp_path / "report.json"
    shutil.copytree(DATA / "h100-qwen-7b-int8", run)
    frame = recorded("int8").table()
    write_table(run, "attribution", {column: frame[column].tolist() for column in frame.columns})
    told.write_text(json.dumps(document("int8")))
    script = ROOT / "tests" / "recompute.py"
    assert not re.search(r"^\s*(import|from) (?!json|math|sys|pathlib|numpy|pandas)", script.read_text(), re.MULTILINE)
    done = subprocess.run(
        [sys.executable, str(script), str(run), str(told)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 400
