"""What run.json holds: one tree of frozen dataclasses, checked by msgspec, and the JSON schema made from it.

Counts, times and sizes carry their limits in their types, so that a value that cannot be is refused where it is read.
Nothing here ever holds an environment variable, a token or a home folder.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llmkern.errors import UsageError
from llmkern.runfolder import vocabulary as word

SCHEMA_VERSION = 2
# Written until November 2026; read by filling in what it did not have.
OLDER_VERSIONS = (1,)
# run.json is a few KiB; what is larger than this is something else.
MOST_BYTES = 16 * 2**20

Count = Annotated[int, Meta(ge=0, le=2**62)]
Ordinal = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Amount = Annotated[float, Meta(ge=0, le=1e18)]


@dataclass(frozen=True, kw_only=True)
class OptionFacts:
    """What was asked for; an imported capture knows its file (*model*) only."""

    model: str = "unknown"
    precision: Literal["", "fp32", "bf16", "fp16", "int8", "int4"] = ""
    device: str = "auto"
    engine: Literal["eager", "graph", "fused"] = "eager"
    weights: Literal["auto", "hub", "local", "random"] = "auto"
    batch: Positive = 1
    prompt_tokens: Positive | None = None
    new_tokens: Annotated[int, Meta(ge=2, le=2**31 - 1)] = 2
    prompts: str | None = None
    warmup: Positive = 5
    repeats: Positive | None = None
    trace_repeats: Positive | None = None
    seed: Count = 0
    outliers: Ordinal = 6
    double_quant: bool = False
    int8_threshold: Annotated[float, Meta(ge=0)] = 6.0
    cudnn_attention: bool = True
    quick: bool = False
    no_cache: bool = False
    annotate_only: bool = False
    weigh_only: bool = False
    prefill_prompts: str | None = None
    estimate_ram: bool = False
    unweighed_window_s: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """The device that ran the model; sizes in bytes, *index* as PyTorch numbers it."""

    kind: Literal["cuda", "cpu"]
    index: Annotated[int, Meta(ge=0, le=4095)]
    name: str
    compute_capability: str | None = None
    multiprocessors: Positive | None = None
    memory_bytes: Count | None = None
    l2_bytes: Count | None = None
    memory_bytes_per_s: Annotated[float, Meta(gt=0, le=1e18)] | None = None
    uuid: str | None = None
    driver_version: str | None = None
    power_limit_mw: Annotated[int, Meta(ge=1_000, le=10**8)] | None = None
    power_limit_max_mw: Annotated[int, Meta(ge=1_000, le=10**8)] | None = None
    sm_clock_max_mhz: Annotated[int, Meta(ge=1, le=10**5)] | None = None
    persistence_mode: int | None = None
    threads: Positive | None = None

    @property
    def counter(self) -> str:
        """Return the name of the energy counter of this kind of device."""
        return {"cuda": word.NVML_COUNTER, "cpu": word.RAPL_COUNTER}[self.kind]

    @property
    def counted(self) -> int | None:
        """Return the device number in the counter's rows; None: all of them, for RAPL counts packages."""
        return {"cuda": self.index, "cpu": None}[self.kind]

    @property
    def counter_source(self) -> str:
        return {"cuda": "NVML", "cpu": "RAPL"}[self.kind]

    @property
    def called(self) -> str:
        return {"cuda": "GPU", "cpu": "CPU"}[self.kind]

    @property
    def launches(self) -> str:
        """Return what the device runs: on the CPU PyTorch's operators stand in the place of kernels."""
        return {"cuda": "kernels", "cpu": "operators"}[self.kind]


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    cpu: str = ""
    cpu_threads: Ordinal | None = None
    memory_bytes: Count = 0
    system: str = ""


@dataclass(frozen=True, kw_only=True)
class OutlierFacts:
    """Planted outlier features: hidden *dimensions* whose norms weigh them *gain* fold."""

    dimensions: tuple[Ordinal, ...] = ()
    gain: float = 0.0
    threshold: Amount = 0.0
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    name: str
    weights: Literal["hub", "local", "random"]
    weight_bytes: Count
    parameters: Count = 0
    hub_id: str | None = None
    weights_note: str = ""
    # What the values of the weights depend on: replays of other values say nothing of these.
    weights_key: str = ""
    outliers: OutlierFacts | None = None
    layers: Ordinal | None = None
    build_s: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class PromptFacts:
    """One batch: *tokens* is its width, *effective_tokens* of each row without padding, *computed_tokens* with it.

    *output_tokens* of each row are those that its prompt wanted, at most what was generated; empty: all of them.
    """

    effective_tokens: tuple[Positive, ...]
    computed_tokens: Positive
    output_tokens: tuple[Positive, ...] = ()
    tokens: Positive | None = None
    batch: Positive = 1
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptSetFacts:
    """Batches of prompts whose prefills are weighed beside the batch that is generated for; tokens of all of them."""

    batches: Positive
    effective_tokens: Positive
    computed_tokens: Positive


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """The weigh pass as planned: generations per window at least, and how long each window lasts at least.

    *generate_s* is what a whole generation took by the warm-up, *first_generate_s* the first one of that length.
    """

    prefill_repeats: tuple[Positive, ...] = ()
    generate_repeats: tuple[Positive, ...] = ()
    new_tokens: Positive = 2
    shortest_s: Amount | None = None
    generate_s: Amount | None = None
    first_generate_s: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class OwnCostFacts:
    """Seconds of the weighed windows, and in how many of them our own threads can have held up the launches."""

    wall_s: Annotated[float, Meta(gt=0, le=1e9)]
    pump_s: Amount
    sensors_s: Amount


@dataclass(frozen=True, kw_only=True)
class RecorderFacts:
    """What the recorder says of one pass; counts are of records."""

    source: str = ""
    library_version: Count | None = None
    clock_offset_ns: int | None = None
    kernels: Count = 0
    launches: Count = 0
    copies: Count = 0
    overheads: Count = 0
    dropped_records: Count = 0
    lost_timestamps: Count = 0
    lost_calls: Count = 0
    unknown_records: Count = 0
    failed_allocations: Count = 0
    failed_decodes: Count = 0
    buffers_allocated: Count = 0
    buffers_in_flight: int = 0
    nested_calls: Count = 0
    peak_queue_bytes: Count = 0
    ops: Count = 0
    new_tokens: Ordinal | None = None

    @property
    def lost(self) -> int:
        """Return how many records of the device did not arrive whole."""
        return self.dropped_records + self.lost_timestamps + self.failed_allocations + self.failed_decodes


@dataclass(frozen=True, kw_only=True)
class MeterFacts:
    """One meter: which of its sources this board does not give and why, and the last thing that went wrong."""

    source: str
    tick_period_ms: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    unsupported: dict[str, str] = field(default_factory=dict)
    last_error: str | None = None
    packages: Ordinal | None = None
    period_s: Amount | None = None


@dataclass(frozen=True)
class CapturedDevice:
    """A device of a capture: what it is, the file that tells of it, and the processes that drive it (none: any)."""

    facts: DeviceFacts
    file: str
    processes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImportedFacts:
    """The file of another tool that a run was made of.

    *missing* says in words what it did not hold, *told* in sentences what was done to what it holds. Of several
    *devices* each has an account of its own; the run's device is the first that is shown.
    """

    file: str
    format: str
    schema: str | int | None = None
    missing: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    devices: tuple[CapturedDevice, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClockFacts:
    """CLOCK_REALTIME less CLOCK_MONOTONIC in ns at both ends, and its largest change between two looks."""

    first_ns: int
    last_ns: int
    largest_change_ns: Count
    looks: Count


@dataclass(frozen=True, kw_only=True)
class ReplayFacts:
    """How many operators were replayed, taken from the cache, and left out because they change what they are given."""

    replayed: Count = 0
    cached: Count = 0
    drifting: Count = 0


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """One finished table as it was written: rows, bytes and the CRC-32 of its file."""

    rows: Count
    bytes: Count
    crc32: Count


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """All of run.json."""

    device: DeviceFacts
    schema: int = SCHEMA_VERSION
    status: Literal["recording", "complete", "failed", "interrupted"] = "recording"
    reason: str | None = None
    command: str = ""
    started: str = ""
    elapsed_s: Amount | None = None
    options: OptionFacts = field(default_factory=OptionFacts)
    host: HostFacts = field(default_factory=HostFacts)
    versions: dict[str, str | None] = field(default_factory=dict)
    model: ModelFacts | None = None
    prompts: PromptFacts | None = None
    prompt_set: PromptSetFacts | None = None
    plan: PlanFacts | None = None
    own_cost: OwnCostFacts | None = None
    recorders: dict[str, RecorderFacts] = field(default_factory=dict)
    sensors: dict[str, MeterFacts] = field(default_factory=dict)
    replays: ReplayFacts | None = None
    clock: ClockFacts | None = None
    pass_s: dict[str, Amount] = field(default_factory=dict)
    imported: ImportedFacts | None = None
    energy_of: str | None = None
    tables: dict[str, TableFacts] = field(default_factory=dict)
    # Of programs that write runs of their own.
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def recorder(self) -> RecorderFacts | None:
        """Return what the recorders of the traced passes counted together, None before one ended."""
        traced = [self.recorders[name] for name in word.TRACED if name in self.recorders]
        if not traced:
            return None
        last = traced[-1]
        counts = ("kernels", "launches", "copies", "overheads", "dropped_records", "lost_timestamps", "lost_calls")
        sums = {name: sum(getattr(one, name) for one in traced) for name in counts}
        return replace(last, **sums)


def first_line(error: BaseException) -> str:
    """Return the first line of what *error* says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def device_facts(values: dict[str, Any]) -> DeviceFacts:
    """Return the facts of a device of which another tool tells *values*; what cannot be is left out.

    Raises UsageError where kind, index or name cannot be.
    """
    known = {name: value for name, value in values.items() if name in DeviceFacts.__dataclass_fields__}
    needed = {name: known.pop(name) for name in ("kind", "index", "name")}
    try:
        found = msgspec.convert(needed, DeviceFacts)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"the capture's device cannot be ({first_line(error)}): export it again, or import it in parts."
        ) from error
    for name, value in known.items():
        with suppress(msgspec.ValidationError):
            found = msgspec.convert({**msgspec.to_builtins(found), name: value}, DeviceFacts)
    return found


def without_home(text: str) -> str:
    """Return *text* with the user's home folder written as ``~``: it often holds the user's name."""
    try:
        home = str(Path.home())
    except RuntimeError:
        return text
    return text.replace(home, "~") if len(home) > 1 else text
