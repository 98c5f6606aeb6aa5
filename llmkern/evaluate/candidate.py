"""From what a user names to something that computes y = x · Wᵀ: MODULE:FUNCTION, FILE.py:FUNCTION or FILE.cu."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkern.errors import UsageError

Function = Callable[[torch.Tensor, Any, "torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """*call*(x [M, K], weight, bias) returns y [M, N]; *prepare* makes of a stored weight what it is given instead."""

    call: Function
    prepare: Callable[[Any], Any] = lambda weight: weight
    formats: tuple[str, ...] = ("int8", "nf4", "int4")
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    # Of the candidate's own form of the weight; None: the codes and scales as they are stored.
    bytes_per_weight: int | None = None
    # Bytes that the compiler spilled to memory, where the candidate knows it.
    spilled_bytes: Callable[[], int | None] = lambda: None


def split_spec(text: str) -> tuple[str, str]:
    """Return (name, spec) of ``[NAME=]SPEC``; the name is what tells the spec from others where none is given."""
    name, equals, spec = text.partition("=")
    if equals and name and "/" not in name and ":" not in name:
        return name, spec
    path, _, function = text.rpartition(":")
    return (function or Path(text).stem) if path else Path(text).stem, text


def load(spec: str) -> Candidate:
    """Return the candidate that *spec* names.

    Raises UsageError, with what is missing, for one that cannot be loaded.
    """
    if spec.startswith(("peer:", "llmkern:")):
        from llmkern.evaluate.peers import peer

        return peer(spec)
    if spec.endswith((".cu", ".cuh")):
        from llmkern.evaluate.cuda_file import load_cuda

        return load_cuda(Path(spec))
    where, colon, function = spec.rpartition(":")
    if not colon or not where or not function:
        raise UsageError(f"candidate {spec!r} names no function: give MODULE:FUNCTION, FILE.py:FUNCTION or FILE.cu.")
    found = getattr(_module(where), function, None)
    if found is None:
        raise UsageError(f"candidate {spec!r}: there is no {function} in {where}; check its name.")
    if not callable(found):
        raise UsageError(f"candidate {spec!r}: {function} is a {type(found).__name__} and cannot be called.")
    prepare = getattr(found, "prepare", None)
    formats = tuple(getattr(found, "formats", Candidate.formats))
    return Candidate(found, prepare or Candidate.prepare, formats)


def _module(where: str) -> Any:
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise UsageError(f"candidate file {where} does not exist: check its path.")
        spec = importlib.util.spec_from_file_location(f"candidate_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Triton reads a kernel's source through its module.
        sys.modules[spec.name] = module
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UsageError(f"candidate file {where} cannot be imported ({type(error).__name__}: {error}).") from error
        return module
    sys.path.insert(0, "")
    try:
        return importlib.import_module(where)
    except Exception as error:
        raise UsageError(
            f"candidate module {where!r} cannot be imported ({type(error).__name__}: {error}); "
            "give a file as FILE.py:FUNCTION."
        ) from error
