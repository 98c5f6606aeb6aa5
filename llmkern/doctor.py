"""What works on this machine, and what to do about the rest."""

from __future__ import annotations

import importlib
import platform
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmkern.errors import LlmkernError
from llmkern.record.device.rapl import package_zones

OK, LIMITED, MISSING = "ok", "limited", "missing"
_STYLE = {OK: "green", LIMITED: "yellow", MISSING: "red"}


@dataclass(frozen=True)
class Finding:
    """One thing a run may need: its state, what was found, and the next step where it is not ``ok``."""

    what: str
    state: str
    found: str
    step: str = ""


def examine() -> list[Finding]:
    """Look at libraries, GPU, CUPTI, NVML and RAPL, and return what was found; nothing is changed."""
    torch, problem = _imported("torch")
    if torch is None:
        step = "Install PyTorch: 'pip install torch'."
        rest = [Finding(what, MISSING, problem, step) for what in ("GPU", "CUPTI", "NVML")]
        return [*_libraries(), *rest, _rapl()]
    return [*_libraries(), *_gpu(torch), _cupti(torch), *_nvml(torch), _rapl()]


def _imported(name: str) -> tuple[ModuleType | None, str]:
    """Return module *name*, or None and why it cannot be imported."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:
        # A library that is half installed fails in its own ways.
        return None, f"{name} cannot be imported ({type(error).__name__}: {error})"


def _libraries() -> list[Finding]:
    found = [Finding("Python", OK, platform.python_version())]
    for package, needed_for in (
        ("torch", "everything"),
        ("transformers", "everything"),
        ("bitsandbytes", "--precision int8 and int4"),
        ("nvtx", "ranges"),
        ("triton", "Triton kernels on a GPU"),
        ("cupy", "CUDA kernels compiled at run time"),
    ):
        version = _version(package)
        if version is not None:
            found.append(Finding(package, OK, version))
        else:
            wheel = {"cupy": "cupy-cuda13x"}.get(package, package)
            found.append(Finding(package, MISSING, "not installed", f"'pip install {wheel}', needed for {needed_for}."))
    return found


def _version(package: str) -> str | None:
    names = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}.get(package, (package,))
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        return str(getattr(__import__(package), "__version__", "version unknown"))
    except Exception:
        return None


def _gpu(torch: ModuleType) -> list[Finding]:
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            capability, memory = f"{facts.major}.{facts.minor}", f"{facts.total_memory / 2**30:.0f} GiB"
            found.append(Finding(f"GPU {index}", OK, f"{facts.name}, compute capability {capability}, {memory}"))
        return found
    if torch.version.cuda is None:
        return [Finding("GPU", MISSING, f"torch {torch.__version__} is a CPU build", "Install a CUDA build of torch.")]
    return [Finding("GPU", MISSING, "torch finds no GPU or driver", "Install the NVIDIA driver; --device cpu works.")]


def _cupti(torch: ModuleType) -> Finding:
    try:
        from llmkern.record.device.cupti import CuptiRecorder

        recorder: Any = CuptiRecorder()
    except LlmkernError as error:
        return Finding("CUPTI", MISSING, str(error), "Kernels of a GPU cannot be recorded; the CPU works.")
    with recorder:
        version = f"version {recorder.version}"
        try:
            recorder.start()
        except LlmkernError as error:
            step = "" if torch.cuda.is_available() else "It needs a GPU and its driver."
            return Finding("CUPTI", LIMITED, f"{version} loads, but {error}", step)
    return Finding("CUPTI", OK, version)


def _nvml(torch: ModuleType) -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("NVML", MISSING, "no GPU", "Energy of a GPU cannot be read here.")]
    from llmkern.record.device.nvml import NvmlMeter

    found = []
    for index in range(torch.cuda.device_count()):
        try:
            meter = NvmlMeter(index, f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        except LlmkernError as error:
            found.append(Finding(f"NVML, GPU {index}", MISSING, str(error)))
            continue
        limit_mw = meter.info.get("power_limit_mw")
        limit = f", limit {limit_mw / 1e3:.0f} W" if limit_mw else ""
        found.append(Finding(f"NVML, GPU {index}", OK, f"driver {meter.info.get('driver_version')}{limit}"))
        costs = meter.call_costs_us()
        for source, problem in meter.support.items():
            cost = f"a call costs {costs[source]:,.1f} µs" if source in costs else "works"
            state = OK if problem is None else LIMITED
            found.append(Finding(f"  {source}", state, cost if problem is None else problem))
    return found


def _rapl() -> Finding:
    zones, problem = package_zones()
    if zones:
        return Finding("RAPL", OK, f"{len(zones)} CPU package(s)")
    return Finding("RAPL", MISSING, problem or "none", "Energy of the host CPU is left out; nothing else needs it.")


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "state", "found", "next step"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        state = Text(finding.state, style=_STYLE[finding.state])
        table.add_row(finding.what, state, finding.found, finding.step)
    console.print(table)
