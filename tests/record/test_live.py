"""Annotation for another profiler: what it sees, and a run folder that says what is missing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmkern.attribute.attribution import attribute
from llmkern.errors import DeviceError
from llmkern.record.annotate import Annotator
from llmkern.record.device.cuda import CudaDevice
from llmkern.record.passes.live import modules_annotated, power_counted
from llmkern.runfolder import RunFolder
from tests.test_cli import llmkern


class Domain:
    """Notes what a profiler would be told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def get_event_attributes(self, **attributes: Any) -> dict[str, Any]:
        return attributes

    def push_range(self, attributes: dict[str, Any]) -> None:
        self.told.append(attributes)

    def pop_range(self) -> None:
        self.told.append("pop")

    def get_counter(self, name: str, kind: type) -> Any:
        assert kind is float
        self.told.append(name)
        return self

    def sample(self, value: float) -> None:
        self.told.append(value)


@pytest.fixture
def annotator() -> Annotator:
    made = Annotator()
    made._domain = Domain()
    return made


def test_modules_are_ranges_with_their_shapes(annotator: Annotator) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    with modules_annotated(model, annotator):
        model(torch.ones(2, 4))
    model(torch.ones(2, 4))
    told = annotator._domain.told
    assert [t if t == "pop" else (t["message"], t["category"]) for t in told] == [
        ("0", "module"),
        "pop",
        ("1", "module"),
        "pop",
    ]
    np.testing.assert_array_equal(told[0]["payload"], [2, 4])
    np.testing.assert_array_equal(told[2]["payload"], [2, 8])
    # They are for the other tool: the run folder is not filled with them.
    assert annotator.drain() == []


def test_without_nvml_there_is_no_power_and_no_error(annotator: Annotator) -> None:
    with power_counted(annotator, lambda: None):
        time.sleep(0.25)
    assert annotator._domain.told == ["power [W]"]


def test_annotate_only_weighs_and_says_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ("--prompt-tokens", "16", "--new-tokens", "4", "--warmup", "1", "--repeats", "2", "--trace-repeats", "2")
    small += ("--unweighed-window-s", "0.2")
    done = llmkern("trace", "--model", "qwen-tiny", "--device", "cpu", "--annotate-only", "--out", str(out), *small)
    assert done.returncode == 0, done.stderr
    assert f"llmkern import CAPTURE.sqlite --energy {out}" in " ".join(done.stdout.split())
    run = RunFolder(out)
    assert run.complete
    assert not run.has("kernels")
    assert attribute(run).accounts == {}
    ranges = run.table("ranges", where={"pass": "time"})
    counts = ranges["category"].astype(str).value_counts().to_dict()
    # Two generations of four tokens through four layers, inside one range of the pass.
    assert counts == {"layer": 32, "token": 8, "phase": 4, "generate": 2, "pass": 1}
    assert "latency" in done.stdout


def test_only_annotation_may_run_under_nsys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "NSYS_PROFILING_SESSION_ID", "1")
    with pytest.raises(DeviceError, match="--annotate-only"):
        CudaDevice.check_unprofiled(object.__new__(CudaDevice))
