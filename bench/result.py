"""The file that a benchmark leaves behind: one per bench and GPU, with its environment and command."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkern.estimate import Estimate
from llmkern.record import environment

RESULTS = Path(__file__).parent / "results"


def metric(value: float | Estimate, unit: str, samples: Sequence[float] | None = None) -> dict[str, Any]:
    """Return one metric; an Estimate brings its interval, plain *samples* their 5th and 95th percentile."""
    if isinstance(value, Estimate):
        return {
            "value": value.value,
            "low": value.low,
            "high": value.high,
            "unit": unit,
            "samples": value.samples,
            "interval": "95 % confidence",
        }
    entry: dict[str, Any] = {"value": value, "low": None, "high": None, "unit": unit, "samples": 1}
    if samples is not None and len(samples):
        low, high = np.percentile(np.asarray(samples, float), [5, 95])
        entry |= {"low": float(low), "high": float(high), "samples": len(samples), "interval": "5th to 95th percentile"}
    return entry


def case(
    name: str, parameters: dict[str, Any], metrics: dict[str, Any], passed: bool | None, note: str = ""
) -> dict[str, Any]:
    """Return one case; *passed* is None where no bar was set."""
    return {"name": name, "parameters": parameters, "metrics": metrics, "passed": passed, "note": note}


def gpu_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else environment.host().cpu


def slug(gpu: str | None = None) -> str:
    """Return the name of *gpu*, or of this one, as file names have it."""
    return re.sub(r"[^a-z0-9]+", "-", (gpu or gpu_name()).lower()).strip("-")


def _command(bench: str) -> str:
    # Where the files went says nothing of what was measured.
    return re.sub(
        r" --(results|runs|from|figures|peer-python) \S+| --of( \S+)+",
        "",
        shlex.join(["python", "-m", f"bench.{bench.partition('-')[0]}", *sys.argv[1:]]),
    )


def write(
    bench: str, cases: list[dict[str, Any]], folder: Path | None = None, gpu: str | None = None, **more: Any
) -> Path:
    """Write the result file of *bench* and return its path; *folder* defaults to bench/results.

    *gpu* is where it was recorded, if not here.
    """
    target = folder or RESULTS
    target.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": 1,
        "bench": bench,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "environment": {
            "gpu": gpu or gpu_name(),
            "driver": _driver(),
            **environment.versions(),
            "host_cpu": environment.host().cpu,
        },
        "command": _command(bench),
        **more,
        "cases": cases,
    }
    path = target / f"{bench}-{slug(gpu)}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def commit() -> str | None:
    # A copy of the tree without .git can carry the commit in a file.
    marker = Path(__file__).parent / "COMMIT"
    if marker.exists():
        return marker.read_text().strip()
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def interval(entry: dict[str, Any], factor: float, places: int) -> str:
    """Return an entry of a result as ``value [low, high]``, times *factor*."""
    value = f"{entry['value'] * factor:.{places}f}"
    if entry.get("low") is None:
        return value
    return f"{value} [{entry['low'] * factor:.{places}f}, {entry['high'] * factor:.{places}f}]"
