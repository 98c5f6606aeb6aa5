"""Runs of a study: a process each, what is complete kept, what fails told, nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmkern.errors import UsageError
from llmkern.runfolder import RunFolder
from llmkern.study.cost import Costs
from llmkern.study.execute import Order, Study, Task, done, execute, held, open_study
from llmkern.study.plan import read_plan
from tests.study.made import Asked, made_run

PLAN = {"model": ["qwen-tiny"], "precision": ["fp32", "bf16", "fp16", "int8"]}


def tasks() -> list[Task]:
    found = read_plan("precision", PLAN, {}).configurations()
    return [Task(one, {"model": one.model, "precision": one.precision, "batch": 1}) for one in found]


def order(seed: int = 0, budget_s: float | None = None) -> Order:
    return Order(Costs({task.name: 10.0 for task in tasks()}, {}), seed, budget_s)


def recorded(options: dict[str, Any], log: str) -> None:
    """Stand in for a run: it says who it is and leaves a run folder."""
    print(f"process {os.getpid()}")
    made_run(Path(options["out"]), Asked(precision=options["precision"]), rounds=2)


def failing(options: dict[str, Any], log: str) -> None:
    if options["precision"] == "bf16":
        print("llmkern: it is too large for this device.", file=sys.stderr, flush=True)
        sys.exit(3)
    if options["precision"] == "fp16":
        os.kill(os.getpid(), signal.SIGKILL)
    recorded(options, log)


def never(options: dict[str, Any], log: str) -> None:
    raise AssertionError("nothing was to be run")


def test_every_run_has_a_process_of_its_own_and_is_not_made_twice(tmp_path: Path) -> None:
    said: list[str] = []
    study = open_study(tmp_path / "s")
    with held(study.folder):
        execute(study, tasks(), recorded, order(), said.append)
    logs = {(tmp_path / "s" / "logs" / f"{task.name}.txt").read_text() for task in tasks()}
    assert len(logs) == 4
    assert str(os.getpid()) not in " ".join(logs)
    assert all(done(study.folder, task) for task in tasks())
    assert open_study(tmp_path / "s").runs.keys() == {task.name for task in tasks()}
    assert "40 s to the end" in said[0]
    # Once more: what is there is kept.
    execute(study, tasks(), never, order(), said.append)
    assert "4 of 4 runs are there already" in said[-1]


def test_the_order_is_random_and_follows_the_seed(tmp_path: Path) -> None:
    orders = []
    for seed in (0, 0, 3):
        said: list[str] = []
        execute(open_study(tmp_path / str(len(orders))), tasks(), recorded, order(seed), said.append)
        orders.append([line.split()[3] for line in said])
    assert orders[0] == orders[1] != orders[2]


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    study = open_study(tmp_path / "s")
    execute(study, tasks(), failing, order(), said.append)
    assert len(study.failed) == 2
    reasons = " ".join(study.failed.values())
    assert "it is too large for this device." in reasons
    assert "SIGKILL" in reasons
    assert sum(done(study.folder, task) for task in tasks()) == 2
    # Mended, they are run, and only they.
    execute(study, tasks(), recorded, order(), said.append)
    assert study.failed == {}
    assert sum(line.startswith("2 of 2") for line in said) == 1


def test_a_run_with_other_options_is_not_the_run(tmp_path: Path) -> None:
    task = tasks()[0]
    made_run(tmp_path / "runs" / task.name, Asked(precision="fp32"), rounds=2)
    assert done(tmp_path, task)
    assert not done(tmp_path, Task(task.configuration, {**task.options, "seed": 7}))
    (tmp_path / "runs" / task.name / "run.json").write_text("{")
    assert not done(tmp_path, task)


def test_what_does_not_fit_into_the_budget_is_not_begun(tmp_path: Path) -> None:
    said: list[str] = []
    execute(open_study(tmp_path / "s"), tasks(), never, order(budget_s=5.0), said.append)
    assert said == ["4 runs are left out: none of them fits into what is left of the budget."]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"holds thesis.tex and no study"):
        open_study(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        open_study(tmp_path / "thesis.tex")
    other = tmp_path / "s"
    other.mkdir()
    for text in ("{", '{"schema": 9, "runs": {}, "title": "", "command": "", "started": ""}', '{"runs": 3}'):
        (other / "study.json").write_text(text)
        with pytest.raises(UsageError, match=r"study\.json (cannot be read|was written by another)"):
            open_study(other)


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UsageError, match="a study is running in"), held(tmp_path):
        pass
    with held(tmp_path):
        pass


def test_the_state_is_whole_at_any_time(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    study = Study(tmp_path, "t", "c", "now")
    study.note("a", status="complete", reason="", elapsed_s=2.0)
    assert json.loads((tmp_path / "study.json").read_text())["runs"]["a"]["elapsed_s"] == 2.0
    assert open_study(tmp_path).took_s == {"a": 2.0}


QUICK = [
    *("--models", "qwen-tiny", "--precisions", "fp32,bf16,int8", "--prompt-tokens", "16", "--new-tokens", "6"),
    *("--repeats", "2", "--record", "windows", "--device", "cpu"),
]


def llmkern(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "llmkern", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """The whole command, on the CPU: killed without warning after its first run, then started again."""
    first = llmkern("study", "precision", *QUICK, "--out", "s", cwd=tmp_path)
    runs = tmp_path / "s" / "runs"
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s and not list(runs.glob("*/run.json")):
        time.sleep(0.05)
    while time.monotonic() < until_s and not [p for p in runs.glob("*") if ".partial" not in p.name]:
        time.sleep(0.02)
    children = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert children
    # Nothing of it goes on measuring.
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    whole = [path for path in runs.iterdir() if ".partial" not in path.name and RunFolder(path).complete]
    before = {path: (path / "run.json").stat().st_mtime_ns for path in whole}
    assert 1 <= len(before) < 3
    second = llmkern("study", "precision", *QUICK, "--out", "s", cwd=tmp_path)
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    assert f"{len(before)} of 3 runs are there already" in err
    assert {path: (path / "run.json").stat().st_mtime_ns for path in before} == before
    assert out.count("qwen-tiny, 16 tokens") == 3
    assert (tmp_path / "s" / "study.html").read_text().count("<h2>Latency") == 2
    assert (tmp_path / "s" / "figures" / "figure-4.svg").exists()
    assert (tmp_path / "s" / "tables" / "numbers.csv").exists()


def test_what_cannot_be_run_is_told_with_its_line_before_anything_is(tmp_path: Path) -> None:
    text = '[axes]\nmodel = [\n  "qwen-tiny",\n  "llama-70b",\n]\nprompt_tokens = [16]\nnew_tokens = [4]\n'
    (tmp_path / "large.toml").write_text(text + '[options]\nrecord = "windows"\nrepeats = 1\nwarmup = 1\n')
    ended = llmkern("study", "large.toml", "--device", "cpu", cwd=tmp_path)
    _, err = ended.communicate(timeout=100)
    assert ended.returncode == 2
    assert "large.toml, line 4: llama-70b" in err
    assert "GiB" in err
    assert "Traceback" not in err
    assert not (tmp_path / "studies" / "large" / "runs").exists()
    # Asked for, the rest is run, and the page says what is missing.
    ended = llmkern("study", "large.toml", "--device", "cpu", "--skip-impossible", cwd=tmp_path)
    out, err = ended.communicate(timeout=100)
    assert ended.returncode == 0, err
    assert "Left out: large.toml, line 4" in err
    assert "llama-70b" in out
    assert "llama-70b" in (tmp_path / "studies" / "large" / "study.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["precision", "--models", "qwen-8b"], "plan precision: there is no model 'qwen-8b'"),
        (["precision", "--batches", "a"], "give whole numbers"),
        (["precision", "--budget", "30"], "with its unit, like 30m"),
        (["precision", "--models", ","], "is empty"),
        (["nothing.toml"], "there is no plan nothing.toml"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path: Path, arguments: list[str], told: str) -> None:
    ended = llmkern("study", *arguments, cwd=tmp_path)
    _, err = ended.communicate(timeout=60)
    assert ended.returncode == 2
    assert told in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
