"""Roofs from data sheets, and the waste above them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmkern.explain.roofline import peaks, roofline
from llmkern.runfolder.facts import DeviceFacts
from tests.recorded import recorded

H100 = DeviceFacts(
    kind="cuda",
    index=0,
    name="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    multiprocessors=132,
    # What the driver of every H100 SXM says; the data sheet counts with 1830.
    sm_clock_max_mhz=1980,
)


def test_the_peaks_of_an_h100_are_those_of_its_data_sheet() -> None:
    found = peaks(H100)
    assert found is not None
    assert found.bytes_per_s == 3.35e12
    for dtype, tera in (("bf16", 989), ("int8", 1979), ("fp32", 62)):
        assert found.flops[dtype] / 1e12 == pytest.approx(tera, rel=0.01)


def test_a_board_says_its_own_bandwidth_and_an_unknown_one_has_no_roof() -> None:
    own = peaks(replace(H100, memory_bytes_per_s=4.8e12))
    assert own is not None
    assert own.bytes_per_s == 4.8e12
    assert peaks(DeviceFacts(kind="cpu", index=0, name="Some CPU")) is None
    bare = peaks(DeviceFacts(kind="cuda", index=0, name="NVIDIA H200", compute_capability="99.0"))
    assert bare is not None
    assert bare.flops == {}


def test_a_product_of_one_row_is_bound_by_its_weights() -> None:
    found = recorded("bf16-operators")
    rows = roofline(found, "decode").set_index(["op", "module"])
    up = rows.loc[("aten.linear.default", "model.layers.*.mlp.up_proj")]
    # 18944 x 3584 weights of 2 bytes, 28 times a token, one row in and one out.
    assert up["moved_bytes"] == pytest.approx(28 * 2 * (18944 * 3584 + 18944 + 3584))
    assert up["flops"] == pytest.approx(28 * 2 * 18944 * 3584)
    assert up["bound"] == "memory"
    # 3350 bytes a nanosecond.
    assert up["floor_ns"] == pytest.approx(up["moved_bytes"] / 3350)
    assert 0.6 < up["roof_share"] < 0.9
    floor_w = found.accounts["decode"].floor_w
    assert floor_w is not None
    assert up["waste_j"] == pytest.approx(floor_w.value * (up["duration_ns"] - up["floor_ns"]) / 1e9)
    assert up["floor_energy_j"] + up["waste_j"] == pytest.approx(up["energy_j"])


def test_a_product_of_many_rows_is_bound_by_its_flops() -> None:
    rows = roofline(recorded("bf16-operators"), "prefill").set_index(["op", "module"])
    assert rows.loc[("aten.linear.default", "model.layers.*.mlp.up_proj"), "bound"] == "compute"


def test_without_operators_there_is_no_roof() -> None:
    assert roofline(recorded("bf16"), "decode").empty
