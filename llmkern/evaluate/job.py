"""What a worker is asked to do and what it answers, as data: it travels between processes as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# The spec of the job that measures the board itself (roof.py).
ROOF = "roof:"
# The spec of the job that leaves a model as it is (in_model.py).
UNCHANGED = "unchanged:"


@dataclass(frozen=True)
class Case:
    """One [n, k] layer in *format* for *m* tokens."""

    format: str
    n: int
    k: int
    m: int
    label: str = ""

    @property
    def key(self) -> str:
        return f"{self.format} {self.n}x{self.k} M={self.m}"


@dataclass(frozen=True)
class Job:
    """The *cases* for one candidate; *spec* is what names it (candidate.py), *group* the int4 and NF4 group."""

    candidate: str
    spec: str
    cases: tuple[Case, ...]
    dtype: str = "bf16"
    group: int = 64
    energy: bool = True
    seed: int = 0
    interpret: bool = False
    in_model: str | None = None


@dataclass(frozen=True)
class Check:
    """One comparison with the fp32 reference: relative L2, share of values that match, NaN and unwritten ones."""

    name: str
    rel_l2: float | None
    matched: float | None
    not_finite: int
    unwritten: int
    values: int

    @property
    def right(self) -> bool:
        return (
            self.rel_l2 is not None
            and self.rel_l2 <= LIMIT_L2
            and self.matched is not None
            and self.matched >= LEAST_MATCHED
            and not self.not_finite
            and not self.unwritten
        )


# Rounding the output to bf16 alone gives 1.7e-3, a bf16 codebook 2.0e-3; a wrong scale in one group of 50 gives 2e-2.
LIMIT_L2 = 5e-3
# A value matches within 1 % of itself and 2 % of the output's root mean square.
LEAST_MATCHED = 0.999


@dataclass(frozen=True)
class LaunchedKernel:
    """A kernel of one call: how often, mean µs, and what it takes of a multiprocessor."""

    name: str
    launches: float
    us: float
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    registers: int
    shared_bytes: int
    spilled_bytes: int | None = None
    occupancy: float | None = None


@dataclass(frozen=True)
class Latency:
    """µs per call: *cold* in a graph over distinct copies, *warm* over one; samples of replays, sorted."""

    cold_us: tuple[float, ...]
    warm_us: tuple[float, ...]
    kernels_us: float
    captured: bool
    copies: int
    sm_clock_mhz: int | None = None
    kernels: tuple[LaunchedKernel, ...] = ()


@dataclass(frozen=True)
class Energy:
    """mJ per call: what it adds above the idle floor, and with the floor for as long as it ran."""

    dynamic_mj: tuple[float, float, float]
    total_mj: tuple[float, float, float]
    floor_w: float
    mean_w: float
    windows: int


@dataclass(frozen=True)
class ModelRow:
    """Decode of a model with one contender's layers: ms and J per token as (median, low, high)."""

    name: str
    token_ms: tuple[float, float, float]
    token_j: tuple[float, float, float] | None
    logits_rel_l2: float | None


@dataclass
class Row:
    """What is known of a candidate in one case; *error* is a sentence, where it did not get to the end.

    *stored_bytes* are those that a call has to read of the weight, *code_bytes* those without scales.
    """

    candidate: str
    case: Case
    stored_bytes: int = 0
    code_bytes: int = 0
    checks: list[Check] = field(default_factory=list)
    after: Check | None = None
    latency: Latency | None = None
    energy: Energy | None = None
    error: str | None = None


def to_json(value: Any) -> Any:
    """Return *value* (of the classes here) as what JSON knows."""
    import msgspec

    return msgspec.to_builtins(value)


def row_from(data: Any) -> Row:
    """Return the row that *data* holds. Raises msgspec.ValidationError."""
    import msgspec

    return msgspec.convert(data, Row, strict=False)


def job_from(text: bytes) -> Job:
    """Return the job in JSON *text*. Raises msgspec.ValidationError."""
    import msgspec

    return msgspec.json.decode(text, type=Job)
