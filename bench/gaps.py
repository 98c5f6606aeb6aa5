"""Idle gaps planted into a decode loop on a GPU, each of a known cause, and the cause that llmkern names.

python -m bench.gaps [--keep DIR]

A gap is planted behind every layer of a small model, or between two forwards. --keep writes what was recorded as run
folders small enough for the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bench.planted import CATEGORY, Plant, Planted, Work
from bench.result import case, metric, write
from bench.workload import loaded_at, published, rig_of
from llmkern.attribute.time.causes import gap_causes
from llmkern.attribute.time.timeline import Timeline, read_calls, read_timeline
from llmkern.record.annotate import Annotator
from llmkern.record.device.choose import choose_device
from llmkern.record.device.interface import Device
from llmkern.record.options import TraceOptions
from llmkern.record.passes.timeline import record_timeline
from llmkern.runfolder import RunFolder
from llmkern.workload.load import LoadedModel

MODEL, PROMPT_TOKENS, NEW_TOKENS, REPEATS = "qwen-tiny", 32, 6, 4
IDLE_S = 300e-6
# A planted gap is at least this long; the loop's own are a few times shorter.
LEAST_NS = 150_000
# What a plant leaves behind may come to light a little after the host has gone on.
_AFTER_NS = 600_000
# About 100 µs of an H100's clock: the device is still at it when the host asks for the result.
_SPIN_CYCLES = 200_000
MOST_WRONG = 0.05


@dataclass(frozen=True)
class GapPlant:
    """Idle time of a known *cause*, by *make*'s work behind every layer or, *between*, between two forwards."""

    name: str
    cause: str
    make: Callable[[torch.device], Work]
    between: bool = False
    graph: bool = False


def _sleeping_host(_device: torch.device) -> Work:
    return lambda: time.sleep(IDLE_S)


def _read_back(device: torch.device) -> Work:
    x = torch.ones(1024, device=device)

    def work() -> float:
        _spin(device)
        value = x.sum().item()
        time.sleep(IDLE_S)
        return value

    return work


def _synchronize(device: torch.device) -> Work:
    def work() -> None:
        _spin(device)
        torch.cuda.synchronize(device)
        time.sleep(IDLE_S)

    return work


def _spin(device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda._sleep(_SPIN_CYCLES)  # type: ignore[no-untyped-call]


def _dependency(device: torch.device) -> Work:
    """The kernel waits for an event behind a function that the host runs in a second stream."""
    side = torch.cuda.Stream(device)
    runtime = ctypes.CDLL("libcudart.so.13")
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: time.sleep(IDLE_S))
    x = torch.ones(1024, device=device)

    def work() -> None:
        main = torch.cuda.current_stream(device)
        side.wait_stream(main)
        runtime.cudaLaunchHostFunc(ctypes.c_void_p(side.cuda_stream), callback, None)
        main.wait_stream(side)
        x.add(1)
        # Long enough for the device to be in the middle of the wait when the host goes on.
        end_s = time.perf_counter() + 20e-6
        while time.perf_counter() < end_s:
            pass

    return work


def _graph(device: torch.device) -> Work:
    x = torch.ones(1024, device=device)
    x.add(1)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            x.add(1)
    return graph.replay


PLANTS = (
    GapPlant("sleeping host", "launch_bound", _sleeping_host),
    GapPlant("read-back", "sync_stall", _read_back),
    GapPlant("explicit synchronize", "sync_stall", _synchronize),
    GapPlant("dependency on a second stream", "dependency", _dependency),
    GapPlant("token-boundary callback", "token_boundary", _sleeping_host, between=True),
    GapPlant("graph launch", "launch_latency", _graph, graph=True),
)


@contextmanager
def between_forwards(model: Any, work: Work, annotator: Annotator, name: str) -> Iterator[None]:
    """Run *work* between two forwards of generate for the time."""
    update = model._update_model_kwargs_for_generation

    @functools.wraps(update)
    def called(*args: Any, **kwargs: Any) -> Any:
        with annotator.range(name, CATEGORY):
            work()
        return update(*args, **kwargs)

    model._update_model_kwargs_for_generation = called
    try:
        yield
    finally:
        del model._update_model_kwargs_for_generation


def record(device: Device, loaded: LoadedModel, plant: GapPlant, out: Path) -> Path:
    """Record pass calls with the plant growing and return the run folder."""
    work = plant.make(device.torch_device)
    work()
    options = TraceOptions(MODEL, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
    rig = rig_of(device, loaded, options, out)
    rig.writer.note(labels={"plant": plant.name, "cause": plant.cause})
    for _ in range(3):
        rig.generation(NEW_TOKENS)
    rig.annotator.drain()
    if plant.between:
        growing = between_forwards(loaded.model, work, rig.annotator, plant.name)
    else:
        growing = Planted(loaded.model, Plant(plant.name, 1, plant.make), work, rig.annotator).growing()
    with growing:
        record_timeline(rig, "calls", REPEATS, lambda: None)
    return published(rig)


def named(run: RunFolder, graph: bool) -> pd.Series:
    """Return how many of the planted gaps of *run* were given each cause, "not found" for those without a gap."""
    device = run.facts.device.index
    calls = read_calls(run, "calls")
    timeline = read_timeline(run, device, "calls", calls)
    found = gap_causes(timeline, calls, run.table("overheads", where={"pass": "calls"}))
    if graph:
        return _within_graphs(timeline, found)
    ranges = run.table("ranges", where={"pass": "calls"})
    planted = ranges[ranges["category"] == CATEGORY].sort_values("start_ns")
    phases = timeline.phases[timeline.phases["phase"] == "decode"]
    inside = planted["start_ns"].map(
        lambda t: bool(((phases["start_ns"] < t) & (t < phases["end_ns"] - 1_000_000)).any())
    )
    planted = planted[inside.astype(bool)]
    start, end = found["start_ns"].to_numpy(), (found["start_ns"] + found["duration_ns"]).to_numpy()
    length, cause = found["duration_ns"].to_numpy(), found["cause"].astype(str).to_numpy()
    following = np.append(planted["start_ns"].to_numpy()[1:], np.iinfo(np.int64).max)
    given = []
    for first, last, next_ns in zip(planted["start_ns"], planted["end_ns"], following, strict=True):
        touching = (start < min(last + _AFTER_NS, next_ns)) & (end > first) & (length >= LEAST_NS)
        given.append(cause[touching][np.argmax(length[touching])] if touching.any() else "not found")
    return pd.Series(given, dtype=object).value_counts()


def _within_graphs(timeline: Timeline, gaps: pd.DataFrame) -> pd.Series:
    correlation = timeline.kernels["correlation_id"].to_numpy()
    ended_by = gaps["kernel"].to_numpy()
    same = correlation[ended_by] == correlation[ended_by - 1]
    return gaps["cause"][same & (gaps["phase"] == "decode").to_numpy()].astype(str).value_counts()


def judged(plant: GapPlant, counts: pd.Series) -> dict[str, Any]:
    """Return the case of one plant, printed as well."""
    total, right = int(counts.sum()), int(counts.get(plant.cause, 0))
    share = right / total if total else 0.0
    others = {str(name): int(count) for name, count in counts.items() if name != plant.cause}
    print(f"{plant.name}: {right} of {total} gaps named {plant.cause}; others {others}", flush=True)
    metrics = {"gaps": metric(total, "1"), "named_right": metric(share, "1")}
    passed = total > 0 and share >= 1 - MOST_WRONG
    return case(plant.name, {"cause": plant.cause, "others": others}, metrics, passed, "" if passed else str(others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the recorded run folders")
    parser.add_argument("--results", type=Path)
    chosen = parser.parse_args()
    device = choose_device("cuda")
    loaded = loaded_at(MODEL, "bf16", device)
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        for plant in PLANTS:
            folder = (chosen.keep or Path(scratch)) / plant.name.replace(" ", "-")
            run = RunFolder(record(device, loaded, plant, folder))
            cases.append(judged(plant, named(run, plant.graph)))
            write("gaps", cases, chosen.results)
    print(write("gaps", cases, chosen.results))


if __name__ == "__main__":
    main()
