"""Runs ``model.generate`` and marks its phases, token steps and layers without touching the model's code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from llmkern.record.annotate import Annotator
from llmkern.workload.fused import FusedModel


def cache_argument(model: nn.Module) -> str:
    """Return what *model* and its generate call a cache: Transformers renamed it between 5.17 and 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of *model* in order: the longest list of modules of one class in it."""
    best: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best) and len({type(m) for m in module}) == 1:
            best = list(module)
    return best


class Annotated:
    """What generations of all engines have in common: where they are, and their layers as ranges."""

    model: Any
    annotator: Annotator
    synchronize: Callable[[], None]
    _step: int
    _token: int | None

    def _under_ranges(self, new_tokens: int, generate: Callable[[], Any]) -> float:
        """Call *generate*, which begins with its prefill, and return the seconds until the device was done.

        What is cut off leaves no range open.
        """
        note, depth = self.annotator, self.annotator.depth
        try:
            note.push(f"generate({new_tokens})", "generate")
            note.push("prefill", "phase", phase="prefill")
            with torch.inference_mode():
                generate()
            self.synchronize()
            note.pop()
            end_ns = note.pop()
            return (end_ns - note.last_start_ns) / 1e9
        except BaseException:
            note.abandon(depth)
            raise

    def where(self) -> tuple[str, int | None]:
        """Return the phase and token step now; what runs between two forwards belongs to the token before."""
        return "decode" if self._token else "prefill", self._token

    @contextmanager
    def layers_annotated(self) -> Iterator[None]:
        """Mark every decoder layer with a range as well.

        Each layer's forward is wrapped for the time: two hooks per layer would cost several times as much, because they
        switch off the short way through torch.nn.Module's call.
        """
        note = self.annotator

        def marked(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
            @functools.wraps(forward)
            def run(*args: Any, **kwargs: Any) -> Any:
                depth = note.depth
                note.push(name, "layer", "decode" if self._step else "prefill", self._step)
                try:
                    result = forward(*args, **kwargs)
                except BaseException:
                    note.abandon(depth)
                    raise
                note.pop()
                return result

            return run

        layers = decoder_layers(self.model)
        before = [vars(layer).get("forward") for layer in layers]
        try:
            for index, layer in enumerate(layers):
                layer.forward = marked(layer.forward, f"layer {index}")
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                if forward is None:
                    vars(layer).pop("forward", None)
                else:
                    # Something else (accelerate's hooks, say) had wrapped it before.
                    layer.forward = forward


@dataclass
class Generation(Annotated):
    """Greedy generation of exactly n tokens for one batch of prompts, annotated.

    *inputs* are input_ids and attention_mask, int64 tensors of shape [batch, prompt tokens]; *cache* is used by every
    generation in the place of a new one. A phase ends when the device has finished it: generate reads the stopping
    criterion back after every token, which synchronises, and *synchronize* is called at the end. What is cut off, by a
    signal or for want of memory, leaves no range of a phase, token or layer behind that did not end.
    """

    model: Any
    inputs: dict[str, torch.Tensor]
    annotator: Annotator
    synchronize: Callable[[], None]
    cache: Any = None
    _step: int = field(default=0, init=False)
    _token: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        config = self.model.generation_config
        # An end-of-sequence token would end a run early; the study's lengths are exact.
        config.eos_token_id = None
        if config.pad_token_id is None:
            config.pad_token_id = 0

    def __call__(self, new_tokens: int) -> float:
        """Generate *new_tokens* tokens per sequence and return the seconds until the device was done."""
        note = self.annotator
        note.new_tokens = new_tokens
        self._step, self._token = 0, None
        kept = {}
        if self.cache is not None:
            with torch.inference_mode():
                self.cache.reset()
            kept[cache_argument(self.model)] = self.cache
        self.synchronize()
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.model.generation_config.pad_token_id,
            # With a cache of fixed size generate would compile the model, which is another one then.
            disable_compile=True,
        )
        hooks = [
            self.model.register_forward_pre_hook(self._before_forward),
            self.model.register_forward_hook(self._after_forward),
        ]
        try:
            return self._under_ranges(
                new_tokens, lambda: self.model.generate(**self.inputs, **kept, generation_config=config)
            )
        finally:
            for hook in hooks:
                hook.remove()

    def _before_forward(self, _module: nn.Module, _args: Any) -> None:
        note = self.annotator
        if self._step == 1:
            note.pop()
            note.push("decode", "phase", phase="decode")
        self._token = self._step
        note.push(f"token {self._step}", "token", "decode" if self._step else "prefill", self._step)

    def _after_forward(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.annotator.pop()
        self._step += 1


@dataclass
class FusedGeneration(Annotated):
    """The same from a FusedModel: nothing on the host waits for a token, *synchronize* ends prefill and decode.

    Ranges of tokens are when the host issued them, which is long before the device computes them.
    """

    model: FusedModel
    inputs: dict[str, torch.Tensor]
    annotator: Annotator
    synchronize: Callable[[], None]
    _step: int = field(default=0, init=False)
    _token: int | None = field(default=None, init=False)

    def __call__(self, new_tokens: int) -> float:
        """Generate *new_tokens* tokens per sequence and return the seconds until the device was done."""
        self.annotator.new_tokens = new_tokens
        self._step, self._token = 0, None
        self.synchronize()
        return self._under_ranges(new_tokens, lambda: self._generate(new_tokens))

    def _generate(self, new_tokens: int) -> None:
        note, given = self.annotator, (self.inputs["input_ids"], self.inputs["attention_mask"])
        self._next("prefill", lambda: self.model.prefill(*given))
        self.synchronize()
        if new_tokens > 1:
            note.pop()
            note.push("decode", "phase", phase="decode")
        for _ in range(1, new_tokens):
            self._next("decode", self.model.step)

    def _next(self, phase: str, compute: Callable[[], None]) -> None:
        self._token = self._step
        self.annotator.push(f"token {self._step}", "token", phase, self._step)
        compute()
        self.annotator.pop()
        self._step += 1
