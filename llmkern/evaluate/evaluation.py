"""Runs workers, one process per candidate, and keeps what each of them told, however it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from llmkern.evaluate.job import ROOF, UNCHANGED, Case, Job, ModelRow, Row, row_from, to_json
from llmkern.evaluate.roof import Roof
from llmkern.record import environment, signals


@dataclass(frozen=True)
class Contender:
    """A name and what it stands for; *own* are the user's, whose verdict is asked for."""

    name: str
    spec: str
    own: bool


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, and how."""

    contenders: tuple[Contender, ...]
    cases: tuple[Case, ...]
    dtype: str = "bf16"
    group: int = 64
    energy: bool = True
    timeout_s: float = 600.0
    seed: int = 0
    interpret: bool = False
    in_model: str | None = None


@dataclass
class Evaluation:
    """All rows, in the order of contenders and cases; *failed* says in a sentence why a contender has none or few."""

    request: Request
    device: str
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    roof: Roof | None = None
    in_model: list[ModelRow] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=environment.versions)


def evaluate(request: Request, device: str, began: Callable[[str], None]) -> Evaluation:
    """Run every contender of *request* in a process of its own; *began* is told who is at work."""
    result = Evaluation(request, device)
    if not request.interpret:
        began("roof")
        lines, ending = _work(Job("roof", ROOF, (), request.dtype, energy=request.energy), request)
        roof = next((line["roof"] for line in lines if "roof" in line), None)
        result.roof = None if roof is None else msgspec.convert(roof, Roof)
        if ending is not None:
            result.failed["roof"] = ending
    for contender in request.contenders:
        began(contender.name)
        # A peer that does not know a format is not there; a candidate that does not is told so.
        cases = request.cases if contender.own else tuple(_known(contender.spec, request.cases))
        while cases:
            lines, ending = _work(_job(request, contender, cases), request)
            rows = [replace(row_from(line["row"]), candidate=contender.name) for line in lines if "row" in line]
            result.rows += rows
            done = {row.case.key for row in rows}
            cases = tuple(case for case in cases if case.key not in done)
            if ending is not None or not rows:
                if ending is not None and cases:
                    result.failed[contender.name] = ending
                break
    if request.in_model is not None:
        _decode(result, began)
    return result


def _decode(result: Evaluation, began: Callable[[str], None]) -> None:
    """Put our kernels and the user's candidates into the model, one process each, and the model as it is beside
    them.
    """
    request = result.request
    case = request.cases[0]
    places = [Contender("as it is", UNCHANGED, False)]
    places += [Contender("llmkern packed", "llmkern:cuda-packed", False)] if not request.interpret else []
    places += [c for c in request.contenders if c.own]
    for contender in places:
        began(f"{contender.name} in {request.in_model}")
        job = replace(_job(request, contender, (case,)), in_model=request.in_model)
        lines, ending = _work(job, request)
        rows = [msgspec.convert(line["model"], ModelRow) for line in lines if "model" in line]
        result.in_model += rows
        if not rows:
            result.failed[f"{contender.name} in {request.in_model}"] = ending or "it told nothing."


def _known(spec: str, cases: Iterable[Case]) -> Iterable[Case]:
    from llmkern.evaluate.peers import available

    return (case for case in cases if spec in available(case.format))


def _job(request: Request, contender: Contender, cases: tuple[Case, ...]) -> Job:
    return Job(
        *(contender.name, contender.spec, cases, request.dtype, request.group),
        energy=request.energy,
        seed=request.seed,
        interpret=request.interpret,
    )


def _work(job: Job, request: Request) -> tuple[list[dict[str, Any]], str | None]:
    """Return the lines that a worker told of *job*, and in a sentence how it ended, None if well."""
    with tempfile.TemporaryDirectory(prefix="llmkern-evaluate-") as folder:
        job_file, rows_file, said = (Path(folder) / name for name in ("job.json", "rows.jsonl", "said"))
        job_file.write_bytes(msgspec.json.encode(to_json(job)))
        environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if request.interpret else {})}
        with said.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "llmkern.evaluate.worker", str(job_file), str(rows_file)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # A kernel that hangs may have children (a compiler): they end with it.
                start_new_session=True,
            )
            ended = _wait(process, request.timeout_s)
        lines = _lines(rows_file)
        return lines, _ending(process.returncode, ended, lines, said, request.timeout_s)


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for *process*; kill it after *timeout_s*, or when this process is to end. Return whether it ended by
    itself.
    """
    end_s = time.monotonic() + timeout_s
    try:
        while process.poll() is None:
            signals.check()
            if time.monotonic() > end_s:
                return False
            time.sleep(0.02)
        return True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lines(rows_file: Path) -> list[dict[str, Any]]:
    if not rows_file.exists():
        return []
    lines = []
    for text in rows_file.read_bytes().splitlines():
        try:
            lines.append(msgspec.json.decode(text))
        except msgspec.DecodeError:
            # Cut off in the middle by what ended the process.
            break
    return lines


def _ending(code: int, ended: bool, lines: list[dict[str, Any]], said: Path, timeout_s: float) -> str | None:
    failed = next((line["failed"] for line in lines if "failed" in line), None)
    if failed is not None:
        return str(failed)
    if any("done" in line for line in lines):
        return None
    where = _where(lines)
    if not ended:
        return f"it did not come back within {timeout_s:g} s in {where} and was ended; --timeout gives it longer."
    if code == 3 and "row" in (lines[-1] if lines else {}):
        # The row itself says what went wrong; what is left of its cases can go on in a new process.
        return None
    if code < 0:
        return f"it crashed with {signal.Signals(-code).name} in {where}."
    last = (said.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    return f"it ended with exit code {code} in {where}: {last[:300]}"


def _where(lines: list[dict[str, Any]]) -> str:
    last = next((line for line in reversed(lines) if "step" in line), None)
    if last is None:
        return "starting"
    case = last.get("case")
    of = f" of {case['format']} {case['n']}x{case['k']}, M = {case['m']}" if case else ""
    return f"{last['step']}{of}{' (' + last['with'] + ')' if 'with' in last else ''}"
