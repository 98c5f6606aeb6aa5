"""CUPTI and NVML for real: what was launched is what was recorded."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from llmkern.record.device.cuda import CudaDevice
from llmkern.record.device.cupti import CuptiRecorder
from tests.test_cli import ROOT


def recorded(work: Callable[[], None]) -> tuple[pd.DataFrame, pd.DataFrame, CuptiRecorder]:
    """Run *work* under the recorder and return its kernels, host calls and the recorder."""
    work()
    torch.cuda.synchronize()
    recorder = CuptiRecorder()
    recorder.start()
    try:
        work()
        torch.cuda.synchronize()
        recorder.discard()
        work()
        torch.cuda.synchronize()
    finally:
        recorder.stop()
    rows = recorder.drain()
    frames = []
    for table in ("kernels", "launches"):
        columns = {k: v.to_pandas() if hasattr(v, "to_pandas") else v for k, v in rows[table].items()}
        frames.append(pd.DataFrame(columns))
    return frames[0], frames[1], recorder


@pytest.fixture(scope="module")
def ones() -> torch.Tensor:
    return torch.ones(1024, device="cuda")


def test_every_launch_has_its_kernel_and_its_host_call(ones: torch.Tensor) -> None:
    def work() -> None:
        for _ in range(500):
            ones.add_(1.0)

    kernels, launches, recorder = recorded(work)
    kernels = kernels[kernels["kind"] == "kernel"]
    assert len(kernels) == 500
    assert kernels["name"].str.contains("elementwise").all()
    assert (kernels["end_ns"] > kernels["start_ns"]).all()
    launching = launches[launches["api"].str.contains("Launch")]
    assert len(launching) == 500
    joined = kernels.merge(launching, on="correlation_id", suffixes=("", "_host"))
    assert len(joined) == 500
    assert (joined["start_ns_host"] <= joined["start_ns"]).all()
    assert set(launching["thread"]) == {threading.get_native_id()}
    assert set(kernels["correlation_id"]) == set(launching["correlation_id"])
    facts = recorder.facts()
    assert facts.dropped_records == facts.lost_timestamps == facts.unknown_records == 0


def test_one_clock(ones: torch.Tensor) -> None:
    begin_ns = time.time_ns()
    kernels, launches, _ = recorded(lambda: ones.add_(1.0))  # type: ignore[arg-type,return-value]
    end_ns = time.time_ns()
    for times in (kernels["start_ns"], kernels["end_ns"], launches["start_ns"]):
        assert times.between(begin_ns, end_ns).all()


def test_copies_synchronisations_and_allocations(ones: torch.Tensor) -> None:
    def work() -> None:
        ones.cpu()
        torch.cuda.synchronize()

    kernels, launches, _ = recorded(work)
    copies = kernels[kernels["kind"] == "memcpy"]
    assert list(copies["copied_bytes"]) == [4096]
    assert list(copies["name"]) == ["memcpy DtoH (pageable)"]
    calls = set(launches["api"])
    assert any(c.startswith("cudaMemcpy") for c in calls)
    assert any("Synchronize" in c for c in calls)


def test_a_cuda_graph_gives_every_node(ones: torch.Tensor) -> None:
    graph = torch.cuda.CUDAGraph()
    ones.add_(1.0)
    with torch.cuda.graph(graph):
        for _ in range(50):
            ones.mul_(1.0)
    kernels, launches, recorder = recorded(lambda: [graph.replay() for _ in range(4)])  # type: ignore[arg-type,return-value]
    kernels = kernels[kernels["kind"] == "kernel"]
    assert len(kernels) == 200
    assert (kernels["graph_id"] > 0).all()
    assert kernels["graph_node_id"].nunique() == 50
    assert (launches["api"] == "cudaGraphLaunch").sum() == 4
    assert recorder.facts().dropped_records == 0


def test_streams_and_threads_are_told_apart(ones: torch.Tensor) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    ids: list[int] = []

    def launch(stream: torch.cuda.Stream) -> None:
        ids.append(threading.get_native_id())
        with torch.cuda.stream(stream):
            for _ in range(100):
                torch.ones(64, device="cuda").add_(1.0)

    def work() -> None:
        ids.clear()
        threads = [threading.Thread(target=launch, args=(s,)) for s in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    kernels, launches, _ = recorded(work)
    kernels = kernels[kernels["kind"] == "kernel"]
    assert sorted(kernels.groupby("stream").size()) == [200, 200, 200]
    launching = launches[launches["api"].str.contains("Launch")]
    assert set(launching["thread"]) == set(ids)


def test_another_profiler_is_named() -> None:
    # In a process of its own, because torch.profiler keeps CUPTI until the process ends.
    program = """
import torch
from llmkern.errors import DeviceError
from llmkern.record.device.cupti import CuptiRecorder
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
    torch.ones(8, device="cuda").add_(1.0)
    try:
        CuptiRecorder().start()
    except DeviceError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "another profiler" in done.stdout
    assert "torch.profiler" in done.stdout


def test_two_recorders_in_turn(ones: torch.Tensor) -> None:
    for _ in range(3):
        kernels, _, _ = recorded(lambda: ones.add_(1.0))  # type: ignore[arg-type,return-value]
        assert (kernels["kind"] == "kernel").sum() == 1


def test_the_energy_counter_agrees_with_the_power_samples() -> None:
    meter = CudaDevice(0).meters()[0]
    meter.start()
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < 2.5:
        matrix @ matrix
        torch.cuda.synchronize()
    tick = meter.wait_for_tick(1.0)
    meter.stop()
    rows = meter.drain()
    assert tick is not None
    energy, power = rows["energy"], rows["power"]
    ticks, joule = np.asarray(energy["timestamp_ns"]), np.asarray(energy["energy_mj"]) / 1e3
    assert np.median(np.diff(ticks)) == pytest.approx(100e6, rel=0.05)
    mean_w = (joule[-1] - joule[2]) / ((ticks[-1] - ticks[2]) / 1e9)
    frame = pd.DataFrame({k: np.asarray(power[k]) for k in ("timestamp_ns", "power_mw")})
    frame["sensor"] = power["sensor"].to_pylist()
    samples = frame[(frame["sensor"] == "samples") & frame["timestamp_ns"].between(ticks[2], ticks[-1])]
    assert len(samples) > 50
    assert 150 < mean_w < 800
    assert samples["power_mw"].mean() / 1e3 == pytest.approx(mean_w, rel=0.1)
