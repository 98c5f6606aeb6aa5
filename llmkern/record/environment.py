"""Versions and machine facts for run.json; never an environment variable, for those hold secrets."""

from __future__ import annotations

import platform
from importlib import metadata

import psutil
import torch

from llmkern import __version__
from llmkern.record.device.cpu import cpu_name
from llmkern.runfolder.facts import HostFacts

_PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "accelerate", "nvidia-ml-py", "nvtx", "cupy-cuda13x")


def versions() -> dict[str, str | None]:
    """Return the version of each library that the run depends on, None where it is not installed."""
    found: dict[str, str | None] = {"llmkern": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = _module_version(package)
    found["cuda"] = torch.version.cuda
    return found


def _module_version(package: str) -> str | None:
    """Return the version of a package that lies on the path without its metadata."""
    import importlib

    try:
        return getattr(importlib.import_module(package.replace("-", "_")), "__version__", None)
    except Exception:
        return None


def host() -> HostFacts:
    """Return what the host is: CPU, cores, memory, kernel."""
    return HostFacts(
        cpu=cpu_name(),
        cpu_threads=psutil.cpu_count(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
    )
