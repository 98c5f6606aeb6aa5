"""Energy of short phases from long samples, with a lag that is found."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from llmkern.attribute.energy.by_ranges import energy_by_ranges

MS = 1_000_000
BASE_NS = 1_790_000_000_000_000_000


def played(
    lag_ms: float, prefill_w: float, decode_w: float, rest_ms: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame, pd.DataFrame]:
    """A 26 ms prefill and a 600 ms decode, over and over, seen through 20 ms means that come late."""
    random = np.random.default_rng(seed)
    edges, watts, phases, windows = [0.0], [], [], []
    for _ in range(6):
        begin = edges[-1]
        for _ in range(4):
            for name, length, power in (("prefill", 26.0, prefill_w), ("decode", 600.0, decode_w), ("", rest_ms, 120)):
                start = edges[-1]
                edges.append(start + length * (1 + 0.05 * random.standard_normal()))
                watts.append(power)
                if name:
                    phases.append((name, start, edges[-1]))
        windows.append((begin, edges[-1]))
        edges.append(edges[-1] + 300)
        watts.append(120)
    joule = np.concatenate([[0], np.cumsum(np.diff(edges) * watts)])
    times = np.arange(20.0, edges[-1], 20.0)
    means = np.diff(np.interp(times - lag_ms, edges, joule), prepend=0) / 20.0

    def frame(rows: list, *names: str) -> pd.DataFrame:
        made = pd.DataFrame(rows, columns=[*names, "start_ns", "end_ns"])
        for column in ("start_ns", "end_ns"):
            made[column] = BASE_NS + (made[column] * MS).round().astype("int64")
        return made

    return BASE_NS + (times * MS).astype(np.int64), means, frame(windows), frame(phases, "phase")


@pytest.mark.parametrize("rest_ms", [0.0, 3.0])
@pytest.mark.parametrize("lag_ms", [0.0, 4.0, 14.0])
def test_phases_shorter_than_a_sample_are_told_apart(lag_ms: float, rest_ms: float) -> None:
    found = energy_by_ranges(*played(lag_ms, prefill_w=620, decode_w=210, rest_ms=rest_ms))
    assert found is not None
    assert found.lag_ms == pytest.approx(lag_ms, abs=2)
    assert np.median(found.energy_j["prefill"]) == pytest.approx(0.026 * 620, rel=0.04)
    assert np.median(found.energy_j["decode"]) == pytest.approx(0.6 * 210, rel=0.02)
    assert len(found.energy_j["decode"]) == 6


def test_too_few_samples_say_nothing() -> None:
    sample_ns, sample_w, windows, phases = played(0, 620, 210, 0)
    assert energy_by_ranges(sample_ns[::100], sample_w[::100], windows, phases) is None
    assert energy_by_ranges(sample_ns[:0], sample_w[:0], windows, phases) is None
