"""From the joules of a request to a day of many: kWh, households, kg of CO2, and what one way saves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmkern.errors import UsageError
from llmkern.estimate import Estimate
from llmkern.study.collect import GENERATE, Run

# The study's figure for what a household uses.
HOUSEHOLD_KWH = 11.7
_J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Day:
    """A day of *requests* at the joules per request of one run; GPU only, without host, network and cooling."""

    name: str
    request_j: Estimate
    kwh: Estimate
    households: Estimate
    co2_kg: Estimate | None


@dataclass(frozen=True)
class Macro:
    """Two ways to serve the same day, what the second saves, and how each number came about."""

    requests: float
    before: Day
    after: Day
    saved: Estimate
    formulas: tuple[str, ...]


def macro(before: Run, after: Run, requests: float, household_kwh: float, co2_g_per_kwh: float | None) -> Macro:
    """Return a day of *requests* by the runs *before* and *after*; raises UsageError where a run has no energy."""
    days = [_day(run, requests, household_kwh, co2_g_per_kwh) for run in (before, after)]
    first, second = (day.request_j for day in days)
    saved = second.of_another_run().with_(first, lambda a, b: 1 - np.divide(a, b))
    formulas = [
        "J per request = J of one generation of the whole batch / its requests, the GPU's counter; without host, "
        "network, cooling, and without hours in which nobody asks",
        f"kWh per day = J per request × {requests:,.0f} requests / 3.6e6",
        f"households = kWh per day / {household_kwh:g} kWh that one uses a day"
        + (" (the study's figure)" if household_kwh == HOUSEHOLD_KWH else " (given)"),
    ]
    if co2_g_per_kwh is not None:
        formulas.append(f"kg CO2 = kWh per day × {co2_g_per_kwh:g} g per kWh / 1000 (given)")
    formulas.append("saved = 1 - J per request after / J per request before; intervals are 95 %, of the measurement")
    return Macro(requests, days[0], days[1], saved, tuple(formulas))


def _day(run: Run, requests: float, household_kwh: float, co2_g_per_kwh: float | None) -> Day:
    request_j = run.measures.get(GENERATE, {}).get("energy_per_request")
    if request_j is None:
        raise UsageError(f"{run.folder} has no energy of a whole generation: trace it where the energy can be read.")
    kwh = request_j.scaled(requests / _J_PER_KWH)
    co2_kg = None if co2_g_per_kwh is None else kwh.scaled(co2_g_per_kwh / 1000)
    return Day(run.folder.name, request_j, kwh, kwh.scaled(1 / household_kwh), co2_kg)
