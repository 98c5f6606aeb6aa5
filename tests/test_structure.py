"""The house as CONTRIBUTING describes it: who may import whom, how long files and lists of parameters may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llmkern"
MOST_LINES, MOST_PARAMETERS = 400, 5


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(*names: str) -> list[Path]:
    return [file for name in names for file in sorted((PACKAGE / name).rglob("*.py"))]


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("record", ("attribute", "explain", "report", "exchange", "commands", "session")),
        ("runfolder", ("record", "attribute", "explain", "report", "exchange", "commands", "session", "workload")),
        ("workload", ("attribute", "explain", "report", "exchange", "commands", "session")),
        ("attribute", ("record", "workload", "report", "commands", "session")),
        ("explain", ("record", "workload", "report", "commands", "session")),
        # What a report says is in the statement: it renders that and reads no table.
        ("report", ("record", "workload", "session", "attribute", "runfolder.reader", "runfolder.RunFolder")),
        ("exchange", ("record", "workload", "commands", "session")),
        ("serve", ("explain", "report", "exchange", "commands", "evaluate", "kernels")),
        ("study", ("explain", "report", "exchange", "commands", "evaluate", "kernels")),
        ("evaluate", ("explain", "report", "exchange", "commands", "session")),
        (
            "kernels",
            ("record", "attribute", "explain", "report", "exchange", "commands", "session", "workload", "evaluate"),
        ),
    ],
)
def test_rooms_look_one_way_only(room: str, never: tuple[str, ...]) -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in rooms(room)
        if file.name != "__main__.py"
        for name in imported(file)
        for other in never
        if name == f"llmkern.{other}" or name.startswith(f"llmkern.{other}.")
    ]
    assert wrong == []


# What makes one number of several: that is done before a report is asked for.
ANALYSIS = {
    "groupby",
    "mean",
    "median",
    "std",
    "var",
    "quantile",
    "percentile",
    "cumsum",
    "merge",
    "interp",
    "bincount",
}


def test_a_report_reads_nothing_and_computes_nothing() -> None:
    wrong = []
    for file in rooms("report"):
        wrong += [
            f"{file.name} imports {name}"
            for name in imported(file)
            if name.split(".")[0] in ("numpy", "scipy", "pyarrow")
        ]
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ANALYSIS:
                wrong.append(f"{file.name}:{node.lineno} calls {node.func.attr}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "table":
                wrong.append(f"{file.name}:{node.lineno} reads a table")
    assert wrong == []


def test_constants_of_several_rooms_are_in_the_vocabulary() -> None:
    wrong = []
    for file in [*rooms("exchange"), PACKAGE / "text.py"]:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("llmkern.attribute", "llmkern.record")
            ):
                wrong += [f"{file.name} imports {a.name}" for a in node.names if a.name.isupper()]
    assert wrong == []


def test_no_function_of_the_recorder_takes_more_than_five_parameters() -> None:
    wrong = []
    for file in rooms("record"):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own = node.args
                names = [a.arg for a in (*own.posonlyargs, *own.args, *own.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                if count > MOST_PARAMETERS:
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name} takes {count}")
    assert wrong == []


def test_nobody_outside_of_the_devices_asks_for_the_kind_of_device() -> None:
    asks = re.compile(r"""\bkind["'\]]*\s*[!=]=\s*["'](?:cuda|cpu)["']|device_kind""")
    files = [f for f in PACKAGE.rglob("*.py") if PACKAGE / "record" / "device" not in f.parents]
    assert [str(f.relative_to(ROOT)) for f in files if asks.search(f.read_text())] == []


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    places = ("llmkern", "kernels", "csrc", "tests", "bench", "docs")
    kinds = (".py", ".cu", ".cuh", ".cpp", ".h", ".c", ".md", ".j2", ".css", ".js")
    files = [f for place in places for f in (ROOT / place).rglob("*") if f.suffix in kinds]
    files += [*ROOT.glob("*.md"), *ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "CMakeLists.txt"]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert {name: count for name, count in lengths.items() if count > MOST_LINES} == {}


def test_help_imports_nothing_heavy() -> None:
    """What takes the time is what is imported; how long that is depends on the machine, what it is does not."""
    program = "import sys; from llmkern.commands import cli; cli.main(['--help'], standalone_mode=False); "
    program += "print(*sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "trace" in done.stdout
    heavy = {"torch", "transformers", "numpy", "pandas", "pyarrow", "scipy", "rich", "altair", "msgspec"}
    assert heavy & set(done.stderr.split()) == set()


def test_help_comes_at_once() -> None:
    """Within 0.3 s, and on a slow machine within four times what Python and click alone take."""

    def seconds(*arguments: str) -> float:
        took = []
        for _ in range(5):
            begin_s = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True, cwd=ROOT)
            took.append(time.perf_counter() - begin_s)
        return min(took)

    assert seconds("-m", "llmkern", "--help") <= max(0.3, 4 * seconds("-c", "import click"))
