"""The NVML thread against a stand-in sensor whose power, ticks and faults are known."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from llmkern import _recorder
from llmkern.errors import DeviceError
from llmkern.record.device.nvml import NvmlMeter, check_nvml


def watch(library: str, seconds: float, **options: object) -> tuple[_recorder.NvmlSampler, dict]:
    sampler = _recorder.NvmlSampler(library=library, index=0, **options)
    sampler.start()
    time.sleep(seconds)
    sampler.stop()
    return sampler, sampler.drain()


@pytest.mark.parametrize(("tick_ms", "cost_us"), [(100, 0), (100, 3000), (20, 0), (50, 1000)])
def test_ticks_are_found_where_they_are(
    fake_nvml: str, monkeypatch: pytest.MonkeyPatch, tick_ms: int, cost_us: int
) -> None:
    # GIVEN a counter that moves at whole multiples of its period
    monkeypatch.setenv("FAKE_TICK_MS", str(tick_ms))
    monkeypatch.setenv("FAKE_COST_US", str(cost_us))
    # WHEN it is followed for a while
    sampler, rows = watch(fake_nvml, 1.6)
    ticks, energy = rows["energy"]["timestamp_ns"], rows["energy"]["energy_mj"]
    # THEN nearly every tick is there, at its time, and the slope is the power
    assert len(ticks) > 0.7 * 1600 / tick_ms
    off_ns = (ticks + tick_ms * 500_000) % (tick_ms * 1_000_000) - tick_ms * 500_000
    assert np.median(np.abs(off_ns)) < 4e6
    assert np.abs(off_ns).max() <= 8e6 + rows["energy"]["uncertainty_ns"].max()
    watts = (energy[-1] - energy[0]) / 1e3 / ((ticks[-1] - ticks[0]) / 1e9)
    assert watts == pytest.approx(250, rel=0.02)
    assert sampler.tick_period_ms == pytest.approx(tick_ms, rel=0.05)


def test_few_ticks_when_asked_for_few(fake_nvml: str) -> None:
    sampler = _recorder.NvmlSampler(library=fake_nvml, index=0)
    sampler.start()
    time.sleep(0.6)
    sampler.drain()
    sampler.set_tick_interval_s(1.0)
    time.sleep(3.2)
    rare = len(sampler.drain()["energy"]["timestamp_ns"])
    # A wait does not have to wait for the rare tick.
    begin = time.monotonic()
    tick = sampler.wait_for_tick(2.0)
    waited_s = time.monotonic() - begin
    sampler.set_tick_interval_s(0.0)
    time.sleep(0.75)
    often = len(sampler.drain()["energy"]["timestamp_ns"])
    sampler.stop()
    assert 2 <= rare <= 5
    assert tick is not None
    assert waited_s < 0.25
    assert often >= 5


def test_no_sample_is_lost_or_doubled(fake_nvml: str) -> None:
    sampler = _recorder.NvmlSampler(library=fake_nvml, index=0)
    sampler.start()
    times: list[int] = []
    for _ in range(5):
        time.sleep(0.5)
        power = sampler.drain()["power"]
        times.extend(power["timestamp_ns"][power["sensor"] == 0])
    sampler.stop()
    power = sampler.drain()["power"]
    times.extend(power["timestamp_ns"][power["sensor"] == 0])
    assert len(times) >= 2.3 / 0.020
    assert set(np.diff(times)) == {20_000_000}


def test_fields_come_with_clock_temperature_and_throttle(fake_nvml: str) -> None:
    _, rows = watch(fake_nvml, 0.7)
    power = rows["power"]
    names = _recorder.SENSOR_NAMES
    by_sensor = {n: power["power_mw"][power["sensor"] == i] for i, n in enumerate(names)}
    assert set(by_sensor["instant"]) == {250_000}
    assert set(by_sensor["memory_average"]) == {50_000}
    fields = power["sensor"] > 0
    assert set(power["sm_clock_mhz"][fields]) == {1980}
    assert set(power["temperature_c"][fields]) == {41}
    assert set(power["throttle"][fields]) == {4}


def test_waiting_returns_the_next_tick(fake_nvml: str) -> None:
    sampler = _recorder.NvmlSampler(library=fake_nvml, index=0)
    sampler.start()
    time.sleep(0.5)
    before_ns = time.time_ns()
    tick = sampler.wait_for_tick(1.0)
    sampler.stop()
    assert tick is not None
    # It did not time out; by how much a busy machine is late says nothing of the sampler.
    assert before_ns < tick[0] < before_ns + 1_000_000_000
    assert sampler.wait_for_tick(0.05) is None


def test_it_stops_at_once(fake_nvml: str) -> None:
    sampler = _recorder.NvmlSampler(library=fake_nvml, index=0)
    sampler.start()
    time.sleep(0.4)
    begin = time.monotonic()
    sampler.stop()
    assert time.monotonic() - begin < 0.1


def test_devices_are_told_apart_by_uuid(fake_nvml: str) -> None:
    sampler = _recorder.NvmlSampler(library=fake_nvml, device_uuid="GPU-fake-1")
    sampler.start()
    time.sleep(0.5)
    sampler.stop()
    rows = sampler.drain()
    assert sampler.info()["index"] == 1
    assert set(rows["power"]["power_mw"][rows["power"]["sensor"] == 1]) == {500_000}
    assert set(rows["energy"]["device"]) == {1}


@pytest.mark.parametrize(
    ("fault", "source"),
    [
        ("FAKE_NO_SAMPLES", "power_samples"),
        ("FAKE_NO_MEMORY_SCOPE", "memory_average"),
        ("FAKE_NO_THROTTLE", "throttle"),
    ],
)
def test_what_a_board_lacks_is_named_and_the_rest_goes_on(
    fake_nvml: str, monkeypatch: pytest.MonkeyPatch, fault: str, source: str
) -> None:
    monkeypatch.setenv(fault, "1")
    sampler, rows = watch(fake_nvml, 0.7)
    lacking = {name: problem for name, problem in sampler.support().items() if problem}
    assert lacking == {source: "NVML_ERROR_NOT_SUPPORTED"}
    assert len(rows["energy"]["timestamp_ns"]) >= 3
    absent = {"power_samples": 0, "memory_average": 3}.get(source)
    if absent is not None:
        assert absent not in rows["power"]["sensor"]
    else:
        assert set(rows["power"]["throttle"]) == {-1}


def test_no_permission_is_a_sentence(fake_nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DENY", "1")
    with pytest.raises(DeviceError, match=r"NVML refuses the energy counter of GPU 0 .*PERMISSION.*administrator"):
        NvmlMeter(0, "GPU-fake-0", fake_nvml)


def test_no_permission_at_all_is_a_sentence(fake_nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_INIT_DENIED", "1")
    with pytest.raises(DeviceError, match=r"NVML cannot start .*NO_PERMISSION.*administrator"):
        NvmlMeter(0, "GPU-fake-0", fake_nvml)


def test_no_counter_is_a_sentence(fake_nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NO_COUNTER", "1")
    with pytest.raises(DeviceError, match=r"NOT_SUPPORTED.*Volta"):
        NvmlMeter(0, "GPU-fake-0", fake_nvml)


def test_mig_is_refused_in_a_sentence(fake_nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MIG", "1")
    with pytest.raises(DeviceError, match=r"MIG mode.*whole board.*choose a GPU without MIG"):
        NvmlMeter(0, "GPU-fake-0", fake_nvml)


def test_a_gpu_that_nvml_does_not_know(fake_nvml: str) -> None:
    with pytest.raises(DeviceError, match=r"find the GPU GPU-elsewhere .*NOT_FOUND"):
        NvmlMeter(0, "GPU-elsewhere", fake_nvml)


def test_no_library_is_a_sentence() -> None:
    with pytest.raises(DeviceError, match=r"cannot be loaded.*install the NVIDIA driver"):
        NvmlMeter(0, "GPU-fake-0", "libnowhere-ml.so.1")


def test_a_gpu_lost_on_the_way_is_told_and_survived(fake_nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = _recorder.NvmlSampler(library=fake_nvml, index=0)
    sampler.start()
    time.sleep(0.5)
    monkeypatch.setenv("FAKE_BREAK_AFTER", "0")
    time.sleep(0.3)
    sampler.stop()
    assert "GPU is lost" in sampler.last_error
    assert len(sampler.drain()["energy"]["timestamp_ns"]) >= 2


def test_the_meter_turns_absent_values_into_nulls(fake_nvml: str) -> None:
    meter = NvmlMeter(3, "GPU-fake-0", fake_nvml)
    meter.start()
    time.sleep(1.1)
    meter.stop()
    power = meter.drain()["power"]
    samples = [s == "samples" for s in power["sensor"].to_pylist()]
    assert any(samples)
    assert all(v is None for v, s in zip(power["temperature_c"].to_pylist(), samples, strict=True) if s)
    assert set(power["device"]) == {3}


def test_calls_are_priced(fake_nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_COST_US", "2000")
    costs = _recorder.NvmlSampler(library=fake_nvml, index=0).call_costs_us()
    assert 2000 <= costs["energy_counter"] < 8000
    assert costs["instant"] < 1000


def test_a_full_gpu_passes_the_check() -> None:
    check_nvml({"mig_enabled": False, "index": 0}, {"energy_counter": None})


@pytest.mark.parametrize("call", [1, 20, 60, 110])
def test_a_hold_up_among_the_first_ticks_loses_no_others(
    fake_nvml: str, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """C1: the sampler took twice the period for the period, for good."""
    monkeypatch.setenv("FAKE_HOLD", str(call))
    sampler, rows = watch(fake_nvml, 2.0)
    assert sampler.tick_period_ms == pytest.approx(100, rel=0.05)
    assert len(rows["energy"]["timestamp_ns"]) > 13


def test_the_sampler_goes_by_the_clock_that_nobody_sets() -> None:
    """C4: it scheduled its reads on CLOCK_REALTIME, and a clock that was set back stopped them for as long."""
    source = (Path(__file__).parents[2] / "csrc" / "nvml_sampler.cpp").read_text()
    assert re.search(r"int64_t now_ns\(\) \{\s*return steady_now_ns\(\);\s*\}", source)
    # The time of day is for what is recorded, and for the driver's samples, which have no other.
    assert source.count("wall_now_ns()") == 1
    assert source.count("wall_ns(") == 2
