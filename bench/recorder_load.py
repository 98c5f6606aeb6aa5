"""A long run through the recorder's own path: decoder, drain, Parquet segments, merge; memory and speed.

    python -m bench.recorder_load --kernels-per-second 50000 --seconds 600

Records are made in CUPTI's own layout and enter where CUPTI's buffers do, as fast as the machine takes them: the
memory that 10 minutes need shows without waiting 10 minutes. With --live a CUDA graph of tiny kernels makes them.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from bench.result import case, metric, write
from llmkern.record.device.cpu import CpuDevice
from llmkern.record.device.cupti import CuptiRecorder
from llmkern.record.device.native import native
from llmkern.record.passes.timeline import flushed
from llmkern.record.pump import Pump
from llmkern.runfolder import RunFolder, RunWriter
from llmkern.runfolder.facts import RunFacts

MEMORY_LIMIT_BYTES = 2**30
NAMES = [f"void kernel_{i}<float, {i}>(float*, int)" for i in range(40)]


def resident_bytes() -> int:
    """Return this process's memory now, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class Watch:
    """Keeps the largest resident size while it is open, above what there was before."""

    def __enter__(self) -> Watch:
        self._before, self.most_bytes = resident_bytes(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        return self

    def _loop(self) -> None:
        while not self._stop.wait(0.05):
            self.most_bytes = max(self.most_bytes, resident_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def generated(recorder: CuptiRecorder, per_second: int, seconds: int) -> int:
    """Inject *seconds* seconds of records, one second at a time, and return how many kernels they were."""
    testing = native().testing
    period_ns = 1_000_000_000 // per_second
    base_ns = time.time_ns()
    for second in range(seconds):
        index = np.arange(per_second, dtype=np.int64) + second * per_second
        start_ns = base_ns + index * period_ns
        buffer = testing.kernel_records(
            start_ns=start_ns,
            end_ns=start_ns + period_ns // 2,
            correlation_id=(index % (2**31 - 1)).astype(np.uint32),
            name=(index % len(NAMES)).astype(np.int32),
            names=NAMES,
        )
        recorder.inject(buffer)
        # Injection has no back pressure, a GPU has: wait until the pump has taken most of it.
        while recorder.backlog() > 2 * per_second:
            time.sleep(0.001)
    return per_second * seconds


def live(per_second: int, seconds: int) -> int:
    """Replay a CUDA graph of tiny kernels at about the wanted rate and return how many kernels ran."""
    value = torch.ones(32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    nodes = 1000
    with torch.cuda.graph(graph):
        for _ in range(nodes):
            value.add_(1.0)
    begin_s = time.monotonic()
    replays = per_second * seconds // nodes
    for i in range(replays):
        graph.replay()
        torch.cuda.synchronize()
        time.sleep(max(0.0, begin_s + (i + 1) * nodes / per_second - time.monotonic()))
    return replays * nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels-per-second", type=int, default=50_000)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    recorder = CuptiRecorder()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        writer = RunWriter(path, RunFacts(device=CpuDevice().facts()))
        if arguments.live:
            torch.zeros(1, device="cuda")
            recorder.start()
        begin_s = time.monotonic()
        with Watch() as watch:
            with Pump(writer, [lambda: flushed(recorder, "time")]):
                if arguments.live:
                    kernels = live(arguments.kernels_per_second, arguments.seconds)
                    recorder.stop()
                else:
                    kernels = generated(recorder, arguments.kernels_per_second, arguments.seconds)
                    recorder.settle()
            recorded_s = time.monotonic() - begin_s
            writer.merge()
            writer.publish()
        total_s = time.monotonic() - begin_s
        rows = pq.ParquetFile(path / "kernels.parquet").metadata.num_rows
        size_bytes = sum(f.stat().st_size for f in path.iterdir())
        complete = RunFolder(path).complete
    facts = recorder.facts()
    # Replays before the timed part (capture's warm-up) may add kernels, never take any away.
    whole = rows >= kernels if arguments.live else rows == kernels
    passed = whole and complete and watch.most_bytes < MEMORY_LIMIT_BYTES and facts.dropped_records == 0
    metrics: dict[str, Any] = {
        "kernels": metric(kernels, "1"),
        "rows_in_parquet": metric(rows, "1"),
        "peak_memory_above_start": metric(watch.most_bytes, "B"),
        "peak_memory_of_process": metric(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "B"),
        "recording": metric(recorded_s, "s"),
        "merging": metric(total_s - recorded_s, "s"),
        "kernels_per_second_sustained": metric(kernels / recorded_s, "1/s"),
        "run_folder": metric(size_bytes, "B"),
        "dropped_records": metric(facts.dropped_records, "1"),
    }
    for name, entry in metrics.items():
        print(f"{name:32s} {entry['value']:16,.1f} {entry['unit']}")
    parameters = {"kernels_per_second": arguments.kernels_per_second, "seconds": arguments.seconds}
    name = "live CUDA graph" if arguments.live else "generated records"
    bench = "recorder_load_live" if arguments.live else "recorder_load"
    print(write(bench, [case(name, parameters, metrics, passed)], arguments.results), "passed" if passed else "FAILED")


if __name__ == "__main__":
    main()
