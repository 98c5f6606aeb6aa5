"""A counter that is read rarely, and samples of the power between its ticks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from llmkern.attribute.energy.counter import EnergyCurve, between_ticks

S, MS = 1_000_000_000, 1_000_000


def samples(device: int, start_ns: int, watts: np.ndarray, every_ns: int = 20 * MS) -> pd.DataFrame:
    moments = start_ns + every_ns * np.arange(1, len(watts) + 1)
    rows = {"timestamp_ns": moments, "device": device, "sensor": "samples", "power_mw": np.round(watts * 1e3)}
    return pd.DataFrame(rows)


def test_between_two_ticks_it_rises_as_the_samples_say_and_ends_where_the_counter_does() -> None:
    # 100 W for a second and 500 W for another: 600 J, of which the samples see a twentieth less.
    curve = EnergyCurve(np.array([0, 2 * S]), np.array([0.0, 600e3]))
    watts = 0.95 * np.repeat([100.0, 500.0], 50)
    fine = between_ticks(curve, samples(0, 0, watts))
    assert fine.at(np.array([S // 2, S, 3 * S // 2, 2 * S])) == pytest.approx([50, 100, 350, 600])
    assert np.isnan(fine.at(2.1 * S))


def test_of_several_devices_their_samples_add_up() -> None:
    curve = EnergyCurve(np.array([0, 2 * S]), np.array([0.0, 900e3]))
    # The second one is sampled at other times, and draws 300 W in the first second alone.
    power = pd.concat(
        [
            samples(0, 0, np.full(100, 300.0)),
            samples(1, 0, np.repeat([300.0, 0.0], 40), 25 * MS),
        ]
    )
    assert between_ticks(curve, power).at(S) == pytest.approx(600, rel=0.01)


def test_without_samples_it_stays_as_it_was() -> None:
    curve = EnergyCurve(np.array([0, S, 2 * S]), np.array([0.0, 100e3, 400e3]))
    assert between_ticks(curve, samples(0, 0, np.empty(0))) is curve
    fields = samples(0, 0, np.full(100, 9.0)).assign(sensor="instant")
    assert between_ticks(curve, fields) is curve
    # Samples that say nothing, and those that begin later: straight between the ticks there.
    nothing = between_ticks(curve, samples(0, 0, np.zeros(100)))
    assert nothing.at(np.array([S // 2, 3 * S // 2])) == pytest.approx([50, 250])
    later = between_ticks(curve, samples(0, S, np.repeat([100.0, 500.0], 25)))
    assert later.at(np.array([S // 2, S, 3 * S // 2])) == pytest.approx([50, 100, 150])
