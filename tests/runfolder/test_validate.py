"""Tables that no recorder wrote: the sentence names file, row and value (R21, U10)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkern.errors import RunFolderError
from llmkern.runfolder import RunFolder
from tests.synthetic import synthetic_run
from tests.tables import sign

Change = Callable[[list[Any]], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run(tmp_path_factory.mktemp("validate") / "run", rounds=3)[0].path


def changed(made: Path, tmp_path: Path, table: str, column: str, values: Any) -> RunFolder:
    """Return a copy of the run with *values* (of the old ones) in one column, signed as if llmkern had written it."""
    run = tmp_path / "run"
    run.mkdir()
    for file in made.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    file = run / f"{table}.parquet"
    old = pq.read_table(file)
    new = values(old[column].to_pylist())
    array = new if isinstance(new, pa.Array) else pa.array(new)
    pq.write_table(old.set_column(old.column_names.index(column), column, array), file)
    sign(run, table)
    return RunFolder(run)


def at(row: int, value: Any) -> Change:
    return lambda old: [*old[:row], value(old[row]) if callable(value) else value, *old[row + 1 :]]


@pytest.mark.parametrize(
    ("table", "column", "values", "message"),
    [
        ("kernels", "end_ns", at(4, 0), r"kernels\.parquet, row 5: .*ends .* ns before it starts"),
        ("kernels", "start_ns", at(2, -5), r"row 3: start_ns is -5, below 0"),
        ("kernels", "end_ns", at(2, 2**63 - 1), r"row 3: end_ns is 9223372036854775807, above"),
        ("kernels", "name", at(1, None), r"row 2: name is empty"),
        ("kernels", "device", at(1, -1), r"row 2: device is -1, below 0"),
        ("kernels", "start_ns", lambda old: [float("nan"), *map(float, old[1:])], r"holds double in column start_ns"),
        ("kernels", "start_ns", lambda old: [str(v) + "x" for v in old], r"holds string in column start_ns"),
        ("launches", "correlation_id", lambda old: [old[1], *old[1:]], r"row 2: correlation_id \d+ comes twice"),
        (
            "ranges",
            "end_ns",
            at(7, lambda v: v - 1_799_000_000_000),
            r"row 8: it ends .* before it starts .a clock that was set back",
        ),
        ("ranges", "token", at(0, -3), r"row 1: token is -3, below 0"),
        ("ranges", "new_tokens", at(0, 0), r"row 1: new_tokens is 0, below 1"),
        ("energy", "energy_mj", at(9, 0), r"row 10: energy_mj falls from .* to 0"),
        ("energy", "energy_mj", at(9, None), r"row 10: energy_mj is empty"),
        ("power", "power_mw", at(3, -7), r"row 4: power_mw is -7, below 0"),
        ("power", "temperature_c", lambda old: [40_000] * len(old), r"row 1: temperature_c is 40000, above 300"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_row(
    made: Path, tmp_path: Path, table: str, column: str, values: Change, message: str
) -> None:
    run = changed(made, tmp_path, table, column, values)
    with pytest.raises(RunFolderError, match=message):
        run.table(table)


def test_a_row_is_told_as_it_is_in_the_file_and_not_as_it_was_chosen(made: Path, tmp_path: Path) -> None:
    run = changed(made, tmp_path, "ranges", "end_ns", lambda old: [*old[:-1], 0])
    rows = pq.read_metadata(run.path / "ranges.parquet").num_rows
    with pytest.raises(RunFolderError, match=rf"ranges\.parquet, row {rows}: it ends"):
        run.table("ranges", where={"pass": "time"})


def test_whole_numbers_that_another_writer_widened_are_read(made: Path, tmp_path: Path) -> None:
    run = changed(made, tmp_path, "kernels", "device", lambda old: pa.array(old, pa.int64()))
    assert set(run.table("kernels")["device"]) == {0}
    assert run.table("kernels")["device"].dtype == np.int32


def test_what_recorders_write_passes(made: Path) -> None:
    run = RunFolder(made)
    for table in ("kernels", "launches", "ranges", "energy", "power"):
        assert len(run.table(table)) > 0
