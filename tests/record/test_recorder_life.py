"""Recorders are made, used, closed and forgotten, from many threads, and nothing of them stays (C2, C3, C6, C7)."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from llmkern import _recorder
from llmkern.errors import DeviceError
from llmkern.record.device.cupti import CuptiRecorder

testing = _recorder.testing
MOST_LEFT_BYTES = 5 * 2**20


def records(count: int) -> bytes:
    start = 1_790_000_000_000_000_000 + np.arange(count) * 1000
    return testing.kernel_records(start_ns=start, end_ns=start + 400, names=["a kernel"])


@pytest.fixture
def fake(fake_cupti: str) -> ctypes.CDLL:
    library = ctypes.CDLL(fake_cupti)
    library.fake_emit.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    return library


def emit(fake: ctypes.CDLL, count: int) -> int:
    own = records(count)
    return int(fake.fake_emit(own, count, len(own) // count))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_fifty_recorders_leave_no_thread_no_file_and_no_memory(fake_cupti: str, fake: ctypes.CDLL) -> None:
    """C2: twelve recorders left twelve threads and 261 MiB."""

    def one() -> None:
        with CuptiRecorder(fake_cupti) as recorder:
            for host_calls in (False, True):
                recorder.start(host_calls=host_calls)
                assert emit(fake, 20_000) == 1
                recorder.stop()
                assert len(recorder.drain()["kernels"]["start_ns"]) == 20_000

    for _ in range(5):
        one()
    gc.collect()
    before = resident_bytes(), threads(), files()
    for _ in range(50):
        one()
    gc.collect()
    assert threads() == before[1]
    assert files() == before[2]
    # A sanitizer keeps books of its own.
    if "LD_PRELOAD" not in os.environ:
        assert resident_bytes() - before[0] <= MOST_LEFT_BYTES


def test_a_recorder_that_is_forgotten_is_closed(fake_cupti: str, fake: ctypes.CDLL) -> None:
    before = threads()
    recorder = CuptiRecorder(fake_cupti)
    recorder.start()
    assert emit(fake, 10) == 1
    del recorder
    gc.collect()
    assert threads() == before
    assert fake.fake_enabled() == 0
    assert not fake.fake_subscribed()


def test_a_closed_recorder_says_so_and_a_late_buffer_is_freed(fake_cupti: str, fake: ctypes.CDLL) -> None:
    recorder = CuptiRecorder(fake_cupti)
    recorder.start()
    recorder.close()
    recorder.close()
    with pytest.raises(DeviceError, match="closed: make another"):
        recorder.start()
    # CUPTI asks for a buffer, or brings one, after the last recorder: it gets none.
    assert emit(fake, 1) == 0


def test_a_larger_buffer_is_really_larger(fake_cupti: str, fake: ctypes.CDLL) -> None:
    """C6: pooled buffers kept their size while CUPTI was told the new one, and wrote beyond them."""
    recorder = _recorder.ActivityRecorder([], fake_cupti)
    for size in (64 << 10, 1 << 20, 32 << 10, 2 << 20):
        recorder.start(buffer_bytes=size)
        # More than a buffer holds, so that full ones come back into the pool.
        assert emit(fake, 30_000) == 1
        recorder.stop()
        assert len(recorder.drain()["kernels"]["start_ns"]) == 30_000
    recorder.close()
    assert recorder.statistics()["buffers_allocated"] == 0


def test_a_decoder_without_memory_loses_records_and_not_the_process(fake_cupti: str) -> None:
    """C3: bad_alloc in the decoding thread ended the process."""
    with CuptiRecorder(fake_cupti) as recorder:
        recorder.inject(records(100))
        recorder.settle()
        testing.fail_records(1)
        recorder.inject(records(100))
        recorder.settle()
        testing.fail_records(0)
        recorder.inject(records(100))
        recorder.settle()
        rows = recorder.drain()["kernels"]
        assert {len(column) for column in rows.values()} == {200}
        assert (rows["end_ns"] > rows["start_ns"]).all()
        facts = recorder.facts()
        assert facts.failed_decodes == 1
        assert facts.lost == 1


def test_starting_stopping_draining_and_calling_at_once(fake_cupti: str, fake: ctypes.CDLL) -> None:
    """C7: what several threads share is written under a lock or never again; TSAN watches this test."""
    done = threading.Event()
    recorder = CuptiRecorder(fake_cupti)

    def calls(first: int) -> None:
        number = first
        while not done.is_set():
            number += 2
            fake.fake_call(2, 1, number, 1)

    def drains() -> None:
        while not done.is_set():
            recorder.drain()
            recorder.flush()
            recorder.facts()

    workers = [threading.Thread(target=calls, args=(i,)) for i in range(3)] + [threading.Thread(target=drains)]
    for worker in workers:
        worker.start()
    for _ in range(20):
        recorder.start(host_calls=True)
        emit(fake, 200)
        recorder.stop()
    done.set()
    for worker in workers:
        worker.join()
    recorder.close()
    assert fake.fake_enabled() == 0


def test_a_sampler_is_started_stopped_and_drained_at_once(fake_nvml: str) -> None:
    sampler = _recorder.NvmlSampler(library=fake_nvml, index=0)
    done = threading.Event()

    def drains() -> None:
        while not done.is_set():
            sampler.drain()
            sampler.wait_for_tick(0.01)

    worker = threading.Thread(target=drains)
    worker.start()
    for _ in range(20):
        sampler.start()
        sampler.set_tick_interval_s(0.0)
        sampler.stop()
    done.set()
    worker.join()


@pytest.mark.parametrize(
    ("intervals_ms", "period_ms"),
    [
        ([100, 100, 100], 100),
        ([200, 100, 100, 100], 100),
        ([100, 200, 100, 200, 100], 100),
        ([100, 160, 100, 40, 100, 100, 100], 100),
        # Once the period is known ticks may be left out, and one in between says that it was not.
        ([200, 200, 200, 100, 100, 100], 100),
        ([100, 100, 100, 600, 1200, 100], 100),
        ([20, 20, 40, 20], 20),
    ],
)
def test_a_tick_that_was_missed_does_not_double_the_period(intervals_ms: list[int], period_ms: int) -> None:
    """C1: one hold-up of 60 ms among the first ticks, and every second tick was lost for good."""
    found = testing.tick_period_ns([ms * 1_000_000 for ms in intervals_ms], 100_000_000)
    assert found == pytest.approx(period_ms * 1_000_000, rel=0.05)


def test_two_intervals_are_too_few_to_know_a_period() -> None:
    assert testing.tick_period_ns([100_000_000, 200_000_000], 100_000_000) is None
