"""Predictions on recorded runs: within what physics allows, and in the right order."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from llmkern.attribute.attribution import attribute
from llmkern.explain.whatif import Prediction, conversions, predict
from tests.recorded import recorded
from tests.synthetic import synthetic_run


def made(name: str, phase: str = "decode") -> dict[str, Prediction]:
    return {p.name: p for p in predict(recorded(name)) if p.phase == phase}


def test_a_graph_takes_little_longer_than_its_kernels() -> None:
    account = recorded("bf16-operators").accounts["decode"]
    graph = made("bf16-operators")["graph"]
    # 7.8 ms of kernels, about 1 µs between 1,305 of them, and the token boundary.
    assert account.busy_s < graph.latency_s.value < account.busy_s + 1305 * 2e-6
    assert graph.energy_j is not None
    assert account.floor_w is not None
    assert account.weight.energy_j is not None
    saved_s = account.weight.latency_s.value - graph.latency_s.value
    # The kernels cost what they cost: what goes is the floor of the gaps.
    assert account.weight.energy_j.value - graph.energy_j.value == pytest.approx(account.floor_w.value * saved_s)


def test_a_faster_host_halves_what_the_host_decides() -> None:
    for name in ("int8", "bf16-operators"):
        faster = made(name)["host-2x"]
        assert 0.5 < faster.latency_s.value / faster.latency_before_s < 0.56


def test_a_prediction_is_as_uncertain_as_what_its_kernels_take() -> None:
    """What the kernels that stay take above the floor is known to within the split, and as they are now: in gaps."""
    found = made("int8")
    layers, graph = found["fused-layers"].energy_j, found["graph"].energy_j
    assert layers is not None
    assert layers.low is not None
    assert layers.high is not None
    # Measured later, on another board: 1.57 J.
    assert 0.6 * layers.value < layers.low < 1.57 < layers.high < 1.4 * layers.value
    # A graph keeps all kernels, only closer together; most of its joules are the floor's.
    assert graph is not None
    assert graph.low is not None
    assert graph.high is not None
    assert (graph.high - graph.low) / graph.value < (layers.high - layers.low) / layers.value


def test_fused_layers_leave_no_gaps_for_their_kernels_are_launched_early() -> None:
    account = recorded("int8").accounts["decode"]
    after = made("int8")["fused-layers"]
    assert after.latency_s.value < account.busy_s
    # Weights of 7.6 GB at four fifths of the roof and attention, and no microsecond for each of 280 launches.
    assert after.latency_s.value < 3.1e-3


def test_less_work_is_predicted_to_be_faster_in_this_order() -> None:
    found = made("int8")
    latency = {name: p.latency_s.value for name, p in found.items()}
    assert latency["fused-graph"] < latency["graph"] < latency["dequant-fused"] < latency["syncs-removed"]
    assert all(p.latency_s.value < p.latency_before_s for p in found.values())
    launches = {name: p.launches for name, p in found.items()}
    assert launches["graph"] == pytest.approx(4525, abs=1)
    # 2,464 outlier launches go with the waits: a run at threshold 0 launched as many less. With the conversions go 196
    # each of quantize, dequantize and the casts before and after the product.
    assert launches["graph"] - launches["syncs-removed"] == pytest.approx(2464, abs=1)
    assert launches["syncs-removed"] - launches["dequant-fused"] == pytest.approx(784, abs=1)


def test_bf16_has_no_dequantization_to_fuse() -> None:
    assert not {"dequant-fused", "fused-graph", "syncs-removed"} & set(made("bf16-operators"))


def test_only_conversions_at_a_products_inputs_are_fused() -> None:
    kinds = ["cast", "cast", "dequantize", "gemm", "outlier"]
    modules = ["model.layers.*.mlp.up_proj", "model.layers.*.input_layernorm", "", "model.layers.*.mlp.up_proj", ""]
    assert conversions(pd.DataFrame({"kind": kinds, "module": modules})).tolist() == [True, False, True, False, True]


def test_without_energy_latency_is_predicted_and_without_host_calls_nothing(tmp_path: Path) -> None:
    run, _ = synthetic_run(tmp_path / "time", energy=False)
    found = predict(attribute(run))
    assert {p.name for p in found} >= {"graph", "host-2x"}
    assert all(p.energy_j is None for p in found)
    bare, _ = synthetic_run(tmp_path / "bare")
    (bare.path / "launches.parquet").unlink()
    assert predict(attribute(bare)) == []
