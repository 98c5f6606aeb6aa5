"""Runs a plan: each configuration in a process of its own, in random order, what is complete kept."""

from __future__ import annotations

import ctypes
import fcntl
import json
import multiprocessing
import os
import random
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from llmkern.errors import InterruptedRunError, LlmkernError, RecordingError, RunFolderError, UsageError
from llmkern.record import signals
from llmkern.runfolder import RunFolder
from llmkern.study.cost import Costs
from llmkern.study.plan import Configuration
from llmkern.text import duration

STATE, RUNS, LOGS, PROMPTS, LOCK = "study.json", "runs", "logs", "prompts", ".lock"
SCHEMA = 1
# A child that was asked to end puts what it recorded in its place first.
_PATIENCE_S = 120.0
_PR_SET_PDEATHSIG = 1
COMPLETE, FAILED = "complete", "failed"


@dataclass(frozen=True)
class Task:
    """One configuration with the options of its run, and what is compared to know whether that run was made before."""

    configuration: Configuration
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.configuration.name


@dataclass
class Study:
    """What is known of a study's runs: how each ended, why, and after how many seconds; kept in study.json."""

    folder: Path
    title: str = ""
    command: str = ""
    started: str = ""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note(self, name: str, **changes: Any) -> None:
        self.runs[name] = {**self.runs.get(name, {}), **changes}
        self.write()

    def write(self) -> None:
        facts = {"schema": SCHEMA, "program": "llmkern study"}
        facts |= {key: getattr(self, key) for key in ("title", "command", "started", "runs")}
        beside = self.folder / f".{STATE}.tmp"
        try:
            beside.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(beside, self.folder / STATE)
        except OSError as error:
            raise RecordingError(
                f"{self.folder / STATE} cannot be written ({error.strerror}): free some space and start again; runs "
                "that are complete are kept."
            ) from error

    @property
    def took_s(self) -> dict[str, float]:
        return {name: run["elapsed_s"] for name, run in self.runs.items() if run.get("status") == COMPLETE}

    @property
    def failed(self) -> dict[str, str]:
        """Return why runs failed, by their names."""
        return {name: run["reason"] for name, run in self.runs.items() if run.get("status") == FAILED}


def open_study(folder: Path) -> Study:
    """Return the study in *folder*, a new one where there is none; raises UsageError where something else is."""
    file = folder / STATE
    if not folder.exists():
        return Study(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: give the folder of a study with --out.")
    if not file.exists():
        # A study that was killed early has not more.
        own = {LOCK, f".{STATE}.tmp", RUNS, LOGS, PROMPTS}
        other = next((entry.name for entry in folder.iterdir() if entry.name not in own), None)
        if other is not None:
            raise UsageError(f"{folder} holds {other} and no study: choose a new folder with --out.")
        return Study(folder)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        runs = {str(name): dict(run) for name, run in found["runs"].items()}
        known = found["schema"] == SCHEMA
        title, command, started = (str(found[key]) for key in ("title", "command", "started"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} cannot be read ({type(error).__name__}): restore it, or move it away; runs that are complete are "
            "found without it."
        ) from error
    if not known:
        raise UsageError(f"{file} was written by another llmkern (schema {found['schema']!r}, known is {SCHEMA}).")
    return Study(folder, title, command, started, runs)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other studies out of *folder* for the time; raises UsageError where one is running there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): choose another folder with --out.") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"a study is running in {folder}: wait for it, or choose another --out.") from error
        except OSError:
            # Some network disks know no locks.
            pass
        yield
    finally:
        os.close(lock)


def done(folder: Path, task: Task) -> bool:
    """Return whether the run of *task* is there and complete, with the same options."""
    try:
        run = RunFolder(folder / RUNS / task.name)
    except (RunFolderError, LlmkernError):
        return False
    if not run.complete:
        return False
    facts, wanted = asdict(run.facts.options), dict(task.options)
    for name in ("prompts", "prefill_prompts"):
        # A study may be moved.
        facts[name], wanted[name] = (Path(options.get(name) or "").name for options in (facts, wanted))
    return all(facts[key] == value for key, value in wanted.items() if key in facts)


class Named(Protocol):
    """Whatever a process is made for: its name, and the options that it gets."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> dict[str, Any]: ...


Work = Callable[[dict[str, Any], str], None]


@dataclass(frozen=True)
class Order:
    """In which order runs are taken (*seed*), what they are guessed to take, and when none is begun any more."""

    costs: Costs
    seed: int = 0
    budget_s: float | None = None


def execute(study: Study, tasks: list[Task], work: Work, order: Order, say: Callable[[str], None]) -> None:
    """Run every task that is not done, in random order; *work* is called in a process of its own with its options.

    What fails is noted with its reason, and the rest goes on. Raises whatever ended this process.
    """
    costs, budget_s = order.costs, order.budget_s
    begin_s = time.monotonic()
    missing = [task for task in tasks if not done(study.folder, task)]
    if len(missing) < len(tasks):
        say(f"{len(tasks) - len(missing)} of {len(tasks)} runs are there already and are kept.")
    random.Random(order.seed).shuffle(missing)
    left = list(missing)
    while left:
        task = left[0]
        spent_s = time.monotonic() - begin_s
        if budget_s is not None:
            fits = next((one for one in left if spent_s + costs.of([one.name]) <= budget_s), None)
            if fits is None:
                say(f"{len(left)} runs are left out: none of them fits into what is left of the budget.")
                break
            task = fits
        left.remove(task)
        number = len(missing) - len(left)
        guess, rest = duration(costs.of([task.name])), duration(costs.of([one.name for one in [task, *left]]))
        say(f"{number} of {len(missing)}: {task.name} (about {guess}; {rest} to the end)")
        run_s = time.monotonic()
        code, log = in_child(study.folder, task, work)
        elapsed_s = round(time.monotonic() - run_s, 3)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        if code == 0 and done(study.folder, task):
            study.note(task.name, status=COMPLETE, reason="", elapsed_s=elapsed_s, ended=now)
            costs = Costs(costs.guessed_s, study.took_s)
        else:
            reason = why(log, code)
            study.note(task.name, status=FAILED, reason=reason, elapsed_s=elapsed_s, ended=now)
            say(f"  failed: {reason}")


def in_child(folder: Path, task: Named, work: Work) -> tuple[int, Path]:
    """Run *task* in a new process and return its exit code and its log; raises InterruptedRunError for a signal."""
    log = folder / LOGS / f"{task.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    options = {**task.options, "out": folder / RUNS / task.name, "force": True}
    process = processes().Process(target=guarded, args=(work, options, str(log)))
    process.start()
    try:
        process.join()
    except BaseException as error:
        # A signal that came to us alone has to reach it; what it recorded it keeps.
        with suppress(ProcessLookupError, ValueError):
            process.terminate()
        process.join(_PATIENCE_S)
        if process.is_alive():
            process.kill()
            process.join()
        if isinstance(error, KeyboardInterrupt):
            came = signals.came() or signal.SIGINT
            raise InterruptedRunError(
                f"ended by {came.name}: what is complete is kept in {folder / RUNS}, and the same command goes on with "
                "the rest.",
                128 + int(came),
            ) from error
        raise
    return process.exitcode if process.exitcode is not None else 1, log


def processes() -> Any:
    """Return how processes are made: from a server that has imported the libraries and holds no device."""
    context = multiprocessing.get_context("forkserver")
    # With NVML in the place of CUDA, asking whether there is a device makes no context that a fork would break.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context.set_forkserver_preload(["llmkern.session"])
    return context


def guarded(work: Work, options: dict[str, Any], log: str) -> None:
    """Call *work* with its output in *log*, and end when the study is killed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    work(options, log)


def why(log: Path, code: int) -> str:
    """Return why a run failed: the sentence that it ended with, or the signal."""
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.startswith("llmkern: ")]
        if said:
            return said[-1].removeprefix("llmkern: ")[:500]
    if code < 0:
        with suppress(ValueError):
            return f"the process was ended by {signal.Signals(-code).name}; {shlex.quote(str(log))} has what it said."
    return f"the process ended with exit code {code}; {shlex.quote(str(log))} has what it said."
