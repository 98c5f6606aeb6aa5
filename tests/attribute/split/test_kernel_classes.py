"""One class of kernels has one joule per launch, in whatever operator it runs."""

from __future__ import annotations

import pandas as pd
import pytest

from llmkern.attribute.attribution import Attribution, attribute
from llmkern.attribute.split.kernel_classes import kernel_classes, launched_by
from llmkern.attribute.split.replay_plan import DUTIES, plan_replays, without
from llmkern.runfolder.replays import Launch
from tests.board import INT8, INT8_SMALL, Board
from tests.recorded import recorded

TOKEN = {"int8": 56, "int8 small": 56, "norm": 40}
PREFILL = {"gemv": 200, "softmax": 300, "norm": 100}
# What the plan asks for: the smaller kernels of each operator.
ALONE = tuple(("int8", part.name) for part in INT8 if part.name != "gemm s8")
ALONE += tuple(("int8 small", part.name) for part in INT8_SMALL if part.name != "gemm s8")


def rows(*kernels: tuple[str, str, float]) -> pd.DataFrame:
    frame = pd.DataFrame(kernels, columns=["signature", "name", "duration_ns"])
    return frame.assign(launches=1.0).astype({"signature": "category", "name": "category"})


def launch(name: str, blocks: int) -> Launch:
    return Launch(name, (blocks, 1, 1), (128, 1, 1))


def test_kernels_of_one_shape_and_length_are_one_class_wherever_they_run() -> None:
    launched = {
        "a": (launch("cast", 7), launch("gemm", 99)),
        "b": (launch("cast", 7), launch("gemm", 99)),
        "c": (launch("cast", 28),),
    }
    kernels = rows(
        *(("a", "cast", 2000.0), ("b", "cast", 2100.0), ("c", "cast", 2100.0)),
        # K is in neither grid nor block: a product that takes five times as long is another.
        *(("a", "gemm", 10_000.0), ("b", "gemm", 50_000.0)),
        # What has no grid is known by its operator, what has no operator by its name.
        *(("a", "memcpy", 1000.0), ("b", "memcpy", 1000.0), ("not identified", "cast", 2000.0)),
    )
    found = [str(name) for name in kernel_classes(kernels, launched)]
    assert found[0] == found[1] == "cast 7x1x1 of 128x1x1"
    assert found[2] == "cast 28x1x1 of 128x1x1"
    assert found[3] != found[4]
    assert found[5] != found[6]
    assert found[7] == "cast"


def test_what_a_call_launched_is_read_from_the_inspected_pass() -> None:
    run = recorded("int8")
    launched = launched_by(run.inspected, run.ops)
    (product,) = (s for s in launched if s.startswith("bitsandbytes.int8_mixed_scaled_mm.default[1x18944 1x18944"))
    names = [launch.name for launch in launched[product]]
    assert len(names) == 3
    assert [("gemm_s8" in names[0]), ("kdequant" in names[1]), ("direct_copy" in names[2])] == [True] * 3
    assert launched[product][1].block == (512, 1, 1)


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Attribution, Attribution]]:
    """Three boards with and without kernels replayed alone."""
    made = []
    for seed in range(3):
        pair = []
        for alone in ((), ALONE):
            board = Board(seed=seed, replayed=("int8", "int8 small", "gemv"), alone=alone, token=TOKEN, prefill=PREFILL)
            board.play()
            pair.append(attribute(board.write(tmp_path_factory.mktemp("board") / "run")))
        made.append((pair[0], pair[1]))
    return made


def dynamic(found: Attribution, op: str) -> pd.DataFrame:
    frame = found.split("decode", ["op", "name"])
    frame = frame[frame["op"] == op].set_index("name")
    floor_j = frame["energy_j"] - frame["dynamic_j"]
    return frame.assign(low=frame["low_j"] - floor_j, high=frame["high_j"] - floor_j)


def test_kernels_of_an_operator_get_their_own_joules(boards: list[tuple[Attribution, Attribution]]) -> None:
    held = errors = 0
    for _, found in boards:
        for op, parts in (("int8", INT8), ("int8 small", INT8_SMALL)):
            frame = dynamic(found, op)
            for part in parts:
                truth_j = TOKEN[op] * part.joule
                row = frame.loc[part.name]
                error = abs(row["dynamic_j"] / truth_j - 1)
                if part.name == "gemm s8":
                    assert error < 0.05, part
                held += row["low"] <= truth_j <= row["high"]
                errors += error > 0.3 and truth_j > 1e-3
    assert errors <= 1
    assert held >= 0.85 * 3 * (len(INT8) + len(INT8_SMALL))


def test_what_is_not_told_apart_has_an_interval_that_says_so(boards: list[tuple[Attribution, Attribution]]) -> None:
    for unresolved, resolved in boards:
        for name in ("cast", "dequant", "gemv outliers"):
            wide, narrow = (dynamic(found, "int8").loc[name] for found in (unresolved, resolved))
            assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])
        (group,) = (g for g in unresolved.marginals.groups if any("gemv outliers" in n for n in g))  # type: ignore[union-attr]
        assert len(group) == len(INT8)


def test_one_class_costs_the_same_in_every_operator() -> None:
    run = recorded("int8")
    joules = run.accounts["decode"].joules
    assert joules is not None
    kernels = run.kernels_of("decode")
    per_launch = joules.dynamic(kernels) / kernels["launches"]
    for _, own in per_launch.groupby(kernels["kernel_class"], observed=True):
        assert own.max() == pytest.approx(own.min())
    # The very sentence the tool exists for: a cast of one row is light, not as heavy a microsecond as the product.
    kinds = run.split("decode", ["kind"]).set_index("kind")
    watts = kinds["dynamic_j"] / kinds["duration_ns"] * 1e9
    assert watts["cast"] < 30
    assert watts["dequantize"] < 30
    assert watts["gemv"] > 250


def test_replays_alone_predict_what_the_counter_says(boards: list[tuple[Attribution, Attribution]]) -> None:
    for _, found in boards:
        closure = found.closures["decode"]
        assert abs(closure.error.value) < 0.05
        assert closure.error.low is not None
        assert closure.error.high is not None
        assert closure.error.low - 0.01 < 0 < closure.error.high + 0.01


def test_the_plan_takes_operators_apart_at_their_smaller_kernels() -> None:
    run = recorded("int8")
    phases = list(run.accounts)
    plan = plan_replays(run.kernels.drop(columns="kernel_class"), launched_by(run.inspected, run.ops), phases)
    alone = [(one.signature, name) for one in plan for name in one.alone]
    assert 8 <= len(alone) <= 24
    assert len(alone) == len(set(alone))
    for one in plan:
        assert one.duties == DUTIES or len(one.duties) == 1
        # What waits for the device cannot be captured whole; of its kernels those of PyTorch's operators can.
        if any(launch.name.startswith("memcpy DtoH") for launch in one.launched):
            assert all("at::native::" in name for name in one.alone)
    assert any("kdequant" in name for _, name in alone)
    first = plan[0]
    rest = without(plan, {(first.signature, None), (first.signature, first.alone[0])})
    assert rest[0].duties == ()
    assert rest[0].alone == first.alone[1:]
    assert without(plan, {(one.signature, None) for one in plan} | set(alone)) == []
