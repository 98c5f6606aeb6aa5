"""The report as it is printed in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmkern.estimate import Estimate
from llmkern.explain.statement import Part, PhaseStatement, Statement
from llmkern.report.heading import heading
from llmkern.report.why import print_findings, print_predictions
from llmkern.text import count, elided, gap_name, percent, quantity, short_name, signed, with_interval

_LEAST_NAME, _TITLES_ROOM = 10, 6
# Two phases with their intervals fit beside one another.
_WIDE = 100


def print_report(statement: Statement, console: Console) -> None:
    """Print the report of a run."""
    uncertain = list(statement.doubts)
    console.print()
    for title in heading(statement.facts):
        console.print(title, highlight=False)
    if not statement.complete:
        console.print(Text(uncertain.pop(0), style="bold yellow"))
    console.print()
    if statement.phases:
        console.print(" ".join(statement.answer), style="bold")
        console.print()
        console.print(_phase_table(statement))
    if len(statement.devices):
        console.print()
        console.print(_device_table(statement))
    if statement.note:
        if statement.phases:
            console.print()
        console.print(statement.note)
        console.print(_weighed_table(statement))
    if statement.phases:
        print_findings(statement, console)
        print_predictions(statement, console)
        for key, name in (("kind", "kinds"), ("cause", "causes")):
            if name in statement.shown:
                for phases in _beside(statement.phases, console.width):
                    console.print()
                    console.print(_side_by_side(key, phases, statement.shown[name]))
        for phase in reversed(statement.phases):
            for table in (_kernels, _gaps, _operators):
                made = table(statement, phase, console.width)
                if made is not None:
                    console.print()
                    console.print(made)
    console.print()
    console.print(Text("Books and sensors", style="bold"))
    for book in statement.books:
        console.print(Padding(book.sentence, (0, 0, 0, 2)), highlight=False)
    console.print()
    console.print(Text("What is uncertain", style="bold"))
    for line in uncertain:
        console.print(Padding(f"• {line}", (0, 0, 0, 2)), highlight=False)
    console.print(f"\nRun folder: {statement.folder}", highlight=False, soft_wrap=True)


def _phase_table(statement: Statement) -> Table:
    table = Table(title="Per phase", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    phases = statement.phases
    for phase in phases:
        table.add_column(f"{phase.phase}, per {phase.unit}", justify="right")
    device, things = statement.facts.device.called, statement.facts.device.launches
    rows: tuple[tuple[str, Callable[[PhaseStatement], str]], ...] = (
        ("latency", lambda p: with_interval(p.latency_s, "s")),
        ("tokens/s", lambda p: "–" if p.tokens_per_s is None else f"{p.tokens_per_s:,.1f}"),
        ("energy", lambda p: with_interval(p.energy_j, "J")),
        ("J/token", lambda p: with_interval(p.energy_per_token_j, "J")),
        ("mean power", lambda p: quantity(p.mean_w, "W")),
        (f"{device} busy", lambda p: percent(p.busy_share)),
        (f"{things} launched", lambda p: count(p.launches)),
        (f"time in {things}", lambda p: quantity(p.busy_s, "s")),
        ("time in gaps", lambda p: with_interval(p.gap_s, "s")),
        (f"energy in {things}", lambda p: _part(p.kernels)),
        ("energy in gaps", lambda p: _part(p.gaps)),
        ("residual", lambda p: _part(p.residual)),
        ("idle floor", lambda p: with_interval(p.floor_w, "W")),
        ("busy host adds", lambda p: with_interval(p.host_adds_w, "W")),
        ("recorder's effect", lambda p: _effect(p.recorder_effect)),
        ("of the energy, HBM", lambda p: with_interval(p.memory_j, "J")),
        ("host CPU package", lambda p: with_interval(p.host_j, "J")),
        ("host RAM", lambda p: "–" if p.ram_j is None else f"{quantity(p.ram_j, 'J')} (estimate)"),
    )
    for name, told in rows:
        values = [told(phase) for phase in phases]
        # What no sensor on this machine could tell is said once, below, and not in a row of dashes.
        if any(value != "–" for value in values):
            table.add_row(name, *values)
    return table


def _device_table(statement: Statement) -> Table:
    """Return the devices of a capture of several, every phase in a row; the one that this report is of is marked."""
    table = Table(title="Devices, per unit", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for title in ("phase", "GPU", "time", "busy", "collectives", "gaps", "kernels", "file"):
        fixed = title in ("phase", "file")
        table.add_column(title, justify="left" if fixed else "right", no_wrap=True, overflow="ellipsis")
    own = statement.facts.device.index
    for row in statement.devices.to_dict("records"):
        times = [quantity(row[name], "s") for name in ("latency_s", "busy_s", "communication_s", "gap_s")]
        name = f"{row['gpu']}{'*' if row['gpu'] == own else ''}"
        table.add_row(str(row["phase"]), name, *times, count(row["launches"]), str(row["file"]))
    return table


def _part(part: Part | None) -> str:
    return "–" if part is None else f"{with_interval(part.energy_j, 'J')} ({percent(part.share)})"


def _effect(effect: Estimate | None) -> str:
    if effect is None or effect.low is None or effect.high is None:
        return "–"
    return signed(effect)


def _weighed_table(statement: Statement) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("phase", "latency", "energy"):
        table.add_column(title, justify="left" if title == "phase" else "right")
    for weight in statement.only_weighed:
        unit = f"{weight.phase}, per {weight.unit}"
        table.add_row(unit, with_interval(weight.latency_s, "s"), with_interval(weight.energy_j, "J"))
    return table


def _beside(phases: tuple[PhaseStatement, ...], width: int) -> list[list[PhaseStatement]]:
    """Return which phases a table has beside one another: all, or on a narrow terminal one, the last first."""
    return [list(phases)] if width >= _WIDE else [[phase] for phase in reversed(phases)]


def _side_by_side(key: str, phases: list[PhaseStatement], shown: pd.DataFrame) -> Table:
    """Return the rows of *shown* by *key*, *phases* side by side, in the order of the last."""
    title = {"kind": "Kernels by kind", "cause": "Gaps by cause"}[key]
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(key)
    for phase in phases:
        table.add_column(phase.phase, justify="right")
        for column in _columns(phase)[1:]:
            table.add_column(column, justify="right")
    rows = [{str(row[key]): row for row in _rows(shown, phase)} for phase in phases]
    for name in dict.fromkeys(name for found in reversed(rows) for name in found):
        cells: list[str] = []
        for phase, found in zip(phases, rows, strict=True):
            row = found.get(name)
            cells += _time_and_energy(row, phase) if row is not None else ("",) * len(_columns(phase))
        table.add_row(name, *cells)
    return table


def _rows(shown: pd.DataFrame, phase: PhaseStatement) -> list[dict[Any, Any]]:
    return shown[shown["phase"] == phase.phase].to_dict("records")


def _kernels(statement: Statement, phase: PhaseStatement, width: int) -> Table:
    del width
    title = f"Top kernels of {phase.phase}, per {phase.unit}"
    return _named(title, "kernel", _rows(statement.shown["kernels"], phase), phase)


def _named(title: str, what: str, rows: list[dict[Any, Any]], phase: PhaseStatement) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    table.add_column(what, ratio=1, no_wrap=True, overflow="ellipsis")
    for column in ("count", "each", *_columns(phase)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        before, arrow, after = str(row["name"]).partition(" → ")
        name = gap_name(before, after) if arrow else short_name(before)
        name = f"{row['others']} others" if row["others"] else name
        table.add_row(name, count(row["launches"]), quantity(row["each_s"], "s"), *_time_and_energy(row, phase))
    if not rows:
        table.add_row("none")
    return table


def _gaps(statement: Statement, phase: PhaseStatement, width: int) -> Table:
    """Return where the host was late, or, where that is not known, between which kernels the device was idle."""
    shown = statement.shown["gaps"]
    rows = _rows(shown, phase)
    if "cause" not in shown:
        return _named(f"Top gaps of {phase.phase}, per {phase.unit}", "between", rows, phase)
    title = f"Top gaps of {phase.phase}, per {phase.unit}: what the host was at"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    table.add_column("cause", no_wrap=True)
    table.add_column("operator", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("module", ratio=1, no_wrap=True, overflow="ellipsis")
    for column in ("count", *_columns(phase)):
        table.add_column(column, justify="right", no_wrap=True)
    cells = [
        (*_operator_and_module(row), str(row["cause"]), count(row["launches"]), *_time_and_energy(row, phase))
        for row in rows
    ]
    for op, module, cause, *numbers in _fitted(cells, width):
        table.add_row(cause, op, module, *numbers)
    return table


def _fitted(cells: list[tuple[str, ...]], width: int) -> list[tuple[str, ...]]:
    """Return *cells*, whose first two are names, with these cut in their middle to what the others leave of *width*."""
    if not cells:
        return cells
    others = sum(1 + max(len(row[i]) for row in cells) for i in range(2, len(cells[0])))
    # A title may be wider than what stands under it.
    room = max(2 * _LEAST_NAME, width - others - 2 - _TITLES_ROOM)
    longest = [max(len(row[i]) for row in cells) for i in range(2)]
    first = min(longest[0], max(room // 2, room - longest[1]))
    return [(elided(row[0], first), elided(row[1], max(_LEAST_NAME, room - first)), *row[2:]) for row in cells]


def _operator_and_module(row: dict[Any, Any]) -> tuple[str, str]:
    # Eighty columns have no room for what all of them begin with.
    name = str(row["op"]).removeprefix("aten.").removeprefix("bitsandbytes.").removesuffix(".default")
    return name, str(row["module"]).removeprefix("model.layers.")


def _operators(statement: Statement, phase: PhaseStatement, width: int) -> Table | None:
    if "operators" not in statement.shown:
        return None
    title = f"Top operators of {phase.phase}, per {phase.unit}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    table.add_column("operator", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("module", ratio=1, no_wrap=True, overflow="ellipsis")
    for column in ("kernels", *_columns(phase)):
        table.add_column(column, justify="right", no_wrap=True)
    cells = [
        (*_operator_and_module(row), count(row["launches"]), *_time_and_energy(row, phase))
        for row in _rows(statement.shown["operators"], phase)
    ]
    for row in _fitted(cells, width):
        table.add_row(*row)
    return table


def _columns(phase: PhaseStatement) -> tuple[str, ...]:
    return ("time", "share") if phase.kernels is None else ("time", "energy", "share")


def _time_and_energy(row: dict[Any, Any], phase: PhaseStatement) -> tuple[str, ...]:
    """Return the values of _columns: energy with its interval where it has one, else the share of the phase's time."""
    time, share = quantity(row["time_s"], "s"), percent(row["share"], 1)
    if phase.kernels is None:
        return time, share
    low, high = row["low_j"], row["high_j"]
    energy = Estimate(row["energy_j"], None if low != low else low, None if high != high else high)
    return time, with_interval(energy, "J"), share
