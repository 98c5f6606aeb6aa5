"""What a fix would save: latency and joules of each phase with something changed, predicted from the run alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from llmkern.attribute.attribution import Attribution
from llmkern.attribute.split.account import PhaseAccount
from llmkern.attribute.split.estimator import REGIME_SIGMA
from llmkern.attribute.time.per_unit import labelled
from llmkern.estimate import DRAWS, Estimate
from llmkern.explain.roofline import roofline
from llmkern.explain.schedule import Schedule, schedule

ROOF = 0.8
LEAST_CHANGE = 0.01
_PRODUCTS = ("gemm", "gemv")
# The module that makes logits, and how much of its bytes --engine fused reads.
_HEAD, _SHORTLIST = "lm_head", 0.5
# What is left of a layer whose norms, positions, gates and residuals are part of these.
_OF_LAYERS = (*_PRODUCTS, "attention")
_FUSED = ("quantize", "dequantize", "outlier")
# One cudaGraphLaunch, as the host sees it.
GRAPH_LAUNCH_NS = 10_000.0
# The host's own times can be this many times those that were traced, or else something other than the host differed.
_FACTORS = (0.1, 10.0)


@dataclass(frozen=True)
class Prediction:
    """Latency and energy of one unit of *phase* if the fix *name* were made; energies are None without a counter.

    The intervals hold what the weighed run leaves open, that of joules also the split between kernels that stay and
    that go and what launches cost closer together; not the error of the model: a run with the fix measures that
    (llmkern diff BEFORE AFTER --against NAME).
    """

    name: str
    phase: str
    unit: str
    change: str
    assumption: str
    latency_s: Estimate
    energy_j: Estimate | None
    launches: float
    latency_before_s: float
    energy_before_j: float | None

    @property
    def saves(self) -> float | None:
        """Return the share of the phase's energy that the fix saves, None where there is no energy."""
        if self.energy_j is None or not self.energy_before_j:
            return None
        return 1 - self.energy_j.value / self.energy_before_j


@dataclass(frozen=True)
class _Case:
    """One phase as it was, with what a fix may look at; rows of *kernels* are those of tally_kernels."""

    phase: str
    kernels: pd.DataFrame
    roof: pd.DataFrame
    plan: Schedule
    # What the kernels of the schedule are (see labelled).
    planned: pd.DataFrame
    # What the model makes of it unchanged.
    modelled_s: float


@dataclass(frozen=True)
class _Change:
    """A changed schedule; *gone* are the kernels (rows of the case's) that it does without, *factor* their times.

    *read* is how much of what they read is left to read, and with it of their dynamic joules.
    """

    plan: Schedule
    gone: np.ndarray
    factor: np.ndarray
    read: np.ndarray | float = 1.0


@dataclass(frozen=True)
class Fix:
    """A fix that can be predicted: *apply* returns None where there is nothing to fix."""

    name: str
    change: str
    assumption: str
    apply: Callable[[_Case], _Change | None]


def _unchanged(case: _Case, plan: Schedule) -> _Change:
    return _Change(plan, np.zeros(len(case.kernels), bool), np.ones(len(case.kernels)))


def _graph(case: _Case) -> _Change | None:
    return _unchanged(case, captured(case.plan))


def captured(plan: Schedule) -> Schedule:
    """Return *plan* with every forward launched as one graph: the host pays for it once and waits for nothing in it."""
    inside = plan.inside
    # Where the host waits between two forwards, the second is a graph of its own, even with no kernel in between.
    first = inside & (~np.append(False, inside[:-1]) | (plan.waits & ~plan.waits_inside))
    nothing = np.zeros(len(inside))
    return replace(
        plan,
        # What the host does to come to the forward, it still does.
        before_ns=np.where(inside & ~first, nothing, plan.before_ns),
        after_ns=np.where(inside & ~first, nothing, plan.after_ns),
        call_ns=np.where(inside, np.where(first, GRAPH_LAUNCH_NS, nothing), plan.call_ns),
        waits=plan.waits & ~(inside & ~first),
        launched=plan.launched & ~(inside & ~first),
    )


def _without(case: _Case, wanted: Callable[[pd.DataFrame], np.ndarray]) -> _Change | None:
    """Return the case without the kernels *wanted* (of rows with kind and module) and without waits inside modules."""
    gone = wanted(case.planned)
    removable = case.plan.waits_inside & (case.planned["module"] != "").to_numpy()
    if not gone.any() and not removable.any():
        return None
    plan = replace(case.plan, waits=case.plan.waits & ~removable, waits_inside=case.plan.waits_inside & ~removable)
    return _Change(plan.without(gone), wanted(case.kernels), np.ones(len(case.kernels)))


def _syncs(case: _Case) -> _Change | None:
    return _without(case, lambda rows: (rows["kind"] == "outlier").to_numpy())


def conversions(rows: pd.DataFrame) -> np.ndarray:
    """Return which kernels only convert numbers for a product: quantize, dequantize, outliers, casts at its inputs."""
    at_product = (rows["kind"] == "cast") & rows["module"].str.endswith("proj")
    found: np.ndarray = (rows["kind"].isin(_FUSED) | at_product).to_numpy()
    return found


def _fused(case: _Case) -> _Change | None:
    return _without(case, conversions) if case.planned["kind"].isin(_FUSED).any() else None


def _roof(case: _Case) -> _Change | None:
    if case.roof.empty:
        return None
    keys = ["op", "module", "signature"]
    share = case.roof.set_index(keys)["roof_share"]

    def factor(rows: pd.DataFrame) -> np.ndarray:
        known = share.reindex(pd.MultiIndex.from_frame(rows[keys])).fillna(1.0)
        return np.minimum(1.0, known.to_numpy() / ROOF)

    plan = replace(case.plan, duration_ns=case.plan.duration_ns * factor(case.planned))
    return _Change(plan, np.zeros(len(case.kernels), bool), factor(case.kernels))


def _fast_host(case: _Case) -> _Change | None:
    return _unchanged(case, case.plan.host_times(0.5))


def _fused_graph(case: _Case) -> _Change | None:
    change = _fused(case)
    if change is None:
        return None
    return replace(change, plan=captured(change.plan))


def _fused_layers(case: _Case) -> _Change | None:
    """Return the case with nothing left of its layers but products and attention, and no host in the loop."""
    ours = case.kernels["op"].astype(str).str.startswith("llmkern.").any()
    if case.roof.empty or case.phase == "prefill" or ours:
        return None

    def gone(rows: pd.DataFrame) -> np.ndarray:
        inside = (rows["module"] != "").to_numpy()
        return (inside & ~rows["kind"].isin(_OF_LAYERS).to_numpy()) | conversions(rows)

    left = case.kernels[~gone(case.kernels)]
    if len(left) == len(case.kernels):
        return None
    keys = ["op", "module", "signature"]
    least_ns = case.roof.groupby(keys, observed=True)["floor_ns"].sum() / ROOF
    # Of a head in 16 bits int8 codes are read, and few of its rows (see Shortlist).
    least_ns = least_ns.where(least_ns.index.get_level_values("module") != _HEAD, least_ns * _SHORTLIST)
    took_ns = left[left["kind"].isin(_PRODUCTS)].groupby(keys, observed=True)["duration_ns"].sum()
    shorter = (least_ns.reindex(took_ns.index) / took_ns).clip(upper=1.0).fillna(1.0)

    def factor(rows: pd.DataFrame) -> np.ndarray:
        known = shorter.reindex(pd.MultiIndex.from_frame(rows[keys])).fillna(1.0).to_numpy()
        return np.where(rows["kind"].isin(_PRODUCTS), known, 1.0)

    plan = replace(case.plan, duration_ns=case.plan.duration_ns * factor(case.planned))
    plan = plan.without(gone(case.planned))
    nothing, first = np.zeros(len(plan.before_ns)), np.arange(len(plan.before_ns)) == 0
    plan = replace(
        plan,
        before_ns=nothing,
        after_ns=nothing,
        call_ns=np.where(first, GRAPH_LAUNCH_NS, 0.0),
        waits=np.zeros(len(plan.waits), bool),
        waits_inside=np.zeros(len(plan.waits), bool),
        launched=first,
        # Each is launched before its predecessor ends, and reads its weights ahead (programmatic dependent launch).
        gap_ns=0.0,
    )
    head = (case.kernels["module"] == _HEAD) & case.kernels["kind"].isin(_PRODUCTS)
    return _Change(plan, gone(case.kernels), factor(case.kernels), np.where(head, _SHORTLIST, 1.0))


FIXES = (
    Fix(
        "graph",
        "each forward captured in a CUDA graph",
        "the same kernels follow each other as closely as queued ones do; what is between two forwards stays; "
        "read-backs inside a forward, which forbid the capture, are gone and cost nothing else",
        _graph,
    ),
    Fix(
        "syncs-removed",
        "no synchronisation inside the layers, and no search for outliers that needs it",
        "all other launches cost the host what they did; for bitsandbytes int8 that is threshold 0",
        _syncs,
    ),
    Fix(
        "dequant-fused",
        "quantization, dequantization, outliers and the casts around them fused into the products",
        "the products take as long as now, and the host needs no time for launches that are gone",
        _fused,
    ),
    Fix(
        "fused-graph",
        "dequantization fused and each forward captured in a CUDA graph",
        "those of dequant-fused and graph",
        _fused_graph,
    ),
    Fix(
        "fused-layers",
        "layers of products and attention alone, every step one graph, tokens chosen on the device (--engine fused)",
        f"products read their weights at {ROOF:.0%} of the bandwidth, half of a head in 16 bits, what is fused into "
        "them costs nothing, and each kernel is launched before its predecessor ends",
        _fused_layers,
    ),
    Fix(
        "roof-80",
        f"every kernel at {ROOF:.0%} of its roof at least",
        "bytes and FLOPs stay; a faster kernel spends the same dynamic joules in less time",
        _roof,
    ),
    Fix("host-2x", "a host twice as fast", "its own time halves everywhere; waits for the device do not", _fast_host),
)


def predict(attribution: Attribution) -> list[Prediction]:
    """Return what every fix would save in each phase; nothing without the pass that records host calls.

    The model of host and device (see Schedule) gives the latency; the host's own times are first scaled so that the
    recorded steps take as long as the weighed ones, which no recorder has slowed down. Energy = dynamic joules of the
    kernels that are left + idle floor x latency + residual.
    """
    found = []
    trace = attribution.host_trace
    for phase, account in attribution.accounts.items():
        plan = schedule(trace, phase) if trace is not None else None
        if trace is None or plan is None:
            continue
        plan = _calibrated(plan, account)
        case = _case(attribution, phase, plan, trace.timeline.kernels["name"].astype("category").cat.categories)
        for fix in FIXES:
            change = fix.apply(case)
            made = None if change is None else _predicted(fix, account, case, change)
            if made is not None and _tells(made):
                found.append(made)
    return found


def _tells(made: Prediction) -> bool:
    """Whether the fix changes latency or energy by more than the model can be trusted with."""
    ratios = [made.latency_s.value / made.latency_before_s]
    if made.energy_j is not None and made.energy_before_j:
        ratios.append(made.energy_j.value / made.energy_before_j)
    return max(abs(ratio - 1) for ratio in ratios) > LEAST_CHANGE


def _calibrated(plan: Schedule, account: PhaseAccount) -> Schedule:
    """Return *plan* with the host's times scaled until it takes as long as the weighed phase."""
    wanted_s = account.weight.latency_s.value
    low, high = (plan.latency_s(factor) - wanted_s for factor in _FACTORS)
    if low * high > 0:
        # Where the device is what takes the time, the host's factor changes nothing.
        return plan
    return plan.host_times(_root(lambda f: plan.latency_s(f) - wanted_s, _FACTORS, (low, high)))


def _root(of: Callable[[float], float], ends: tuple[float, float], values: tuple[float, float]) -> float:
    """Return to 0.1 % where the rising function *of* is zero; *values* are those at *ends* (regula falsi, Illinois)."""
    (left, right), (low, high) = ends, values
    side = 0
    while right - left > 1e-3 * left:
        middle = float(np.clip((left * high - right * low) / (high - low), left + 4e-4 * left, right - 4e-4 * left))
        value = of(middle)
        if value < 0:
            left, low = middle, value
            high = high / 2 if side < 0 else high
            side = -1
        else:
            right, high = middle, value
            low = low / 2 if side > 0 else low
            side = 1
    return (left + right) / 2


def _case(attribution: Attribution, phase: str, plan: Schedule, names: pd.Index) -> _Case:
    kernels = attribution.kernels_of(phase)
    planned = labelled(attribution.ops, plan.op, pd.Categorical.from_codes(plan.name, categories=names))
    return _Case(phase, kernels, roofline(attribution, phase), plan, planned, plan.latency_s())


def _predicted(fix: Fix, account: PhaseAccount, case: _Case, change: _Change) -> Prediction:
    latency, energy = account.weight.latency_s, account.weight.energy_j
    # The ratio of two runs of the model: what it gets wrong of both, it does not get wrong here.
    factor = change.plan.latency_s() / case.modelled_s
    predicted_s = latency.value * factor
    # Kernels do not vary from round to round, the host does.
    busy = (
        account.busy_s
        * float((case.kernels["duration_ns"] * change.factor)[~change.gone].sum())
        / max(float(case.kernels["duration_ns"].sum()), 1.0)
    )
    host_share = max(0.0, 1 - busy / predicted_s) if predicted_s > 0 else 0.0

    def seconds(weighed_s: np.ndarray) -> np.ndarray:
        return predicted_s + (weighed_s - latency.value) * factor * host_share

    after_s = latency.map(seconds)
    joule = None
    if energy is not None and account.floor_w is not None and account.kernel_j is not None:
        assert account.joules is not None
        # What the kernels that are gone took is as uncertain as the split between them and the others.
        share = account.joules.kept(case.kernels, np.where(change.gone, 0.0, change.read))
        at_floor = account.floor_w.scaled(account.busy_s)
        residual_j = account.residual_j or 0.0
        above = (account.kernel_j - at_floor).map(lambda j: np.maximum(j, 0.0))
        kept = above.scaled(share.value) if share.draws is None else above * share
        # Closer together they draw more power, and there a launch may cost more or less.
        regime = np.exp(REGIME_SIGMA * np.random.default_rng(7).standard_normal(DRAWS))
        joule = (kept * Estimate.of(1.0, regime)).map(lambda j: j + residual_j) + account.floor_w * after_s
        if account.host_adds_w is not None:
            joule = joule + account.host_adds_w * after_s.map(lambda s: np.maximum(s - busy, 0.0))
    return Prediction(
        fix.name,
        account.phase,
        account.unit,
        fix.change,
        fix.assumption,
        after_s,
        joule,
        len(change.plan.op) / change.plan.steps,
        latency.value,
        None if energy is None else energy.value,
    )
