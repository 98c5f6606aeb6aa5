"""The recorder against hand-built records and a stand-in for CUPTI whose behaviour is known."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from llmkern import _recorder
from llmkern.errors import DeviceError
from llmkern.record.device.cupti import CuptiRecorder

testing = _recorder.testing


@pytest.fixture
def recorder(fake_cupti: str) -> Iterator[CuptiRecorder]:
    recorder = CuptiRecorder(fake_cupti)
    yield recorder
    recorder.stop()


@pytest.fixture
def fake(fake_cupti: str) -> ctypes.CDLL:
    library = ctypes.CDLL(fake_cupti)
    library.fake_emit.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    return library


def kernels(count: int, first_ns: int = 1_790_000_000_000_000_000, **more: object) -> bytes:
    start = first_ns + np.arange(count) * 1000
    return testing.kernel_records(start_ns=start, end_ns=start + 400, names=["_Z6kernelIfEvPT_i", "plain"], **more)


def emit(fake: ctypes.CDLL, records: bytes, count: int) -> None:
    assert fake.fake_emit(records, count, len(records) // count) == 1


def column(rows: dict, name: str) -> list:
    values = rows[name]
    return values.to_pylist() if hasattr(values, "to_pylist") else list(values)


@pytest.mark.parametrize("host_calls", [True, False])
def test_only_host_calls_hold_a_subscription(recorder: CuptiRecorder, fake: ctypes.CDLL, host_calls: bool) -> None:
    recorder.start(host_calls=host_calls)
    assert bool(fake.fake_subscribed()) == host_calls
    emit(fake, kernels(2), 2)
    recorder.stop()
    assert len(column(recorder.drain()["kernels"], "name")) == 2
    assert not fake.fake_subscribed()


def test_kernels_are_decoded_field_by_field(recorder: CuptiRecorder, fake: ctypes.CDLL) -> None:
    recorder.start()
    ids = np.arange(1, 4)
    emit(
        fake,
        kernels(3, name=[0, 1, 0], correlation_id=ids, device=[0, 1, 0], stream=[7, 13, 7], graph_id=[0, 5, 0]),
        3,
    )
    recorder.stop()
    rows = recorder.drain()["kernels"]
    assert column(rows, "name") == ["void kernel<float>(float*, int)", "plain", "void kernel<float>(float*, int)"]
    assert column(rows, "kind") == ["kernel"] * 3
    assert column(rows, "correlation_id") == [1, 2, 3]
    assert column(rows, "device") == [0, 1, 0]
    assert column(rows, "stream") == [7, 13, 7]
    assert column(rows, "graph_id") == [0, 5, 0]
    assert column(rows, "start_ns")[1] == 1_790_000_000_000_001_000
    assert [e - s for s, e in zip(column(rows, "start_ns"), column(rows, "end_ns"), strict=True)] == [400] * 3
    assert column(rows, "grid_x") == [132] * 3
    assert column(rows, "block_x") == [256] * 3
    assert column(rows, "registers") == [64] * 3
    assert column(rows, "shared_bytes") == [3072] * 3


@pytest.mark.parametrize(
    ("records", "name", "kind"),
    [
        (
            testing.memcpy_records(start_ns=[10], end_ns=[20], bytes=[4096], copy_kind=2, src_kind=3, dst_kind=1),
            "memcpy DtoH (pageable)",
            "memcpy",
        ),
        (
            testing.memcpy_records(start_ns=[10], end_ns=[20], bytes=[4096], copy_kind=1, src_kind=2, dst_kind=3),
            "memcpy HtoD (pinned)",
            "memcpy",
        ),
        (testing.memset_records(start_ns=[10], end_ns=[20], bytes=[4096]), "memset", "memset"),
    ],
)
def test_copies_and_memsets_are_kernels_too(
    recorder: CuptiRecorder, fake: ctypes.CDLL, records: bytes, name: str, kind: str
) -> None:
    recorder.start()
    emit(fake, records, 1)
    recorder.stop()
    rows = recorder.drain()["kernels"]
    assert (column(rows, "name"), column(rows, "kind"), column(rows, "copied_bytes")) == ([name], [kind], [4096])


def test_overheads_of_cupti_are_kept(recorder: CuptiRecorder, fake: ctypes.CDLL) -> None:
    recorder.start()
    emit(fake, testing.overhead_records(start_ns=[10], end_ns=[20], kind=1 << 16, thread=5), 1)
    recorder.stop()
    rows = recorder.drain()["overheads"]
    assert column(rows, "kind") == ["CUPTI buffer flush"]
    assert column(rows, "thread") == [5]


def test_lost_times_and_dropped_records_are_counted(
    recorder: CuptiRecorder, fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DROPPED", "3")
    recorder.start()
    emit(fake, testing.kernel_records(start_ns=[0, 10], end_ns=[0, 20], names=["k"]), 2)
    recorder.stop()
    facts = recorder.facts()
    assert (facts.kernels, facts.lost_timestamps, facts.dropped_records) == (1, 1, 3)
    assert len(column(recorder.drain()["kernels"], "name")) == 1


def test_many_buffers_lose_nothing_and_come_back_zeroed(recorder: CuptiRecorder, fake: ctypes.CDLL) -> None:
    recorder.start()
    # 216 bytes each: some forty buffers of 1 MiB, more than are pooled at first
    count, rounds = 20_000, 10
    for i in range(rounds):
        emit(fake, kernels(count, first_ns=1 + i), count)
    recorder.stop()
    assert len(recorder.drain()["kernels"]["start_ns"]) == count * rounds
    assert recorder.facts().buffers_in_flight == 0


def test_host_calls_are_traced_one_by_one(recorder: CuptiRecorder, fake: ctypes.CDLL) -> None:
    recorder.start()
    begin_ns = time.time_ns()
    fake.fake_call(2, 1, 11, 0)  # cudaLaunchKernel
    fake.fake_call(2, 2, 12, 0)  # cudaGetDevice: not of interest
    fake.fake_call(2, 3, 13, 1)  # __cudaLaunchKernel with cuLaunchKernel inside: one call
    fake.fake_call(1, 1, 14, 0)  # cuLaunchKernel alone, as Triton launches
    fake.fake_call(1, 2, 15, 0)  # cuCtxGetCurrent: not of interest
    end_ns = time.time_ns()
    recorder.stop()
    rows = recorder.drain()["launches"]
    assert column(rows, "correlation_id") == [11, 13, 14]
    assert column(rows, "api") == ["cudaLaunchKernel", "__cudaLaunchKernel", "cuLaunchKernel"]
    assert set(column(rows, "thread")) == {threading.get_native_id()}
    for start, end in zip(column(rows, "start_ns"), column(rows, "end_ns"), strict=True):
        assert begin_ns <= start <= end <= end_ns
    assert (recorder.facts().launches, recorder.facts().nested_calls) == (3, 1)


def test_calls_of_many_threads_keep_their_thread(recorder: CuptiRecorder, fake: ctypes.CDLL) -> None:
    recorder.start()
    seen: dict[int, int] = {}

    def call(base: int) -> None:
        for i in range(1000):
            fake.fake_call(2, 1, base + i, 1)
        seen[threading.get_native_id()] = base

    threads = [threading.Thread(target=call, args=(k * 10_000,)) for k in range(4)]
    for thread in threads:
        thread.start()
    drained = [recorder.drain()["launches"]]
    for thread in threads:
        thread.join()
    recorder.stop()
    drained.append(recorder.drain()["launches"])
    owners = [t for rows in drained for t in column(rows, "thread")]
    ids = [c for rows in drained for c in column(rows, "correlation_id")]
    assert len(ids) == len(set(ids)) == 4000
    assert {i - i % 10_000 for i in ids} == {0, 10_000, 20_000, 30_000}
    assert set(owners) == set(seen)


def test_a_call_cut_in_half_by_stop_does_not_silence_its_thread(recorder: CuptiRecorder, fake: ctypes.CDLL) -> None:
    recorder.start()
    fake.fake_half_call(2, 1, 1, 0)
    recorder.stop()
    recorder.start()
    fake.fake_half_call(2, 1, 1, 1)
    fake.fake_call(2, 1, 2, 0)
    recorder.stop()
    assert column(recorder.drain()["launches"], "correlation_id") == [2]


def test_nothing_stays_enabled(recorder: CuptiRecorder, fake: ctypes.CDLL) -> None:
    for _ in range(2):
        recorder.start()
        assert fake.fake_enabled() == 5 + 5
        assert fake.fake_subscribed()
        recorder.stop()
        assert fake.fake_enabled() == 0
        assert not fake.fake_subscribed()
        recorder.stop()


def test_discarding_forgets_half_full_buffers_too(recorder: CuptiRecorder, fake: ctypes.CDLL) -> None:
    recorder.start()
    emit(fake, kernels(5), 5)
    fake.fake_call(2, 1, 1, 0)
    recorder.discard()
    emit(fake, kernels(2), 2)
    recorder.stop()
    rows = recorder.drain()
    assert len(rows["kernels"]["start_ns"]) == 2
    assert len(rows["launches"]["start_ns"]) == 0


def test_another_profiler_is_a_sentence_and_nothing_is_left_enabled(
    recorder: CuptiRecorder, fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TAKEN", "1")
    with pytest.raises(DeviceError, match=r"MULTIPLE_SUBSCRIBERS.*another profiler.*torch\.profiler.*run without it"):
        recorder.start()
    assert fake.fake_enabled() == 0
    monkeypatch.delenv("FAKE_TAKEN")
    recorder.start()
    recorder.stop()


def test_no_permission_is_a_sentence_and_nothing_is_left_enabled(
    recorder: CuptiRecorder, fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DENIED", "1")
    with pytest.raises(DeviceError, match=r"record kernels.*restricted to administrators.*NVreg_Restrict"):
        recorder.start()
    assert fake.fake_enabled() == 0
    assert not fake.fake_subscribed()


def test_two_recorders_at_once_are_refused(fake_cupti: str) -> None:
    first, second = CuptiRecorder(fake_cupti), CuptiRecorder(fake_cupti)
    first.start()
    try:
        with pytest.raises(DeviceError, match="another llmkern recorder is running"):
            second.start()
    finally:
        first.stop()


def test_too_old_a_library_is_a_sentence(fake_cupti: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VERSION", "17")
    with pytest.raises(DeviceError, match="API version 17, at least 18"):
        CuptiRecorder(fake_cupti)


def test_a_missing_library_is_a_sentence() -> None:
    with pytest.raises(DeviceError, match=r"cannot be loaded.*pip install nvidia-cuda-cupti"):
        CuptiRecorder("/nowhere/libcupti.so.13")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_real_library_without_a_gpu_says_so() -> None:
    recorder = CuptiRecorder()
    with pytest.raises(DeviceError, match="no usable NVIDIA GPU or driver"):
        recorder.start()
    assert abs(recorder.facts().clock_offset_ns) < 50_000_000


def test_a_million_records_are_decoded_in_seconds(recorder: CuptiRecorder, fake: ctypes.CDLL) -> None:
    records = kernels(100_000)
    fake.fake_emit(b"", 0, len(records) // 100_000)
    begin_s = time.monotonic()
    for _ in range(10):
        recorder.inject(records)
        recorder.settle()
    assert time.monotonic() - begin_s < 8
    assert recorder.facts().kernels == 1_000_000
