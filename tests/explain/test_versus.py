"""Runs beside a baseline: what is outside the noise is told and ends a CI, what is inside is not distinguishable."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from llmkern.attribute.attribution import attribute
from llmkern.commands.diff import command
from llmkern.errors import UsageError
from llmkern.explain.compare import NOT_DISTINGUISHABLE
from llmkern.explain.versus import ExceededError, versus
from llmkern.runfolder import RunFolder, RunWriter
from tests.synthetic import Truth, synthetic_run
from tests.tables import least_facts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A baseline, the same again with other noise, and runs that take 5 % and 50 % longer per token."""
    folder = tmp_path_factory.mktemp("versus")
    made = {"base": (0.030, 1), "again": (0.030, 2), "five": (0.0315, 3), "half": (0.045, 4)}
    for name, (token_s, seed) in made.items():
        truth = Truth(rounds=6, jitter=0.004, token_s=token_s, busy_per_token_s=token_s / 5)
        synthetic_run(folder / name, truth, seed=seed)
    return {name: folder / name for name in made}


def test_verdicts_follow_the_noise(runs: dict[str, Path]) -> None:
    base, *others = (attribute(RunFolder(runs[name])) for name in ("base", "again", "five", "half"))
    lines = [line for line in versus(base, others) if line.phase == "decode"]
    again, five, half = lines
    assert again.verdict == NOT_DISTINGUISHABLE
    assert not again.exceeds(0.0)
    assert five.change_j is not None
    assert five.change_j.value == pytest.approx(0.05, abs=0.01)
    assert five.verdict.endswith("more, outside the noise")
    assert five.exceeds(0.03)
    assert not five.exceeds(0.10)
    assert half.change_j is not None
    assert half.change_j.value == pytest.approx(0.5, abs=0.02)
    (back,) = (line for line in versus(others[2], [base]) if line.phase == "decode")
    assert back.verdict.startswith("33.")
    assert "less" in back.verdict


def test_a_ci_is_ended_by_what_takes_more(runs: dict[str, Path], tmp_path: Path) -> None:
    paths = {name: str(path) for name, path in runs.items()}
    done = CliRunner().invoke(command, [paths["base"], paths["again"], "--fail-above", "3%"])
    assert done.exit_code == 0, done.output
    failed = CliRunner().invoke(command, [paths["base"], paths["again"], paths["five"], "--fail-above", "3%"])
    assert isinstance(failed.exception, ExceededError)
    assert failed.exception.exit_code == 1
    assert "five: decode takes 5." in str(failed.exception)
    assert "again" not in str(failed.exception)
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(command, [paths["base"], paths["five"], paths["half"], "--html", str(page)])
    assert shown.exit_code == 0, shown.output
    text = page.read_text()
    assert text.count('data-chart="chart-difference-') == 2
    assert "outside the noise" in text
    assert shown.output.count("baseline") == 3


def test_one_prediction_is_held_against_one_run(runs: dict[str, Path]) -> None:
    refused = CliRunner().invoke(command, [*(str(runs[n]) for n in ("base", "again", "five")), "--against", "graph"])
    assert isinstance(refused.exception, UsageError)
    assert "give one AFTER, not 2" in str(refused.exception)


def test_a_run_that_shares_nothing_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "empty", least_facts())
    writer.merge()
    writer.publish()
    with pytest.raises(UsageError, match="empty shares no phase with"):
        versus(attribute(RunFolder(runs["base"])), [attribute(RunFolder(tmp_path / "empty"))])
