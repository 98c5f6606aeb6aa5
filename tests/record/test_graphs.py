"""CUDA graphs as operators: seen while they are launched, named within the process, never cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from llmkern.record import replay_cache
from llmkern.record.graphs import OPERATOR, graph_signature, is_graph, launches_seen
from llmkern.record.passes.inspection import Inspector
from llmkern.record.passes.kept import Keeper


class Graph:
    """Stands for torch.cuda.CUDAGraph, which no machine without a GPU can make."""

    launched = 0

    def replay(self) -> None:
        Graph.launched += 1


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    Graph.launched = 0


def test_a_launch_is_seen_and_still_happens() -> None:
    seen: list[Any] = []
    graph, before = Graph(), Graph.replay
    with launches_seen(lambda g, start_ns, end_ns: seen.append((g, end_ns - start_ns))):
        graph.replay()
    graph.replay()
    assert [g for g, _ in seen] == [graph]
    assert seen[0][1] >= 0
    assert Graph.launched == 2
    assert Graph.replay is before


def test_a_graph_is_an_operator_of_the_inspection_and_can_be_replayed() -> None:
    graph, other = Graph(), Graph()
    inspector = Inspector(torch.nn.Module(), lambda: ("decode", 3))
    with inspector.watching():
        graph.replay()
        other.replay()
        graph.replay()
    names = [call.signature for call in inspector.calls]
    assert names[0] == names[2] == graph_signature(graph)
    assert names[1] == graph_signature(other) != names[0]
    assert {(call.op, call.phase, call.token) for call in inspector.calls} == {(OPERATOR, "decode", 3)}
    keeper = Keeper(torch.nn.Module(), {names[0]})
    with keeper.keeping():
        graph.replay()
        other.replay()
    assert list(keeper.cases) == [names[0]]
    launched = Graph.launched
    keeper.cases[names[0]].run(0)
    assert Graph.launched == launched + 1


def test_a_graph_is_never_cached(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {"signature": [graph_signature(Graph()), "aten.mm"], "kernel": None, "duty": 0.3, "launches": 1.0}
    )
    file = tmp_path / "replays.parquet"
    replay_cache.store("board", rows.assign(seconds=2.0, dynamic_j=1.0, floor_w=120.0, clock_mhz=1980.0), file)
    assert list(replay_cache.load("board", file)["signature"]) == ["aten.mm"]
    assert not is_graph("aten.mm")
