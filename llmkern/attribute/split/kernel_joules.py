"""Splits the energy of a phase's kernels between them: by duration, or by what each launch adds (marginal joules)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pandas as pd

from llmkern.estimate import Estimate

ENERGIES = ("floor_j", "dynamic_j", "energy_j", "low_j", "high_j")


class KernelJoules(Protocol):
    """The energy of the kernels of one phase, per unit of it."""

    @property
    def method(self) -> str: ...

    @property
    def total(self) -> Estimate: ...

    def drawn(self, rows: pd.DataFrame, keys: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray | None]:
        """Return *rows* (*keys*, kernel_class, launches, duration_ns, per unit) summed over *keys*, with ENERGIES in J,
        and the draws of energy_j [rows of that, DRAWS], None without an interval.
        """
        ...

    def dynamic(self, rows: pd.DataFrame) -> np.ndarray:
        """Return the joules above the floor of each of *rows*."""
        ...

    def of(self, rows: pd.DataFrame, chosen: np.ndarray) -> Estimate:
        """Return what the *chosen* of *rows*, which are all of the phase, take together."""
        ...

    def kept(self, rows: pd.DataFrame, kept: np.ndarray) -> Estimate:
        """Return which share of the joules above the floor is left if *kept* (0 to 1) of each of *rows* is."""
        ...


def summed(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Return launches and duration_ns of *rows* summed over *keys*, the longest first, without energies."""
    return grouped(rows, keys)[0]


def grouped(rows: pd.DataFrame, keys: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """Return what summed does, and of each of *rows* to which row of that it belongs."""
    number = np.zeros(len(rows), np.int64)
    for key in keys:
        column = rows[key]
        known = column.cat.codes.to_numpy() if isinstance(column.dtype, pd.CategoricalDtype) else column.factorize()[0]
        # Codes begin at -1, for what is missing.
        number *= int(known.max(initial=0)) + 2
        number += known + 1
    _, first, group = np.unique(number, return_index=True, return_inverse=True)
    launches, duration_ns = (
        np.bincount(group, rows[c].to_numpy(float), len(first)) for c in ("launches", "duration_ns")
    )
    # The longest first, and of those that are as long the one that came first.
    order = np.lexsort([first, -duration_ns])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    frame = pd.DataFrame(
        {
            # From here on they are few, and texts like any other.
            **{key: _plain(rows[key].array.take(first[order])) for key in keys},
            "launches": launches[order],
            "duration_ns": duration_ns[order],
        }
    )
    return frame, place[group]


def _plain(column: Any) -> Any:
    return column.astype(object) if isinstance(column.dtype, pd.CategoricalDtype) else column


def without_energy(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    return summed(rows, keys).assign(**dict.fromkeys(ENERGIES, np.nan))


# By how much the powers above the floor of kernels differ that nothing is known of: from 10 to 600 W on an H100, and
# not by length (one sigma of the logarithm, Student's t of so many degrees).
_POWERS_SIGMA, _POWERS_FREEDOM = 1.2, 3


@dataclass(frozen=True)
class EqualPower:
    """Every kernel draws the same power: *total* goes by duration. Streams that overlap share the floor they share.

    Where rows are *unlike* one another (kernels are, gaps are not), that is a guess with an interval that says so.
    """

    total: Estimate
    floor_w: Estimate
    busy_s: float
    unlike: bool = False
    method: str = "equal power"

    def drawn(self, rows: pd.DataFrame, keys: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray | None]:
        frame, group = grouped(rows, keys)
        share = frame["duration_ns"] / max(float(frame["duration_ns"].sum()), 1.0)
        energy_j = self.total.value * share
        floor_j = np.minimum(self.floor_w.value * self.busy_s * share, energy_j)
        draws = self._draws(rows, group, share.to_numpy(float))
        low, high = (np.nan, np.nan) if draws is None or frame.empty else np.percentile(draws, [2.5, 97.5], axis=1)
        frame = frame.assign(floor_j=floor_j, dynamic_j=energy_j - floor_j, energy_j=energy_j, low_j=low, high_j=high)
        frame["low_j"] = np.minimum(frame["low_j"], frame["energy_j"])
        frame["high_j"] = np.maximum(frame["high_j"], frame["energy_j"])
        return frame, draws

    def _draws(self, rows: pd.DataFrame, group: np.ndarray, share: np.ndarray) -> np.ndarray | None:
        """Return draws [groups, DRAWS] of the J of each *group* of *rows*, of which *share* are those of the time."""
        total = self.total.draws
        if total is None:
            return None
        if not self.unlike:
            return np.outer(share, total)
        classes, powers = self._powers(rows, len(total))
        duration_ns = np.zeros((len(share), len(powers)))
        np.add.at(duration_ns, (group, classes), rows["duration_ns"].to_numpy(float))
        size = duration_ns @ powers
        by_size = size / np.maximum(size.sum(axis=0), 1e-12)
        floor_w = self.floor_w.value if self.floor_w.draws is None else self.floor_w.draws
        at_floor = np.minimum(floor_w * self.busy_s, total)
        result: np.ndarray = np.outer(share, at_floor) + by_size * (total - at_floor)
        return result

    def _powers(self, rows: pd.DataFrame, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the class of each of *rows*, and what each class may draw: factors [classes, *count*]."""
        classes, names = pd.factorize(rows["kernel_class" if "kernel_class" in rows else "name"].astype(object))
        # Of a class the same power whatever else is asked for.
        seeds = [zlib.crc32(str(name).encode()) for name in names]
        drawn = [np.random.default_rng(seed).standard_t(_POWERS_FREEDOM, count) for seed in seeds]
        return classes, np.exp(np.clip(_POWERS_SIGMA * np.array(drawn).reshape(len(names), count), -5.0, 5.0))

    def kept(self, rows: pd.DataFrame, kept: np.ndarray) -> Estimate:
        duration_ns = rows["duration_ns"].to_numpy(float)
        value = float(duration_ns @ kept) / max(float(duration_ns.sum()), 1e-12)
        if self.total.draws is None or not self.unlike:
            return Estimate(value)
        classes, powers = self._powers(rows, len(self.total.draws))
        left, whole = (np.bincount(classes, ns, len(powers)) @ powers for ns in (duration_ns * kept, duration_ns))
        return Estimate.of(value, left / np.maximum(whole, 1e-12))

    def dynamic(self, rows: pd.DataFrame) -> np.ndarray:
        share = rows["duration_ns"].to_numpy(float) / max(float(rows["duration_ns"].sum()), 1.0)
        return max(self.total.value - self.floor_w.value * self.busy_s, 0.0) * share

    def of(self, rows: pd.DataFrame, chosen: np.ndarray) -> Estimate:
        duration_ns = rows["duration_ns"].to_numpy(float)
        share = float(duration_ns[chosen].sum()) / max(float(duration_ns.sum()), 1.0)
        shares, group = np.array([share, 1 - share]), np.where(chosen, 0, 1)
        draws = self._draws(rows, group, shares)
        return Estimate.of(self.total.value * share, None if draws is None else draws[0], self.total.samples)


@dataclass(frozen=True)
class MarginalJoules:
    """Each class of kernels has its own joules above the floor per launch, wherever it is launched.

    *launch_j* are those of *classes*, *launch_draws_j* draws of them [draws, classes], *floor_draws_w* the floors that
    they assumed. *launches* is how often each runs in a unit. Rows have their class in column kernel_class. All
    together take no more than *whole*.
    """

    classes: tuple[str, ...]
    launch_j: np.ndarray
    launch_draws_j: np.ndarray
    floor_w: float
    floor_draws_w: np.ndarray
    busy_s: float
    launches: np.ndarray
    duration_s: float
    whole: Estimate | None = None
    method: str = "marginal joules"

    @cached_property
    def _unlimited(self) -> Estimate:
        value = self.floor_w * self.busy_s + float(self.launch_j @ self.launches)
        return Estimate.of(value, self.floor_draws_w * self.busy_s + self.launch_draws_j @ self.launches)

    @property
    def total(self) -> Estimate:
        return self._unlimited.within(self.whole)

    @cached_property
    def _limit(self) -> tuple[float, np.ndarray]:
        """Return by what value and draws are less than what the parts alone say: no part may exceed the whole."""
        free, limited = self._unlimited, self.total
        assert free.draws is not None
        assert limited.draws is not None
        return limited.value / max(free.value, 1e-12), limited.draws / np.maximum(free.draws, 1e-12)

    def drawn(self, rows: pd.DataFrame, keys: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray | None]:
        frame, group = grouped(rows, keys)
        column = self._columns(rows)
        known = column >= 0
        launches = np.zeros((len(frame), len(self.classes)))
        np.add.at(launches, (group[known], column[known]), rows["launches"].to_numpy(float)[known])
        floor_share = self._at_floor(frame["duration_ns"].to_numpy(float))
        floor_j = self.floor_w * floor_share
        dynamic_j = launches @ self.launch_j
        draws = launches @ self.launch_draws_j.T + np.outer(floor_share, self.floor_draws_w)
        factor, factors = self._limit
        floor_j, dynamic_j, draws = floor_j * factor, dynamic_j * factor, draws * factors
        low, high = np.percentile(draws, [2.5, 97.5], axis=1) if len(frame) else (np.empty(0), np.empty(0))
        energy_j = floor_j + dynamic_j
        frame = frame.assign(
            floor_j=floor_j,
            dynamic_j=dynamic_j,
            energy_j=energy_j,
            low_j=np.minimum(low, energy_j),
            high_j=np.maximum(high, energy_j),
        )
        return frame, draws

    def dynamic(self, rows: pd.DataFrame) -> np.ndarray:
        factor, _ = self._limit
        joules: np.ndarray = np.append(self.launch_j, 0.0)[self._columns(rows)]
        return joules * rows["launches"].to_numpy(float) * factor

    def of(self, rows: pd.DataFrame, chosen: np.ndarray) -> Estimate:
        own = rows[chosen]
        column = self._columns(own)
        known = column >= 0
        launches = np.bincount(column[known], own["launches"].to_numpy(float)[known], len(self.classes))
        at_floor_s = float(self._at_floor(own["duration_ns"].to_numpy(float)).sum())
        factor, factors = self._limit
        value = (self.floor_w * at_floor_s + float(self.launch_j @ launches)) * factor
        return Estimate.of(value, (self.floor_draws_w * at_floor_s + self.launch_draws_j @ launches) * factors)

    def kept(self, rows: pd.DataFrame, kept: np.ndarray) -> Estimate:
        column, launches = self._columns(rows), rows["launches"].to_numpy(float)
        known = column >= 0
        left, whole = (
            np.bincount(column[known], count[known], len(self.classes)) for count in (launches * kept, launches)
        )
        value = float(self.launch_j @ left) / max(float(self.launch_j @ whole), 1e-12)
        return Estimate.of(value, (self.launch_draws_j @ left) / np.maximum(self.launch_draws_j @ whole, 1e-12))

    def _at_floor(self, duration_ns: np.ndarray) -> np.ndarray:
        """Return the seconds of floor that kernels of *duration_ns* stand for: those that overlap share it."""
        seconds: np.ndarray = duration_ns / 1e9 / max(self.duration_s, 1e-12) * self.busy_s
        return seconds

    def _columns(self, rows: pd.DataFrame) -> np.ndarray:
        """Return which of the classes each of *rows* has, -1 for none of them."""
        found = rows["kernel_class"].astype("category").cat
        index: np.ndarray = pd.Index(self.classes).get_indexer(found.categories)[found.codes]
        return np.where(found.codes.to_numpy() < 0, -1, index)
