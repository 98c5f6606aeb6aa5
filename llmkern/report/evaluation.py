"""An evaluation in the terminal and as CSV: the answer first, then speed and energy, then what the kernels take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmkern.evaluate.verdict import Line, Spread, Statement
from llmkern.report.html import is_page
from llmkern.report.records import check_csv_folder, write_csv
from llmkern.runfolder.place import check_file_target
from llmkern.text import elided, short_name

_NAME = 15
_KERNEL = 34
UNKNOWN = "–"


def check_targets(csv_folder: Path | None, page: Path | None) -> None:
    """Refuse a page or tables where they may not be written, before anything is measured; raises UsageError."""
    if csv_folder is not None:
        check_csv_folder(csv_folder)
    if page is not None:
        check_file_target(page, is_page, force=True, option="--html")


def print_evaluation(statement: Statement, console: Console) -> None:
    """Print *statement*; the verdicts on the user's candidates are its first lines."""
    for verdict in statement.verdicts:
        console.print(verdict.sentence, style=None if verdict.right else "bold red")
    if statement.verdicts:
        console.print()
    timed = [line for line in statement.lines if line.cold_us is not None]
    console.print(roof_sentence(statement))
    for key, lines in by_case(statement).items():
        console.print()
        console.print(key, style="bold")
        console.print(_case_table(lines, bool(timed)))
    if statement.fits:
        console.print()
        console.print("t = t0 + bytes / rate, over the shapes", style="bold")
        console.print(_fit_table(statement))
    if timed:
        console.print()
        console.print("What a call launches", style="bold")
        console.print(_resource_table(timed))
    if statement.in_model:
        console.print()
        console.print(f"Decode of {statement.evaluation.request.in_model}", style="bold")
        console.print(_model_table(statement))
    for doubt in statement.doubts:
        console.print(f"* {doubt}")


def roof_sentence(statement: Statement) -> str:
    """Return what the device could do at best, in one line."""
    roof = statement.evaluation.roof
    if roof is None:
        return f"{statement.evaluation.device}."
    parts = []
    if roof.sheet_bytes_per_s is not None:
        parts.append(f"data sheet {roof.sheet_bytes_per_s / 1e12:.2f} TB/s")
    if roof.read_bytes_per_s is not None:
        parts.append(f"read {roof.read_bytes_per_s / 1e12:.2f}")
    parts.append(f"copy {roof.copy_bytes_per_s / 1e12:.2f}")
    if roof.empty_us is not None:
        parts.append(f"an empty kernel in a graph {roof.empty_us:.2f} µs")
    for name, energy, moved in (
        ("a copy", roof.copy_energy, roof.copied_bytes),
        ("a read", roof.read_energy, roof.read_bytes),
    ):
        if energy is not None:
            value, low, high = (mj / 1e3 / (moved / 1e9) for mj in energy.total_mj)
            parts.append(f"{name} {value:.3f} [{low:.3f}, {high:.3f}] J/GB")
    return f"{statement.evaluation.device}: {', '.join(parts)}."


def by_case(statement: Statement) -> dict[str, list[Line]]:
    """Return the lines of each case, the fastest first, what is not right or not timed last."""
    found: dict[str, list[Line]] = {}
    for line in statement.lines:
        case = line.row.case
        label = f" ({case.label})" if case.label else ""
        found.setdefault(f"{case.format} {case.n}x{case.k}, M = {case.m}{label}", []).append(line)
    for lines in found.values():
        lines.sort(key=lambda x: (not x.right, x.cold_us.value if x.cold_us is not None else 0.0))
    return found


def _table(*titles: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < left else "right", no_wrap=index >= left)
    return table


def _case_table(lines: list[Line], timed: bool) -> Table:
    if not timed:
        table = _table("kernel", "rel. L2", "matched")
        for line in lines:
            rel_l2, matched = accuracy(line)
            table.add_row(_name(line), rel_l2, matched)
        return table
    table = _table("kernel", "rel. L2", "µs cold", "warm", "sheet", "read", "mJ/call", "J/GB")
    for line in lines:
        rel_l2, _ = accuracy(line)
        table.add_row(
            *(_name(line), rel_l2, spread_text(line.cold_us), number(line.warm_us, 1)),
            *(
                percent(line.share_of_sheet),
                percent(line.share_of_read),
                energy_text(line),
                number(line.joules_per_gb, 3),
            ),
        )
    return table


def _name(line: Line) -> Text:
    name = Text(elided(line.row.candidate, _NAME))
    return name if line.right else name.append(" wrong", style="red")


def accuracy(line: Line) -> tuple[str, str]:
    """Return the largest relative L2 and the smallest matched share of what was tried."""
    checks = [check for check in (*line.row.checks, line.row.after) if check is not None and check.values]
    known = [check for check in checks if check.rel_l2 is not None]
    if not checks or len(known) < len(checks):
        return UNKNOWN, UNKNOWN
    worst = max(check.rel_l2 for check in known if check.rel_l2 is not None)
    return f"{worst:.1e}", f"{min(check.matched for check in known if check.matched is not None):.1%}"


def spread_text(spread: Spread | None) -> str:
    """Return a median with its 5th and 95th percentile."""
    if spread is None:
        return UNKNOWN
    digits = 2 if spread.value < 100 else 1
    return f"{spread.value:.{digits}f} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"


def energy_text(line: Line) -> str:
    """Return the energy of a call with its interval."""
    if line.row.energy is None:
        return UNKNOWN
    value, low, high = line.row.energy.total_mj
    digits = 2 if value >= 1 else 3
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def _fit_table(statement: Statement) -> Table:
    table = _table("kernel", "format", "M", "t0 µs", "TB/s", "shapes", "largest misfit", left=2)
    for fit in statement.fits:
        table.add_row(
            *(
                elided(fit.candidate, _NAME),
                fit.format,
                str(fit.m),
                f"{fit.t0_us:.2f}",
                f"{fit.bytes_per_s / 1e12:.2f}",
            ),
            *(str(fit.shapes), f"{fit.misfit:.0%}"),
        )
    return table


def resources(lines: list[Line]) -> list[dict[str, Any]]:
    """Return a row per contender, case and kernel: launches and what it takes of a multiprocessor."""
    return [
        {
            "candidate": line.row.candidate,
            "case": line.row.case.key,
            "kernel": kernel.name,
            "launches": kernel.launches,
            "us": kernel.us,
            "grid": "x".join(map(str, kernel.grid)),
            "block": "x".join(map(str, kernel.block)),
            "registers": kernel.registers,
            "spilled_bytes": kernel.spilled_bytes,
            "shared_bytes": kernel.shared_bytes,
            "occupancy": kernel.occupancy,
        }
        for line in lines
        if line.row.latency is not None
        for kernel in line.row.latency.kernels
    ]


def _resource_table(lines: list[Line]) -> Table:
    table = _table("kernel", "launches", "reg.", "spill B", "shared B", "occup.")
    seen = set()
    for row in resources(lines):
        shown = (
            f"{elided(row['candidate'], _NAME)}: {elided(short_name(row['kernel']), _KERNEL)}",
            *(f"{row['launches']:g}", str(row["registers"])),
            *(UNKNOWN if row["spilled_bytes"] is None else str(row["spilled_bytes"]), str(row["shared_bytes"])),
            percent(row["occupancy"]),
        )
        if shown not in seen:
            seen.add(shown)
            table.add_row(*shown)
    return table


def _model_table(statement: Statement) -> Table:
    table = _table("layers", "ms/token", "J/token", "logits' rel. L2")
    for row in statement.in_model:
        joule = UNKNOWN if row.token_j is None else "{:.3f} [{:.3f}, {:.3f}]".format(*row.token_j)
        table.add_row(row.name, "{:.2f} [{:.2f}, {:.2f}]".format(*row.token_ms), joule, number(row.logits_rel_l2, 4))
    return table


def tables(statement: Statement) -> dict[str, pd.DataFrame]:
    """Return the tables of an evaluation as frames, units in the names."""
    cases, checks = [], []
    for line in statement.lines:
        case, energy = line.row.case, line.row.energy
        where = {"candidate": line.row.candidate, "format": case.format, "n": case.n, "k": case.k, "m": case.m}
        total = (None, None, None) if energy is None else energy.total_mj
        cold = line.cold_us
        cases.append(
            {
                **where,
                "label": case.label,
                "right": line.right,
                "judgement": line.judgement,
                "cold_us": None if cold is None else cold.value,
                "cold_low_us": None if cold is None else cold.low,
                "cold_high_us": None if cold is None else cold.high,
                "warm_us": line.warm_us,
                "share_of_sheet": line.share_of_sheet,
                "share_of_read": line.share_of_read,
                "energy_mj": total[0],
                "energy_low_mj": total[1],
                "energy_high_mj": total[2],
                "joules_per_gb": line.joules_per_gb,
                "sm_clock_mhz": None if line.row.latency is None else line.row.latency.sm_clock_mhz,
            }
        )
        for check in (*line.row.checks, *([line.row.after] if line.row.after is not None else [])):
            checks.append(
                {
                    **where,
                    "inputs": check.name,
                    "rel_l2": check.rel_l2,
                    "matched": check.matched,
                    "not_finite": check.not_finite,
                    "unwritten": check.unwritten,
                    "values": check.values,
                }
            )
    verdicts = pd.DataFrame([vars(v) for v in statement.verdicts], columns=["name", "sentence", "right"])
    return {
        "verdicts": verdicts,
        "cases": pd.DataFrame(cases),
        "checks": pd.DataFrame(checks),
        "launches": pd.DataFrame(resources(list(statement.lines))),
        "fits": pd.DataFrame([vars(fit) for fit in statement.fits]),
        "in_model": pd.DataFrame([vars(row) for row in statement.in_model]),
    }


def write_csv_folder(statement: Statement, folder: Path) -> None:
    """Write the tables of *statement* to *folder*; raises RecordingError where that fails."""
    write_csv(tables(statement), folder)


def write_evaluation_page(statement: Statement, file: Path) -> None:
    """Write *statement* as a page that needs no other file; raises what placed() raises."""
    from llmkern.report.evaluation_page import page
    from llmkern.runfolder.place import placed

    text = page(statement)
    with placed(file, is_page, force=True, option="--html") as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")
