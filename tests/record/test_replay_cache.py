"""The cache of replays: what is kept, for whom, and what a broken file costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from llmkern.attribute.attribution import attribute
from llmkern.attribute.split.evidence import to_cache
from llmkern.record.replay_cache import cache_file, cache_key, load, store
from llmkern.runfolder import RunFolder
from llmkern.runfolder.facts import DeviceFacts, ModelFacts
from tests.board import OPS, Board

WINDOWS = pd.DataFrame(
    {
        "signature": ["a", "a", "b"],
        "kernel": None,
        "duty": [0.5, 0.9, 0.5],
        "launches": 10.0,
        "seconds": 2.0,
        "dynamic_j": 5.0,
    }
).assign(floor_w=120.0, clock_mhz=1980.0)


def test_what_was_stored_is_found_under_its_key_alone(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "replays.parquet"
    store("one", WINDOWS, file)
    store("two", WINDOWS.assign(dynamic_j=7.0), file)
    assert list(load("one", file)["dynamic_j"]) == [5.0] * 3
    assert list(load("two", file)["dynamic_j"]) == [7.0] * 3
    assert load("three", file).empty


def test_a_signature_measured_again_replaces_the_old(tmp_path: Path) -> None:
    file = tmp_path / "replays.parquet"
    store("one", WINDOWS, file)
    store("one", WINDOWS[:1].assign(dynamic_j=6.0), file)
    found = load("one", file)
    assert sorted(found["dynamic_j"]) == [5.0, 6.0]
    assert set(found["signature"]) == {"a", "b"}


def test_a_torn_file_is_an_empty_cache_and_written_anew(tmp_path: Path) -> None:
    file = tmp_path / "replays.parquet"
    file.write_bytes(b"PAR1 torn")
    assert load("one", file).empty
    store("one", WINDOWS, file)
    assert len(load("one", file)) == 3


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store("one", WINDOWS, tmp_path / "file" / "replays.parquet")


def test_the_key_is_the_board_the_driver_and_the_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = DeviceFacts(kind="cuda", index=0, uuid="GPU-1", name="H100", driver_version="580", power_limit_mw=700_000)
    libraries = {"torch": "2.11", "bitsandbytes": "0.50"}
    model = ModelFacts(name="m", weights="random", weight_bytes=1, weights_key="random, seed 0, 6 outliers")
    key = cache_key(device, libraries, model)
    assert key == cache_key(device, {**libraries, "pandas": "2"}, replace(model, name="the same weights"))
    assert key != cache_key(replace(device, uuid="GPU-2"), libraries, model)
    assert key != cache_key(device, {**libraries, "torch": "2.12"}, model)
    # C5: weights that are random draw other power than those of a trained model.
    assert key != cache_key(device, libraries, replace(model, weights_key="hub Qwen/Qwen2.5-7B-Instruct"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "llmkern" / "replays.parquet"


def test_cached_windows_explain_a_run_as_fresh_ones_do(tmp_path: Path) -> None:
    first = Board()
    first.play()
    run = first.write(tmp_path / "first")
    first_found = attribute(run)
    cached = to_cache(run, first_found.weighed, ("nvml_total", 0))
    assert len(cached) == 6
    # GIVEN a second run without replays of its own
    second = Board(seed=1, replayed=())
    second.play()
    second.replays = cached.to_dict("records")
    later: RunFolder = second.write(tmp_path / "second")
    attribution = attribute(later)
    assert attribution.marginals is not None
    for name in ("gemv", "softmax"):
        found = attribution.marginals.per_launch(name, regime=300.0)
        assert found.value == pytest.approx(OPS[name].joule, rel=0.03)
    assert to_cache(later, attribution.weighed, ("nvml_total", 0)).empty
