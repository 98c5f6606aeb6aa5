"""The one validator: what is read of a table is what a recorder could have written, or the row that is not is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmkern.errors import RunFolderError
from llmkern.runfolder.schema import IDS, RULES, TABLES, plain_type


def check(name: str, table: pa.Table, file: Path) -> None:
    """Raise RunFolderError with file, row and value where a row of *table* (any columns of table *name*) cannot be.

    Rows are counted from 1 in the order of *table*.
    """
    for row, what in _problems(name, table):
        raise RunFolderError(
            f"{file}, row {row + 1}: {what}; the file was changed or damaged after it was recorded: restore it, or "
            "trace the run again."
        )


def conform(name: str, table: pa.Table, file: Path) -> pa.Table:
    """Return *table* with the types that table *name* has; raises RunFolderError where a value does not fit them."""
    schema = TABLES[name]
    columns = []
    for field in (schema.field(column) for column in table.column_names):
        column = table[field.name]
        if column.type != field.type:
            try:
                column = column.cast(plain_type(field.type)).cast(field.type)
            except (pa.ArrowException, ValueError) as error:
                reason = str(error).strip().splitlines()[0][:120]
                raise RunFolderError(
                    f"{file} holds {column.type} in column {field.name}, which is {plain_type(field.type)} ({reason}): "
                    "it was not written by llmkern; restore it, or trace the run again."
                ) from error
        if field.name in IDS and column.null_count:
            column = pc.fill_null(column, 0)
        columns.append(column)
    return pa.Table.from_arrays(columns, names=table.column_names)


def _problems(name: str, table: pa.Table) -> Iterator[tuple[int, str]]:
    rules, have = RULES[name], set(table.column_names)
    for column in rules.needed:
        if column in have and table[column].null_count:
            yield _first(pc.is_null(table[column])), f"{column} is empty"
    for field in table.schema:
        if pa.types.is_floating(field.type) and table.num_rows:
            bad = pc.invert(pc.fill_null(pc.is_finite(table[field.name]), True))
            if pc.any(bad).as_py():
                yield _first(bad), f"{field.name} is {table[field.name][_first(bad)].as_py()}"
    ends = {}
    for column in {*(rules.least or {}), *(rules.most or {})} & have:
        # The extremes of a column take a tenth of the time of a comparison row by row.
        ends[column] = pc.min_max(table[column]).as_py()
    for bounds, beyond, words in ((rules.least, pc.less, "below"), (rules.most, pc.greater, "above")):
        for column, limit in (bounds or {}).items():
            if column in have:
                bad = _beyond(table[column], ends[column], limit, beyond)
                if bad is not None:
                    yield bad, f"{column} is {table[column][bad].as_py()}, {words} {limit:,}"
    if rules.span and {"start_ns", "end_ns"} <= have:
        bad = pc.fill_null(pc.greater(table["start_ns"], table["end_ns"]), False)
        if pc.any(bad).as_py():
            row = _first(bad)
            start, end = table["start_ns"][row].as_py(), table["end_ns"][row].as_py()
            yield row, f"it ends {start - end:,} ns before it starts (a clock that was set back?)"
    if rules.unique and rules.unique[0] in have:
        yield from _repeated(table, [column for column in rules.unique if column in have])
    if rules.rising and {rules.rising[0], rules.rising[1], *rules.rising[2]} <= have:
        yield from _falling(table, *rules.rising)


def _first(mask: Any) -> int:
    return int(pc.index(mask, True).as_py())


def _beyond(column: pa.ChunkedArray, ends: dict[str, Any], limit: float, beyond: Any) -> int | None:
    """Return the row of the first value of *column*, whose extremes are *ends*, beyond *limit*, None without one."""
    extreme = ends["min"] if beyond is pc.less else ends["max"]
    if extreme is None or not (extreme < limit if beyond is pc.less else extreme > limit):
        return None
    return _first(pc.fill_null(beyond(column, limit), False))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return *column* as integers in which equal values are equal."""
    if pa.types.is_integer(column.type):
        return (column.fill_null(-1) if column.null_count else column).to_numpy()
    plain = column.combine_chunks()
    plain = plain if pa.types.is_dictionary(plain.type) else plain.dictionary_encode()
    return plain.indices.fill_null(-1).to_numpy(zero_copy_only=False)


def _repeated(table: pa.Table, columns: list[str]) -> Iterator[tuple[int, str]]:
    first = _numbers(table[columns[0]])
    keys = [first, *(_numbers(table[column].unify_dictionaries()) for column in columns[1:])]
    named = first > 0
    rows = None if named.all() else np.flatnonzero(named)
    if rows is not None:
        keys = [key[rows] for key in keys]
    if _rises(keys[0], keys[1:]):
        return
    rows = np.arange(len(first)) if rows is None else rows
    order = np.lexsort(keys)
    same = np.ones(max(0, len(rows) - 1), bool)
    for key in keys:
        same &= key[order][1:] == key[order][:-1]
    if same.any():
        row = int(rows[order[1:][np.argmax(same)]])
        yield row, f"{columns[0]} {first[row]} comes twice"


def _rises(values: np.ndarray, groups: list[np.ndarray]) -> bool:
    """Whether *values* only rise within each of *groups*, each of which is there in one piece: so recorders write."""
    rises = values[1:] > values[:-1]
    if not groups or not len(values):
        return bool(rises.all())
    new = np.zeros(len(rises), bool)
    for group in groups:
        new |= group[1:] != group[:-1]
    pieces = np.append(0, np.flatnonzero(new) + 1)
    return bool((rises | new).all()) and len(set(zip(*(g[pieces].tolist() for g in groups), strict=True))) == len(
        pieces
    )


def _falling(table: pa.Table, value: str, time: str, groups: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    values, times = (table[column].to_numpy() for column in (value, time))
    keys = [_numbers(table[column].unify_dictionaries()) for column in groups]
    order = np.lexsort([values, times, *keys])
    together = np.ones(max(0, len(order) - 1), bool)
    for key in keys:
        together &= key[order][1:] == key[order][:-1]
    falls = together & (values[order][1:] < values[order][:-1])
    if falls.any():
        at = int(np.argmax(falls))
        row, before = int(order[at + 1]), int(order[at])
        yield row, f"{value} falls from {values[before]:,} to {values[row]:,}, and this counter only rises"
