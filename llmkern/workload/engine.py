"""Decode steps from one captured CUDA graph: the same generate loop, the same kernels, one launch per forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PretrainedConfig, StaticCache

from llmkern.errors import DeviceError

Launch = Callable[[], Any]


@contextmanager
def attention(*, cudnn: bool) -> Iterator[None]:
    """Let PyTorch choose its attention for the time, from all of its ways or without cuDNN's.

    cuDNN makes a plan for every shape that it has not met: in decode one for each length of the cache.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before and cudnn)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def capture_cuda(forward: Launch) -> Launch:
    """Capture *forward* in a CUDA graph and return what launches it; its results are always the same tensors."""
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward()

    def launch() -> Any:
        graph.replay()
        return result

    return launch


class CapturedDecode:
    """Stands in the place of a model's forward: prefill as it is, decode steps from a graph that is captured once.

    The first decode step runs as it is, so that nothing is loaded or allocated in the capture; the second is captured.
    What generate hands to a step is copied into tensors of the graph's own; a step of other shapes runs as it is.
    Raises DeviceError when the step cannot be captured.
    """

    def __init__(self, forward: Callable[..., Any], capture: Callable[[Launch], Launch] = capture_cuda) -> None:
        functools.update_wrapper(self, forward)
        self._forward = forward
        self._capture = capture
        self._launch: Launch | None = None
        self._step: Launch | None = None
        self._launches = True
        self._inputs: dict[tuple[str, ...], torch.Tensor] = {}
        self._seen = False

    def __call__(self, **arguments: Any) -> Any:
        ids = arguments.get("input_ids")
        if ids is None or ids.shape[1] != 1:
            return self._forward(**arguments)
        tensors = _tensors(arguments)
        if not self._seen:
            self._seen = True
            return self._forward(**arguments)
        if self._launch is None:
            self._inputs = {path: tensor.clone() for path, tensor in tensors.items()}
            own = _replaced(arguments, self._inputs)
            self._step = lambda: self._forward(**own)
            try:
                self._launch = self._capture(self._step)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise DeviceError(
                    f"this model's decode step cannot be captured in a CUDA graph ({reason}): it synchronises with the "
                    "host, as LLM.int8() does to look for outliers; use --engine eager, or another --precision."
                ) from error
        if {p: t.shape for p, t in tensors.items()} != {p: t.shape for p, t in self._inputs.items()}:
            return self._forward(**arguments)
        for path, tensor in tensors.items():
            self._inputs[path].copy_(tensor)
        return self._launch() if self._launches or self._step is None else self._step()

    @contextmanager
    def taken_apart(self) -> Iterator[None]:
        """Run for the time what was captured instead of launching the graph: the same kernels, operator by operator."""
        self._launches = False
        try:
            yield
        finally:
            self._launches = True


def static_cache(config: PretrainedConfig, prompt_tokens: int, new_tokens: int) -> StaticCache:
    """Return a cache of fixed size for *prompt_tokens* and *new_tokens* a sequence: a graph needs its addresses."""
    return StaticCache(config=config, max_cache_len=prompt_tokens + new_tokens)


def use_graph(model: Any, prompt_tokens: int, new_tokens: int) -> StaticCache:
    """Make *model* decode from a CUDA graph and return the cache that it must be given."""
    model.forward = CapturedDecode(model.forward)
    return static_cache(model.config, prompt_tokens, new_tokens)


def taken_apart(model: Any) -> AbstractContextManager[None]:
    """Let *model* run its decode steps operator by operator for the time, if they come from a graph."""
    if isinstance(model.forward, CapturedDecode):
        return model.forward.taken_apart()
    own: AbstractContextManager[None] = model.taken_apart() if hasattr(model, "taken_apart") else nullcontext()
    return own


def _tensors(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], torch.Tensor]:
    """Return the tensors among arguments and in the dicts among them, by where they are."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, dict):
        return {p: t for key, inner in value.items() for p, t in _tensors(inner, (*path, str(key))).items()}
    return {}


def _replaced(value: Any, tensors: dict[tuple[str, ...], torch.Tensor], path: tuple[str, ...] = ()) -> Any:
    if path in tensors:
        return tensors[path]
    if isinstance(value, dict):
        return {key: _replaced(inner, tensors, (*path, str(key))) for key, inner in value.items()}
    return value
