"""Gaps planted on an H100 (bench.gaps --keep), and the causes named in what was recorded."""

from __future__ import annotations

import pandas as pd
import pytest

from bench.gaps import MOST_WRONG, PLANTS, GapPlant, judged, named
from llmkern.runfolder import RunFolder
from tests.recorded import DATA


@pytest.mark.parametrize("plant", PLANTS, ids=[plant.name for plant in PLANTS])
def test_a_planted_gap_is_named_by_its_cause(plant: GapPlant) -> None:
    run = RunFolder(DATA / f"h100-gap-{plant.name.replace(' ', '-')}")
    assert (run.facts.labels["plant"], run.facts.labels["cause"]) == (plant.name, plant.cause)
    counts = named(run, plant.graph)
    assert counts.sum() >= 19
    assert counts.get(plant.cause, 0) / counts.sum() >= 1 - MOST_WRONG


def test_a_wrong_name_is_a_miss() -> None:
    plant = PLANTS[0]
    assert judged(plant, pd.Series({plant.cause: 19, "sync_stall": 1}))["passed"]
    assert not judged(plant, pd.Series({plant.cause: 18, "sync_stall": 2}))["passed"]
    assert not judged(plant, pd.Series(dtype=int))["passed"]
