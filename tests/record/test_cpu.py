"""The CPU as a device: operators for kernels."""

from __future__ import annotations

import threading
import time

import torch

from llmkern.record.device.cpu import CpuDevice, OperatorRecorder, cpu_name


def test_what_computes_is_recorded_and_views_are_not() -> None:
    recorder = OperatorRecorder()
    x = torch.ones(8, 8)
    recorder.start()
    begin_ns = time.time_ns()
    y = (x @ x).view(64)[3:9].reshape(2, 3)
    y.add_(1.0)
    assert torch._has_compatible_shallow_copy_type(x, y)
    end_ns = time.time_ns()
    recorder.stop()
    torch.exp(x)
    rows = recorder.drain()["kernels"]
    assert rows["name"] == ["aten.mm.default", "aten.add_.Tensor"]
    assert rows["correlation_id"] == [1, 2]
    assert set(rows["stream"]) == {threading.get_native_id()}
    for start, end in zip(rows["start_ns"], rows["end_ns"], strict=True):
        assert begin_ns <= start <= end <= end_ns
    assert recorder.drain()["kernels"]["name"] == []
    assert recorder.facts().kernels == 2


def test_results_do_not_change_and_numbers_go_on() -> None:
    x = torch.randn(4, 4)
    recorder = OperatorRecorder()
    recorder.start()
    inside = torch.softmax(x, 0)
    recorder.drain()
    torch.neg(x)
    recorder.stop()
    recorder.stop()
    assert torch.equal(inside, torch.softmax(x, 0))
    assert recorder.drain()["kernels"]["correlation_id"] == [2]


def test_discarding_forgets() -> None:
    recorder = OperatorRecorder()
    recorder.start()
    torch.neg(torch.ones(1))
    recorder.discard()
    recorder.stop()
    assert recorder.drain()["kernels"]["name"] == []


def test_the_processor_has_a_name() -> None:
    assert cpu_name()
    facts = CpuDevice().facts()
    assert facts.kind == "cpu"
    assert facts.memory_bytes > 2**30
