"""A server on the GPU: joules of requests and idle add up to the counter, equal requests cost the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmkern.attribute.requests import served
from llmkern.runfolder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "out"
    asked = ("--requests", "24", "--prompt-tokens", "256", "--new-tokens", "32", "--arrivals", "sequential")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "llmkern", "serve-study", "--model", "qwen-0.5b", "--weights", "random"),
            *(*asked, "--arrivals", "burst", "--out", str(out), "--json"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["missing"] == {}
    return out / "runs"


@pytest.mark.parametrize("pattern", ["sequential", "burst"])
def test_requests_and_idle_are_what_the_counter_moved(runs: Path, pattern: str) -> None:
    found = served(RunFolder(runs / pattern))
    assert found.counter_j is not None
    assert found.idle_j is not None
    joules = float(found.requests["energy_j"].sum())
    assert joules + found.idle_j == pytest.approx(found.counter_j, rel=0.005)
    assert 0 <= found.idle_j < found.counter_j
    assert (found.requests["status"] == "finished").all()


def test_equal_requests_cost_the_same_and_a_burst_costs_less(runs: Path) -> None:
    alone, together = (served(RunFolder(runs / name)) for name in ("sequential", "burst"))
    # All of a burst are in the same iterations but for those that prefill the last of them.
    joules = together.requests["energy_j"]
    assert joules.max() / joules.min() < 1.5
    first, second = (found.per_request_j() for found in (alone, together))
    assert first is not None
    assert second is not None
    assert second.value < first.value / 2
