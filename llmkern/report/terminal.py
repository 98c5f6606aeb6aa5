"""The report as it is printed in a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmkern.attribute.account import PhaseAccount
from llmkern.attribute.attribution import Attribution
from llmkern.attribute.calibration import calibrate, choose, describe
from llmkern.attribute.memory import memory_energy
from llmkern.estimate import Estimate
from llmkern.explain import Explanation
from llmkern.explain.statement import answer
from llmkern.report.heading import heading
from llmkern.report.why import print_findings, print_predictions
from llmkern.runfolder import RunFolder
from llmkern.text import count, elided, gap_name, quantity, short_name, with_interval

# The low end of what CPU-energy studies use for DDR DIMMs: 3 W per 8 GB (CodeCarbon's methodology page).
RAM_W_PER_GIB = 0.375
_LEAST_NAME, _TITLES_ROOM = 10, 6
# Two phases with their intervals fit beside one another.
_WIDE = 100


def print_report(explanation: Explanation, uncertain: list[str], console: Console, top: int = 8) -> None:
    """Print the report of a run; *uncertain* are its doubts, the first of an incomplete run that it is one."""
    attribution = explanation.attribution
    run = attribution.run
    uncertain = list(uncertain)
    console.print()
    for title in heading(run.facts):
        console.print(title, highlight=False)
    if not run.complete:
        console.print(Text(uncertain.pop(0), style="bold yellow"))
    console.print()
    if attribution.accounts:
        console.print(" ".join(answer(explanation)), style="bold")
        console.print()
        console.print(_phase_table(run, attribution))
        if attribution.only_weighed:
            console.print("\nWeighed, but without one whole phase in the timeline, so that its energy cannot be split:")
            console.print(_weighed_table(attribution))
        print_findings(explanation, console)
        print_predictions(explanation, console)
        for key, split in (("kind", attribution.split), ("cause", attribution.split_gaps)):
            if key == "kind" or len(attribution.gaps):
                for accounts in _beside(list(attribution.accounts.values()), console.width):
                    console.print()
                    console.print(_side_by_side(key, accounts, split))
        for account in reversed(list(attribution.accounts.values())):
            console.print()
            console.print(_top(attribution, account, "kernels", top))
            console.print()
            console.print(_gaps(attribution, account, top, console.width))
            if attribution.identified is not None:
                console.print()
                console.print(
                    _operators(account, attribution.split(account.phase, ["op", "module"]), top, console.width)
                )
    elif attribution.weighed is not None:
        console.print("The timeline pass recorded no kernels, so energy cannot be split; the phases as weighed:")
        console.print(_weighed_table(attribution))
    console.print()
    console.print(Text("Books and sensors", style="bold"))
    for line in books(run, attribution):
        console.print(Padding(line, (0, 0, 0, 2)), highlight=False)
    console.print()
    console.print(Text("What is uncertain", style="bold"))
    for line in uncertain:
        console.print(Padding(f"• {line}", (0, 0, 0, 2)), highlight=False)
    console.print(f"\nRun folder: {run.path}", highlight=False, soft_wrap=True)


def _phase_table(run: RunFolder, attribution: Attribution) -> Table:
    table = Table(title="Per phase", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    accounts = list(attribution.accounts.values())
    for account in accounts:
        table.add_column(f"{account.phase}, per {account.unit}", justify="right")
    batch = run.facts.options.batch
    prompts = run.facts.prompts
    prompt_tokens = sum(prompts.effective_tokens) if prompts is not None else 0

    def tokens(account: PhaseAccount) -> int:
        return prompt_tokens if account.unit == "call" else batch

    def share(part: Any, account: PhaseAccount) -> str:
        if part is None or account.weight.energy_j is None:
            return "–"
        value = part if isinstance(part, float) else part.value
        text = quantity(part, "J") if isinstance(part, float) else with_interval(part, "J")
        share = f"{value / account.weight.energy_j.value:.0%}"
        return f"{text} ({'0%' if share == '-0%' else share})"

    def per_second(account: PhaseAccount) -> str:
        # What one range of another tool's capture computes, nothing says.
        known = account.unit in ("call", "token") and tokens(account)
        return f"{tokens(account) / account.weight.latency_s.value:,.1f}" if known else "–"

    def per_token(account: PhaseAccount) -> str:
        energy = account.weight.energy_j
        return "–" if energy is None or not tokens(account) else with_interval(energy.scaled(1 / tokens(account)), "J")

    device, things = run.facts.device.called, run.facts.device.launches
    rows: list[tuple[str, list[str]]] = [
        ("latency", [with_interval(a.weight.latency_s, "s") for a in accounts]),
        ("tokens/s", [per_second(a) for a in accounts]),
        ("energy", [with_interval(a.weight.energy_j, "J") for a in accounts]),
        ("J/token", [per_token(a) for a in accounts]),
        ("mean power", [quantity(a.mean_w, "W") for a in accounts]),
        (f"{device} busy", [f"{a.busy_share:.0%}" for a in accounts]),
        (f"{things} launched", [count(a.launches) for a in accounts]),
        (f"time in {things}", [quantity(a.busy_s, "s") for a in accounts]),
        ("time in gaps", [with_interval(a.gap_s, "s") for a in accounts]),
        (f"energy in {things}", [share(a.kernel_j, a) for a in accounts]),
        ("energy in gaps", [share(a.gap_j, a) for a in accounts]),
        ("residual", [share(a.residual_j, a) for a in accounts]),
        ("idle floor", [with_interval(a.floor_w, "W") for a in accounts]),
    ]
    rows.append(("recorder's effect", [_effect(a.recorder_effect) for a in accounts]))
    if attribution.weighed is not None:
        memory = memory_energy(run, attribution.weighed, attribution.device)
        rows.append(("of the energy, HBM", [with_interval(memory.get(a.phase), "J") for a in accounts]))
    if attribution.host is not None:
        host = attribution.host.phases
        rows.append(("host CPU package", [with_interval(host[a.phase].energy_j, "J") for a in accounts]))
    if run.facts.options.estimate_ram:
        watts = RAM_W_PER_GIB * run.facts.host.memory_bytes / 2**30
        text = [f"{quantity(watts * a.weight.latency_s.value, 'J')} (estimate)" for a in accounts]
        rows.append(("host RAM", text))
    for name, values in rows:
        # What no sensor on this machine could tell is said once, below, and not in a row of dashes.
        if any(value != "–" for value in values):
            table.add_row(name, *values)
    return table


def _effect(effect: Estimate | None) -> str:
    if effect is None or effect.low is None or effect.high is None:
        return "–"
    return f"{effect.value:+.1%} [{effect.low:+.1%}, {effect.high:+.1%}]"


def _weighed_table(attribution: Attribution) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("phase", "latency", "energy"):
        table.add_column(title, justify="left" if title == "phase" else "right")
    assert attribution.weighed is not None
    for weight in attribution.only_weighed:
        unit = f"{weight.phase}, per {weight.unit}"
        table.add_row(unit, with_interval(weight.latency_s, "s"), with_interval(weight.energy_j, "J"))
    return table


def _beside(accounts: list[PhaseAccount], width: int) -> list[list[PhaseAccount]]:
    """Return which phases a table has beside one another: all, or on a narrow terminal one, the last first."""
    return [accounts] if width >= _WIDE else [[account] for account in reversed(accounts)]


def _side_by_side(key: str, accounts: list[PhaseAccount], split: Callable[[str, list[str]], pd.DataFrame]) -> Table:
    """Return what *split* says by *key*, *accounts* side by side, in the order of the last."""
    title = {"kind": "Kernels by kind", "cause": "Gaps by cause"}[key]
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(key)
    for account in accounts:
        table.add_column(account.phase, justify="right")
        for column in _columns(account)[1:]:
            table.add_column(column, justify="right")
    rows = [{str(row[key]): row for row in _sorted(split(a.phase, [key]), a).to_dict("records")} for a in accounts]
    for name in dict.fromkeys(name for found in reversed(rows) for name in found):
        cells: list[str] = []
        for account, found in zip(accounts, rows, strict=True):
            row = found.get(name)
            cells += _time_and_energy(row, account) if row is not None else ("",) * len(_columns(account))
        table.add_row(name, *cells)
    return table


def _top(attribution: Attribution, account: PhaseAccount, what: str, top: int) -> Table:
    rows = attribution.frame[attribution.frame["phase"] == account.phase]
    rows = rows[(rows["kind"] == "gap") == (what == "gaps")]
    rows = _sorted(rows[rows["kind"] != "residual"], account)
    title = f"Top {what} of {account.phase}, per {account.unit}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    table.add_column("kernel" if what == "kernels" else "between", ratio=1, no_wrap=True, overflow="ellipsis")
    for column in ("count", "each", *_columns(account)):
        table.add_column(column, justify="right", no_wrap=True)
    if rows.empty:
        table.add_row("none")
        return table
    records = rows.head(top).to_dict("records")
    rest = rows.iloc[top:]
    for record in records:
        before, arrow, after = str(record["name"]).partition(" → ")
        record["name"] = gap_name(before, after) if arrow else short_name(before)
    if len(rest):
        # Ends of intervals are added as if all erred alike: so gaps do, and for kernels it is the most that it can be.
        sums = rest[["launches", "duration_ns", "energy_j", "low_j", "high_j"]].sum(min_count=1).to_dict()
        records.append({"name": f"{len(rest)} others", **sums})
    for record in records:
        launches, duration_ns = float(record["launches"]), float(record["duration_ns"])
        each = quantity(duration_ns / 1e9 / launches, "s") if launches else "–"
        table.add_row(str(record["name"]), count(launches), each, *_time_and_energy(record, account))
    return table


def _gaps(attribution: Attribution, account: PhaseAccount, top: int, width: int) -> Table:
    """Return where the host was late, or, where that is not known, between which kernels the device was idle."""
    if attribution.gaps.empty or attribution.identified is None:
        return _top(attribution, account, "gaps", top)
    title = f"Top gaps of {account.phase}, per {account.unit}: what the host was at"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    table.add_column("cause", no_wrap=True)
    table.add_column("operator", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("module", ratio=1, no_wrap=True, overflow="ellipsis")
    for column in ("count", *_columns(account)):
        table.add_column(column, justify="right", no_wrap=True)
    rows = _sorted(attribution.split_gaps(account.phase, ["cause", "op", "module"]), account)
    cells = [
        (*_operator_and_module(row), str(row["cause"]), count(float(row["launches"])), *_time_and_energy(row, account))
        for row in rows.head(top).to_dict("records")
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


def _operators(account: PhaseAccount, rows: pd.DataFrame, top: int, width: int) -> Table:
    title = f"Top operators of {account.phase}, per {account.unit}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    table.add_column("operator", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("module", ratio=1, no_wrap=True, overflow="ellipsis")
    for column in ("kernels", *_columns(account)):
        table.add_column(column, justify="right", no_wrap=True)
    cells = [
        (*_operator_and_module(row), count(float(row["launches"])), *_time_and_energy(row, account))
        for row in _sorted(rows, account).head(top).to_dict("records")
    ]
    for row in _fitted(cells, width):
        table.add_row(*row)
    return table


def _sorted(rows: pd.DataFrame, account: PhaseAccount) -> pd.DataFrame:
    return rows.sort_values("energy_j" if account.joules is not None else "duration_ns", ascending=False)


def _columns(account: PhaseAccount) -> tuple[str, ...]:
    return ("time", "share") if account.joules is None else ("time", "energy", "share")


def _time_and_energy(record: dict[Any, Any], account: PhaseAccount) -> tuple[str, ...]:
    """Return the values of _columns: energy with its interval where it has one, else the share of the phase's time."""
    duration_ns, energy_j = float(record["duration_ns"]), float(record["energy_j"])
    time_text = quantity(duration_ns / 1e9, "s")
    energy = account.weight.energy_j
    if account.joules is None or energy is None:
        return time_text, f"{duration_ns / 1e9 / account.weight.latency_s.value:.1%}"
    low, high = float(record.get("low_j", "nan")), float(record.get("high_j", "nan"))
    text = quantity(energy_j, "J") if low != low else with_interval(Estimate(energy_j, low, high), "J")
    return time_text, text, f"{energy_j / energy.value:.1%}"


def books(run: RunFolder, attribution: Attribution) -> list[str]:
    """Return what closes the books, and what the sensors and the recorder did, in sentences."""
    lines = []
    weighed = attribution.weighed
    if weighed is not None and weighed.counter_j is not None:
        assert weighed.windows_j is not None
        assert weighed.idle_j is not None
        assert weighed.residual_j is not None
        lines.append(
            f"Whole weigh pass: counter {quantity(weighed.counter_j, 'J')} = windows "
            f"{quantity(weighed.windows_j, 'J')} + idle between them {quantity(weighed.idle_j, 'J')} "
            f"+ residual {quantity(weighed.residual_j, 'J')} "
            f"({weighed.residual_j / weighed.counter_j:+.2%})."
        )
        if weighed.samples_j is not None:
            apart = weighed.samples_j / weighed.counter_j - 1
            late = "" if weighed.sample_lag_ms is None else f" and come {weighed.sample_lag_ms:.0f} ms late"
            lines.append(f"The driver's power samples integrate to {apart:+.2%} of the counter{late}.")
        if weighed.floor is not None and weighed.temperature_c is not None:
            slope = f"{weighed.floor.slope_w_per_c:.2f} W/°C"
            slope_text = f", {slope} measured" if weighed.floor.slope_is_measured else f", {slope} mostly assumed"
            lines.append(
                f"Idle floor {with_interval(weighed.floor.at(weighed.temperature_c), 'W')} at the run's "
                f"{weighed.temperature_c:.0f} °C, from {weighed.floor.samples} idle samples{slope_text}."
            )
    sensors = calibrate(run)
    if sensors:
        lines.append(f"Sensor test: {'; '.join(map(describe, sensors.values()))}.")
        lines.append(f"Times within a phase by the {choose(sensors)[0]}: {choose(sensors)[1]}.")
    if weighed is not None and "decode" in weighed.phases:
        decode = weighed.phases["decode"]
        apart = decode.latency_by_ranges_s.value / decode.latency_s.value - 1
        text = f"Decode by ranges against generate(n) - generate(1): latency {apart:+.2%}"
        if decode.energy_by_ranges_j is not None and decode.energy_j is not None:
            text += f", energy {decode.energy_by_ranges_j.value / decode.energy_j.value - 1:+.2%}"
        lines.append(text + ".")
    lines += _replays(attribution)
    cost = run.facts.own_cost
    if cost is not None:
        share = (cost.pump_s + cost.sensors_s) / cost.wall_s
        lines.append(
            f"While windows were weighed, llmkern's own threads can have held up the launches for {share:.2%} of the "
            f"time at most (sensors {cost.sensors_s / cost.wall_s:.2%}, writing "
            f"{cost.pump_s / cost.wall_s:.2%})."
        )
    recorder = run.facts.recorder
    if recorder is not None:
        lines.append(
            f"Recorder: {recorder.source}, {recorder.kernels:,} kernels, {recorder.launches:,} host calls, "
            f"{recorder.dropped_records} dropped."
        )
    clock = run.facts.clock
    if clock is not None:
        lines.append(
            f"The wall clock kept step with the monotonic one to {clock.largest_change_ns / 1e3:,.0f} µs between two "
            f"of {clock.looks} looks."
        )
    if run.facts.elapsed_s:
        lines.append(f"From command to run folder: {run.facts.elapsed_s:.0f} s.")
    return lines


def _replays(attribution: Attribution) -> list[str]:
    marginals = attribution.marginals
    if marginals is None:
        return []
    parts = []
    for phase, account in attribution.accounts.items():
        steps = attribution.kernels[attribution.kernels["phase"] == phase]
        share = float(
            steps.loc[steps["signature"].isin(marginals.replayed), "duration_ns"].sum() / steps["duration_ns"].sum()
        )
        energy, residual_j = account.weight.energy_j, account.residual_j
        if energy is not None and residual_j is not None:
            parts.append(f"{phase} {share:.0%} of the kernels' time, residual {residual_j / energy.value:+.1%}")
    count_text = f"{len(marginals.replayed)} operators, condition number {marginals.condition:.1f}"
    return [f"Replayed alone: {count_text}; {'; '.join(parts)}."]
