"""Kernels, copies and host calls of this process through CUPTI."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

import torch

from llmkern.errors import DeviceError
from llmkern.record.device.interface import Columns
from llmkern.record.device.native import labels, native
from llmkern.runfolder.facts import RecorderFacts

# Set by the tools that launch a program under their own CUPTI; the name in the message saves the user a search.
NSYS_SESSION = "NSYS_PROFILING_SESSION_ID"
INJECTORS = {NSYS_SESSION: "Nsight Systems", "CUDA_INJECTION64_PATH": "an injected tool"}


class CuptiRecorder:
    """Kernel, copy and launch records of this process through CUPTI.

    *library* is the file to take instead of searching.
    """

    of_one_thread = False

    def __init__(self, library: str = "") -> None:
        module = native()
        self._errors = module.RecorderError
        self._kinds: list[str] = list(module.KIND_NAMES)
        self._running = False
        try:
            self._recorder = module.ActivityRecorder(cupti_candidates(), library)
        except self._errors as error:
            raise DeviceError(str(error)) from error

    def __enter__(self) -> CuptiRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, *, host_calls: bool = True) -> None:
        try:
            self._recorder.start(host_calls=host_calls)
        except self._errors as error:
            owner = next((who for key, who in INJECTORS.items() if os.environ.get(key)), None)
            hint = f" ({owner} started this process)" if owner else ""
            raise DeviceError(f"{error}{hint}") from error
        self._running = True

    def stop(self) -> None:
        """Stop recording; what CUPTI still held can be drained afterwards."""
        if self._running:
            self._running = False
            self._recorder.stop()

    def flush(self) -> None:
        if self._running:
            self._recorder.flush()

    def discard(self) -> None:
        self._recorder.flush(forced=True)
        self._recorder.settle()
        self._recorder.drain()

    def inject(self, records: bytes) -> None:
        """Pass raw activity records through the same path as CUPTI's own (load generators, tests)."""
        self._recorder.inject(records)

    def backlog(self) -> int:
        """Return about how many kernels wait to be decoded or drained."""
        return int(self._recorder.backlog())

    def settle(self) -> None:
        """Wait until everything handed over is decoded."""
        self._recorder.settle()

    def drain(self) -> dict[str, Columns]:
        rows = self._recorder.drain()
        names = self._recorder.names()
        kernels, launches, overheads = (dict(rows[key]) for key in ("kernels", "launches", "overheads"))
        kernels["name"] = labels(kernels["name"], names)
        kernels["kind"] = labels(kernels["kind"], self._kinds)
        launches["api"] = labels(launches["api"], names)
        overheads["kind"] = labels(overheads["kind"], names)
        return {"kernels": kernels, "launches": launches, "overheads": overheads}

    def facts(self) -> RecorderFacts:
        return RecorderFacts(
            source="CUPTI activity records",
            library_version=self._recorder.version,
            clock_offset_ns=self._recorder.clock_offset_ns(),
            **self._recorder.statistics(),
        )

    @property
    def version(self) -> int:
        """Return the version of CUPTI's interface."""
        return int(self._recorder.version)

    def close(self) -> None:
        """Stop, end the decoding thread and give all memory back; the recorder cannot be started again."""
        self._running = False
        self._recorder.close()


def cupti_candidates() -> list[str]:
    """Return the libcupti files of the CUDA wheels on sys.path, those of this PyTorch's CUDA version first."""
    major = (torch.version.cuda or "13").partition(".")[0]
    found = [str(f) for root in sys.path if root for f in Path(root).glob("nvidia/*/lib/libcupti.so.*[0-9]")]
    toolkit = [str(f) for f in Path("/usr/local").glob("cuda*/extras/CUPTI/lib64/libcupti.so.*[0-9]")]
    return sorted(found + toolkit, key=lambda f: (f".so.{major}" not in f and f"cu{major}" not in f, f))
