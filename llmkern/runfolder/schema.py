"""The tables of a run folder: their columns, and what their values must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa

# Names repeat millions of times (a 7B model has ~40 kernel names for ~1300 launches a token).
_LABEL = pa.dictionary(pa.int32(), pa.string())

TABLES: dict[str, pa.Schema] = {
    "kernels": pa.schema(
        [
            ("pass", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("device", pa.int32()),
            ("context", pa.int32()),
            ("stream", pa.int64()),
            ("correlation_id", pa.int64()),
            ("graph_id", pa.int64()),
            ("graph_node_id", pa.int64()),
            ("name", _LABEL),
            ("kind", _LABEL),
            ("grid_x", pa.int32()),
            ("grid_y", pa.int32()),
            ("grid_z", pa.int32()),
            ("block_x", pa.int32()),
            ("block_y", pa.int32()),
            ("block_z", pa.int32()),
            ("registers", pa.int32()),
            ("shared_bytes", pa.int64()),
            ("copied_bytes", pa.int64()),
        ]
    ),
    "launches": pa.schema(
        [
            ("pass", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("process", pa.int32()),
            ("thread", pa.int64()),
            ("correlation_id", pa.int64()),
            ("api", _LABEL),
        ]
    ),
    "overheads": pa.schema(
        [
            ("pass", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("thread", pa.int64()),
            ("kind", _LABEL),
            # Of a capture of several processes.
            ("process", pa.int32()),
        ]
    ),
    "ranges": pa.schema(
        [
            ("pass", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("thread", pa.int64()),
            ("domain", _LABEL),
            ("name", _LABEL),
            ("category", _LABEL),
            ("depth", pa.int32()),
            ("phase", _LABEL),
            ("token", pa.int32()),
            ("round", pa.int32()),
            ("repeat", pa.int32()),
            ("new_tokens", pa.int32()),
            ("process", pa.int32()),
        ]
    ),
    "ops": pa.schema(
        [
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("thread", pa.int64()),
            ("phase", _LABEL),
            ("token", pa.int32()),
            ("op", _LABEL),
            ("module", _LABEL),
            ("layer", pa.int32()),
            ("shapes", _LABEL),
            ("dtypes", _LABEL),
            ("signature", _LABEL),
            ("moved_bytes", pa.int64()),
            ("flops", pa.int64()),
        ]
    ),
    "replays": pa.schema(
        [
            ("signature", _LABEL),
            # Which of the operator's kernels ran alone; none for the whole operator.
            ("kernel", _LABEL),
            ("start_ns", pa.int64()),
            ("end_ns", pa.int64()),
            ("launches", pa.int64()),
            ("duty", pa.float64()),
            ("captured", pa.bool_()),
            # Filled where the window was measured in an earlier run on this board.
            ("seconds", pa.float64()),
            ("dynamic_j", pa.float64()),
            ("floor_w", pa.float64()),
            ("clock_mhz", pa.float64()),
        ]
    ),
    "power": pa.schema(
        [
            ("timestamp_ns", pa.int64()),
            ("device", pa.int32()),
            ("sensor", _LABEL),
            ("power_mw", pa.int64()),
            ("sm_clock_mhz", pa.int32()),
            ("temperature_c", pa.int32()),
            ("throttle", pa.int64()),
        ]
    ),
    # What the wall clock was against the one that nobody sets, about once a second.
    "clocks": pa.schema([("timestamp_ns", pa.int64()), ("monotonic_ns", pa.int64())]),
    "energy": pa.schema(
        [
            ("timestamp_ns", pa.int64()),
            ("device", pa.int32()),
            ("sensor", _LABEL),
            ("energy_mj", pa.int64()),
            ("uncertainty_ns", pa.int64()),
        ]
    ),
    # Of a server: a request as it was asked for and answered, an iteration of its loop, and how many tokens of a
    # request that computed; request and iteration are numbers from 0.
    "requests": pa.schema(
        [
            ("request", pa.int64()),
            ("intended_ns", pa.int64()),
            ("sent_ns", pa.int64()),
            ("first_token_ns", pa.int64()),
            ("last_token_ns", pa.int64()),
            ("prompt_tokens", pa.int64()),
            ("output_tokens", pa.int64()),
            ("status", _LABEL),
            ("reason", _LABEL),
        ]
    ),
    "iterations": pa.schema([("iteration", pa.int64()), ("start_ns", pa.int64()), ("end_ns", pa.int64())]),
    "processed": pa.schema(
        [
            ("iteration", pa.int64()),
            ("request", pa.int64()),
            ("prefill_tokens", pa.int64()),
            ("decode_tokens", pa.int64()),
            ("new_tokens", pa.int64()),
        ]
    ),
    "attribution": pa.schema(
        [
            ("device", pa.int32()),
            ("phase", _LABEL),
            ("unit", _LABEL),
            ("part", _LABEL),
            ("kind", _LABEL),
            ("cause", _LABEL),
            ("op", _LABEL),
            ("module", _LABEL),
            ("name", _LABEL),
            ("launches", pa.float64()),
            ("duration_ns", pa.float64()),
            ("floor_j", pa.float64()),
            ("dynamic_j", pa.float64()),
            ("energy_j", pa.float64()),
            ("low_j", pa.float64()),
            ("high_j", pa.float64()),
        ]
    ),
}

# What the analysing half makes; a run is whole without it.
DERIVED = ("attribution",)


@dataclass(frozen=True)
class Rules:
    """What holds of the rows of a table, beyond the types of its columns.

    *needed* columns have no empty value; *least* and *most* bound values; *span*: no row ends before it starts;
    *unique* columns differ together from row to row where the first of them is above zero; *rising* (value, time,
    groups): within a group no later value is smaller.
    """

    needed: tuple[str, ...] = ()
    least: Mapping[str, float] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)
    span: bool = False
    unique: tuple[str, ...] = ()
    rising: tuple[str, str, tuple[str, ...]] | None = None


# Numbers that tell things apart; 0, which no recorder gives, is what another tool did not say.
IDS = ("correlation_id", "stream", "thread", "process", "context", "graph_id", "graph_node_id")
# The year 2116 in nanoseconds: beyond it sums of times overflow.
LATEST_NS = 2**62
_TIMES = {"start_ns": 0, "end_ns": 0, "timestamp_ns": 0}
_LATEST = dict.fromkeys(("start_ns", "end_ns", "timestamp_ns"), LATEST_NS)
_GRID = {f"{part}_{axis}": 0 for part in ("grid", "block") for axis in "xyz"}
# A board of 100 kW, a die of 300 °C: what is beyond is no reading.
_MOST_MW, _LEAST_C, _MOST_C = 10**8, -100, 300
_STEPS = {"token": 0, "round": 0, "repeat": 0, "new_tokens": 1}

_REQUEST = ("intended_ns", "sent_ns", "first_token_ns", "last_token_ns")
_TOKENS = ("prefill_tokens", "decode_tokens", "new_tokens")

RULES: dict[str, Rules] = {
    "kernels": Rules(
        needed=("pass", "start_ns", "end_ns", "device", "name"),
        least={**_TIMES, **_GRID, "device": 0, "registers": 0, "shared_bytes": 0, "copied_bytes": 0},
        most=_LATEST,
        span=True,
    ),
    "launches": Rules(
        needed=("pass", "start_ns", "end_ns", "api"),
        least=_TIMES,
        most=_LATEST,
        span=True,
        unique=("correlation_id", "process", "pass"),
    ),
    "overheads": Rules(needed=("pass", "start_ns", "end_ns", "kind"), least=_TIMES, most=_LATEST, span=True),
    "ranges": Rules(
        needed=("pass", "start_ns", "end_ns", "name"),
        least={**_TIMES, **_STEPS},
        most={**_LATEST, **dict.fromkeys(_STEPS, 2**31 - 1)},
        span=True,
    ),
    "ops": Rules(
        needed=("start_ns", "end_ns", "op"),
        least={**_TIMES, "token": 0, "layer": 0, "moved_bytes": 0, "flops": 0},
        most={**_LATEST, "moved_bytes": 2**60, "flops": 2**62},
        span=True,
    ),
    "replays": Rules(
        needed=("signature", "launches", "duty"),
        least={**_TIMES, "launches": 1, "duty": 0, "seconds": 1e-6, "floor_w": 0, "dynamic_j": -1e9, "clock_mhz": 0},
        most={
            **_LATEST,
            "launches": 2**53,
            "duty": 1,
            "seconds": 1e6,
            "floor_w": 1e5,
            "dynamic_j": 1e9,
            "clock_mhz": 1e5,
        },
        span=True,
    ),
    "power": Rules(
        needed=("timestamp_ns", "device", "sensor"),
        least={
            **{"timestamp_ns": 0, "device": 0, "power_mw": 0, "sm_clock_mhz": 0, "throttle": 0},
            "temperature_c": _LEAST_C,
        },
        most={"timestamp_ns": LATEST_NS, "power_mw": _MOST_MW, "sm_clock_mhz": 10**5, "temperature_c": _MOST_C},
    ),
    "clocks": Rules(needed=("timestamp_ns", "monotonic_ns"), least=_TIMES, most=_LATEST),
    "energy": Rules(
        needed=("timestamp_ns", "device", "sensor", "energy_mj"),
        least={"timestamp_ns": 0, "device": 0, "energy_mj": 0, "uncertainty_ns": 0},
        most={"timestamp_ns": LATEST_NS, "energy_mj": 2**60},
        rising=("energy_mj", "timestamp_ns", ("device", "sensor")),
    ),
    "requests": Rules(
        needed=("request", "intended_ns", "status"),
        least=dict.fromkeys((*_REQUEST, "request", "prompt_tokens", "output_tokens"), 0),
        most={**dict.fromkeys(_REQUEST, LATEST_NS), "prompt_tokens": 2**40, "output_tokens": 2**40},
        unique=("request",),
    ),
    "iterations": Rules(
        needed=("iteration", "start_ns", "end_ns"),
        least={**_TIMES, "iteration": 0},
        most=_LATEST,
        span=True,
        unique=("iteration",),
    ),
    "processed": Rules(
        needed=("iteration", "request", "prefill_tokens", "decode_tokens", "new_tokens"),
        least=dict.fromkeys(("iteration", "request", *_TOKENS), 0),
        most=dict.fromkeys(_TOKENS, 2**40),
    ),
    "attribution": Rules(),
}


# Columns that older runs of this schema version lack: there they are empty.
ADDED = {"replays": ("kernel", "clock_mhz"), "ranges": ("process",), "overheads": ("process",)}


def to_table(name: str, columns: Mapping[str, Any]) -> pa.Table:
    """Return *columns* (arrays, lists or scalars to repeat) as a table of the schema of *name*.

    Raises KeyError when a column of the schema is missing, but for those that older runs lack: they are empty.
    """
    schema = TABLES[name]
    rows = max((len(v) for v in columns.values() if hasattr(v, "__len__") and not isinstance(v, str)), default=0)
    arrays = []
    for column in schema:
        lacking = column.name in ADDED.get(name, ()) and column.name not in columns
        value = None if lacking else columns[column.name]
        if isinstance(value, str) or not hasattr(value, "__len__"):
            value = pa.repeat(pa.scalar(value, plain_type(column.type)), rows)
        elif not isinstance(value, pa.Array | pa.ChunkedArray):
            value = pa.array(value, None if isinstance(value, pd.Categorical) else plain_type(column.type))
        arrays.append(value if value.type == column.type else value.cast(column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values behind a dictionary, any other type as it is."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind
