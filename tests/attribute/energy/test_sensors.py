"""The sensor self-test against sensors whose refresh, lag and window are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.attribute.energy.sensors import COUNTER, Sensor, calibrate, choose, describe, respond
from llmkern.record.passes.selftest import CYCLES, drive_sensors
from llmkern.record.rig import RARE_TICK_S
from llmkern.runfolder import RunFolder, RunWriter
from tests.rigs import made_rig
from tests.synthetic import Truth, facts

REST_W, LOAD_W = 121.0, 690.0


def load(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    starts, now_s = [], 0.4
    for _ in range(CYCLES):
        starts.append(now_s)
        now_s += 0.12 + random.uniform(0.10, 0.26)
    return np.array(starts), np.array(starts) + 0.12


def read(
    on: tuple[np.ndarray, np.ndarray], refresh_s: float, lag_s: float, window_s: float, noise_w: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    fine = np.arange(0.0, on[1][-1] + 0.5, 0.0005)
    busy = ((fine[:, None] >= on[0]) & (fine[:, None] < on[1])).any(axis=1)
    summed = np.concatenate([[0.0], np.cumsum(busy * 0.0005)])
    at = np.arange(0.05, fine[-1], refresh_s)

    def until(times: np.ndarray) -> np.ndarray:
        return np.interp(times, np.append(fine, fine[-1] + 0.0005), summed)

    share = (until(at - lag_s) - until(at - lag_s - window_s)) / window_s
    noise = np.random.default_rng(1).normal(0.0, noise_w, len(at))
    return at, REST_W + (LOAD_W - REST_W) * share + noise


@settings(max_examples=25, deadline=None)
@given(
    refresh_ms=st.sampled_from([20, 50, 100]),
    lag_ms=st.integers(0, 150),
    window_ms=st.sampled_from([10, 20, 25, 50, 100, 200]),
    noise_w=st.floats(0.0, 5.0),
)
def test_refresh_lag_and_window_are_found(refresh_ms: int, lag_ms: int, window_ms: int, noise_w: float) -> None:
    on = load()
    found = respond("any", *read(on, refresh_ms / 1e3, lag_ms / 1e3, window_ms / 1e3, noise_w), on)
    assert found.refresh_ms == pytest.approx(refresh_ms, rel=0.01)
    assert found.step_w == pytest.approx(LOAD_W - REST_W, rel=0.08)
    assert found.lag_ms is not None
    assert found.window_ms is not None
    # What the load shows best is the middle of the window; a coarse grid trades lag against length.
    assert found.lag_ms + found.window_ms / 2 == pytest.approx(lag_ms + window_ms / 2, abs=12)


def test_a_sensor_that_does_not_move_is_blind() -> None:
    on = load()
    times = np.arange(0.0, 3.0, 0.02)
    found = respond("flat", times, np.full(len(times), REST_W), on)
    assert (found.step_w, found.lag_ms) == (None, None)
    assert "lost in its noise" in describe(found)
    assert respond("few", times[:3], times[:3], on).step_w is None
    assert describe(respond("none", times[:0], times[:0], on)) == "none silent"


def sensor(name: str, refresh_ms: float, step_w: float | None) -> Sensor:
    return Sensor(name, refresh_ms, 5.0, 20.0, step_w, 3.0, 100)


@pytest.mark.parametrize(
    ("samples", "chosen", "words"),
    [
        (sensor("samples", 20, 570), "samples", "every 20 ms and follow the load"),
        (sensor("samples", 100, 570), COUNTER, "no finer than the counter"),
        (sensor("samples", 20, 200), COUNTER, "35% of the load"),
        (sensor("samples", 20, None), COUNTER, "no power samples that follow the load"),
        (None, COUNTER, "no power samples that follow the load"),
    ],
)
def test_the_source_is_chosen_by_what_was_found(samples: Sensor | None, chosen: str, words: str) -> None:
    sensors = {COUNTER: sensor(COUNTER, 100, 571)}
    if samples is not None:
        sensors["samples"] = samples
    source, why = choose(sensors)
    assert source == chosen
    assert words in why


class Device:
    """A device that only notes for how long it was asked to work."""

    def __init__(self) -> None:
        self.worked: list[float] = []

    def work(self, seconds: float) -> None:
        self.worked.append(seconds)


class Meter:
    """A meter that only notes how closely it was to look."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def watch_closely(self, closely: bool) -> None:
        self.asked.append(closely)

    def pace(self, every_s: float) -> None:
        self.asked.append(every_s)


def test_the_load_is_marked_and_the_sensors_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkern.record.passes.selftest._REST_S", 0.0)
    monkeypatch.setattr("llmkern.record.passes.selftest.OFF_S", (0.0, 0.001))
    device, meter = Device(), Meter()
    rig = made_rig(device=device, meters=(meter,))
    steps: list[int] = []
    drive_sensors(rig, lambda: steps.append(1))
    marks = [r.category for r in rig.annotator.drain()]
    assert marks.count("load") == CYCLES == len(steps)
    assert marks.count("selftest") == 1
    assert len(device.worked) == CYCLES + 1
    assert meter.asked[:2] == [True, 0.0]
    assert meter.asked[2:] == [RARE_TICK_S, False]


def test_a_run_folder_with_a_self_test_is_calibrated(tmp_path: Path) -> None:
    base_ns = 1_790_000_000_000_000_000
    on = load()
    writer = RunWriter(tmp_path / "run", facts(Truth()))
    marks = [(0.0, on[1][-1] + 0.45, "selftest"), *((a, b, "load") for a, b in zip(*on, strict=True))]
    writer.append(
        "ranges",
        {
            "pass": "selftest",
            "start_ns": [base_ns + round(a * 1e9) for a, _, _ in marks],
            "end_ns": [base_ns + round(b * 1e9) for _, b, _ in marks],
            "category": [c for _, _, c in marks],
            "name": "x",
            "domain": "llmkern",
            **dict.fromkeys(("phase", "token", "round", "repeat", "new_tokens")),
            "thread": 1,
            "depth": 0,
        },
    )
    rows = {"samples": read(on, 0.02, 0.005, 0.02), "instant": read(on, 0.1, 0.01, 0.025)}
    # A field is read every 10 ms and holds its value in between.
    polled = np.arange(0.1, on[1][-1] + 0.4, 0.01)
    times, watts = rows["instant"]
    rows["instant"] = polled, watts[np.searchsorted(times, polled, side="right") - 1]
    for name, (at, power_w) in rows.items():
        writer.append(
            "power",
            {
                "timestamp_ns": base_ns + (at * 1e9).astype(np.int64),
                "device": 0,
                "sensor": name,
                "power_mw": np.round(power_w * 1e3).astype(np.int64),
                **dict.fromkeys(("sm_clock_mhz", "temperature_c", "throttle")),
            },
        )
    writer.merge()
    writer.publish()
    found = calibrate(RunFolder(tmp_path / "run"))
    assert found["samples"].refresh_ms == pytest.approx(20, rel=0.05)
    assert found["instant"].refresh_ms == pytest.approx(100, rel=0.2)
    assert found["samples"].lag_ms == pytest.approx(5, abs=5)
    assert found[COUNTER].step_w is None
    assert choose(found)[0] == "samples"
    assert json.loads(json.dumps({name: vars(s) for name, s in found.items()}))
