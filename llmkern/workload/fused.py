"""A decoder of few launches: the model's own weights, its products stacked, all that stands between them fused.

A decode step is seven launches a layer (norm, q|k|v, attention with rope and cache, output + residual, norm, gate|up
with SiLU, down + residual) and four more; on a GPU it is one CUDA graph, which nothing on the host waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmkern.errors import UsageError
from llmkern.kernels import ops as _ops  # noqa: F401  registers torch.ops.llmkern
from llmkern.kernels.decode_layer.reference import rotated
from llmkern.kernels.formats import Bf16Weight, Int8Weight, Weight, pairs_order, stacked
from llmkern.kernels.modules import FusedLinear, weight_of
from llmkern.workload.engine import capture_cuda

# What they have in common: RMSNorm before both halves, rotary positions, grouped queries, SiLU gates.
ARCHITECTURES = ("llama", "mistral", "qwen2")
MOST_BATCH, MOST_GROUP, HEAD_SIZES = 64, 16, (64, 128)
# Each sequence has a shortlist of its own, whose rows are read for it alone.
SHORTLIST_BATCH = 8
# Which places [B, 1, T, T] each place of a prompt sees, None for all before it.
Seen = torch.Tensor | None


class RmsNorm(nn.Module):
    """x over the root of its mean square, times its weight."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps = float(norm.variance_epsilon)
        self.register_buffer("weight", norm.weight.detach(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.llmkern.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


class Attention(nn.Module):
    """Self-attention of a layer over a cache of fixed size, keys and values [B, heads, places, D]."""

    def __init__(self, attention: Any, rotary: Any) -> None:
        super().__init__()
        parts = [getattr(attention, f"{name}_proj") for name in "qkv"]
        biases = [part.bias for part in parts]
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        self.head_size = int(attention.head_dim)
        self.heads = _weight(parts[1]).n // self.head_size
        self.scaling = float(rotary.attention_scaling)
        self.qkv_proj = FusedLinear(_packed(stacked([_weight(part) for part in parts])), bias)
        self.o_proj = FusedLinear(_packed(_weight(attention.o_proj)), _bias(attention.o_proj))
        self.register_buffer("turn", rotary.inv_freq.detach().float().clone(), persistent=False)
        self.turn: torch.Tensor
        self.keys = self.values = torch.empty(0)

    def make_cache(self, batch: int, places: int, like: torch.Tensor) -> None:
        shape = (batch, self.heads, places, self.head_size)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def forward(
        self, x: torch.Tensor, hidden: torch.Tensor, position: torch.Tensor, start: torch.Tensor, seen: Seen
    ) -> torch.Tensor:
        """Return hidden plus attention: of one new token, x [B, H], or of whole prompts, x [B, T, H]."""
        qkv = self.qkv_proj(x)
        if x.dim() == 3:
            return self.o_proj(self._whole(qkv, start, seen), hidden)
        mixed = torch.ops.llmkern.decode_attention(
            qkv, self.keys, self.values, position, start, self.turn, self.scaling
        )
        return self.o_proj(mixed, hidden)

    def _whole(self, qkv: torch.Tensor, start: torch.Tensor, seen: Seen) -> torch.Tensor:
        """Return the attention of whole prompts, [B, T, queries * D]; fills the cache."""
        batch, length, _ = qkv.shape
        rows = qkv.view(batch, length, -1, self.head_size)
        queries = rows.shape[2] - 2 * self.heads
        places = (torch.arange(length, device=qkv.device) - start[:, None]).clamp(min=0)
        turned = rotated(rows[:, :, : queries + self.heads], places, self.turn, self.scaling)
        turned = turned.to(qkv.dtype).transpose(1, 2)
        query, key, value = turned[:, :queries], turned[:, queries:], rows[:, :, queries + self.heads :].transpose(1, 2)
        self.keys[:, :, :length], self.values[:, :, :length] = key, value
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, enable_gqa=True
        )
        return mixed.transpose(1, 2).reshape(batch, length, -1)


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)) plus the residual; gates and what they open stand side by side."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        gate, up = _weight(mlp.gate_proj), _weight(mlp.up_proj)
        order = pairs_order(gate.n, mlp.gate_proj.weight.device)
        self.gate_up_proj = FusedLinear(_packed(stacked([gate, up], order)), None, pairs=True)
        self.down_proj = FusedLinear(_packed(_weight(mlp.down_proj)), _bias(mlp.down_proj))

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x), hidden)


class Layer(nn.Module):
    """One decoder layer, for one new token of each sequence or for whole prompts."""

    def __init__(self, layer: Any, rotary: Any) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(layer.input_layernorm)
        self.self_attn = Attention(layer.self_attn, rotary)
        self.post_attention_layernorm = RmsNorm(layer.post_attention_layernorm)
        self.mlp = Mlp(layer.mlp)

    def forward(
        self, hidden: torch.Tensor, position: torch.Tensor, start: torch.Tensor, seen: Seen = None
    ) -> torch.Tensor:
        hidden = self.self_attn(self.input_layernorm(hidden), hidden, position, start, seen)
        return self.mlp(self.post_attention_layernorm(hidden), hidden)


class Backbone(nn.Module):
    """What Transformers calls ``model``: embedding, layers, last norm."""

    def __init__(self, model: Any, made: Callable[[int], None]) -> None:
        super().__init__()
        self.embed_tokens = model.embed_tokens
        self.layers = nn.ModuleList()
        for index, layer in enumerate(model.layers):
            self.layers.append(Layer(layer, model.rotary_emb))
            # Stacked and packed weights are new ones: the old go as the new come.
            model.layers[index] = nn.Identity()
            made(index)
        self.norm = RmsNorm(model.norm)


class Shortlist(nn.Module):
    """Finds the largest logit without reading all *rows* [V, H] of a head in 16 bits: they are rounded to int8, and
    only those are read that this does not rule out (reference.allowed); the choice is that of all rows in fp32.
    """

    def __init__(self, rows: torch.Tensor, batch: int) -> None:
        super().__init__()
        # In parts: rounding takes fp32.
        parts = [Int8Weight.quantize(part) for part in rows.split(8192)]
        weight = Int8Weight.of(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))
        self.rough = FusedLinear(_packed(weight), None)
        self.register_buffer("rows", rows, persistent=False)
        self.low = torch.zeros(batch, dtype=torch.int32, device=rows.device)
        self.sums = torch.zeros(batch, device=rows.device)

    def forward(self, x: torch.Tensor, *state: torch.Tensor) -> None:
        """Go on to the next token of x [B, H]; *state* is hidden, position, tokens, best and the embedding."""
        *changed, embedding = state
        torch.ops.llmkern.next_token_of_shortlist(
            x, self.rough(x), self.rough.scales, self.rows, *changed, self.low, self.sums, embedding
        )


class FusedModel(nn.Module):
    """A causal language model of ARCHITECTURES over its own weights, decoding greedily without the host.

    The layers of *model* are taken out of it one by one; *made* is called after each. ``prefill(ids, mask)`` reads
    prompts [B, T] (padded on the left) and chooses the first token, ``step()`` one more; ``tokens`` [B, places] has
    them all. With *shortlist* (None: on a GPU) a head in 16 bits is read in part (see Shortlist), for at most
    SHORTLIST_BATCH sequences. Raises UsageError for a model or a batch that it cannot be.
    """

    def __init__(
        self,
        model: Any,
        places: int,
        batch: int,
        made: Callable[[int], None] = lambda index: None,
        shortlist: bool | None = None,
    ) -> None:
        super().__init__()
        check(model.config, places, batch, model.device, model.dtype)
        self.config, self.generation_config = model.config, model.generation_config
        self.model = Backbone(model.model, made)
        head = _weight(model.lm_head)
        self.lm_head = FusedLinear(_packed(head), _bias(model.lm_head))
        self.shortlist = None
        wanted = model.device.type == "cuda" if shortlist is None else shortlist
        if wanted and isinstance(head, Bf16Weight) and self.lm_head.bias is None and batch <= SHORTLIST_BATCH:
            self.shortlist = Shortlist(head.rows, batch)
        like = self.model.embed_tokens.weight
        self.places, self._apart = places, False
        self._graph: Callable[[], Any] | None = None
        for layer in self.model.layers:
            layer.self_attn.make_cache(batch, places, like)  # type: ignore[union-attr,operator]
        state = {"dtype": torch.int32, "device": like.device}
        self.position, self.start = torch.zeros(batch, **state), torch.zeros(batch, **state)
        self.best = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.tokens = torch.zeros(batch, places, dtype=torch.int64, device=like.device)
        self.hidden = torch.zeros(batch, like.shape[1], dtype=like.dtype, device=like.device)

    def forward(self) -> None:
        """Compute one token of each sequence, launch by launch."""
        self._choose(self._last())

    def logits(self) -> torch.Tensor:
        """Return the logits [B, V] of the next token without going on to it."""
        logits: torch.Tensor = self.lm_head(self._last())
        return logits

    def _last(self) -> torch.Tensor:
        """Return what the head is given [B, H]."""
        hidden = self.hidden
        for layer in self.model.layers:
            hidden = layer(hidden, self.position, self.start)
        return self.model.norm(hidden)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Read the prompts *ids* [B, T], padding masked by zeros of *mask*, and choose the first token of each."""
        length = ids.shape[1]
        self.start.copy_(length - mask.sum(1))
        self.position.fill_(length - 1)
        self.best.zero_()
        self.tokens[:, :length] = ids
        hidden = self.model.embed_tokens(ids)
        seen = self._seen(mask) if length > 1 else None
        for layer in self.model.layers:
            hidden = layer(hidden, self.position, self.start, seen)
        self._choose(self.model.norm(hidden[:, -1].contiguous()))

    def _seen(self, mask: torch.Tensor) -> Seen:
        """Return which places [B, 1, T, T] each place sees, None where nothing is padded."""
        if bool(mask.all()):
            return None
        length = mask.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        # A place of padding sees itself, for there is no attention over nothing.
        alone = torch.eye(length, dtype=torch.bool, device=mask.device)
        return (causal & mask.bool()[:, None, :] | alone)[:, None]

    def _choose(self, x: torch.Tensor) -> None:
        state = (self.hidden, self.position, self.tokens, self.best, self.model.embed_tokens.weight)
        if self.shortlist is not None:
            self.shortlist(x, *state)
        else:
            torch.ops.llmkern.next_token(self.lm_head(x), *state)

    def step(self) -> None:
        """Go on by one token: one launch of a graph on a GPU, which is captured at the first call."""
        if self.position.device.type != "cuda" or self._apart:
            self()
            return
        if self._graph is None:
            kept = [t.clone() for t in (self.hidden, self.position, self.tokens)]
            # What is compiled or loaded on first use cannot be captured.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = capture_cuda(self)
            for tensor, before in zip((self.hidden, self.position, self.tokens), kept, strict=True):
                tensor.copy_(before)
        self._graph()

    @contextmanager
    def taken_apart(self) -> Iterator[None]:
        """Run steps launch by launch for the time instead of as a graph: the same kernels."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    @torch.inference_mode()
    def generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        new_tokens: int,
        stop: frozenset[int] = frozenset(),
        every: int = 16,
    ) -> torch.Tensor:
        """Return ids and up to *new_tokens* more, [B, T + n].

        After every *every* tokens it is looked whether all have met one of *stop*. Raises UsageError where they do not
        fit the cache.
        """
        length = ids.shape[1]
        if length + new_tokens > self.places:
            raise UsageError(f"{length} + {new_tokens} tokens exceed the cache of {self.places}: build it larger.")
        self.prefill(ids, mask)
        ends = torch.tensor(sorted(stop), device=ids.device)
        for made in range(1, new_tokens):
            if (
                stop
                and made % every == 0
                and bool(torch.isin(self.tokens[:, length : length + made], ends).any(1).all())
            ):
                return self.tokens[:, : length + made].clone()
            self.step()
        return self.tokens[:, : length + new_tokens].clone()


def check(config: Any, places: int, batch: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse models and batches that the fused engine is not built for; raises UsageError."""
    kind = getattr(config, "model_type", "unknown")
    if kind not in ARCHITECTURES:
        raise UsageError(f"--engine fused knows {', '.join(ARCHITECTURES)}, this is a {kind}: use --engine graph.")
    if batch > MOST_BATCH:
        raise UsageError(f"--engine fused decodes at most {MOST_BATCH} sequences at once, not {batch}: use fewer.")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and places > window:
        raise UsageError(
            f"this model attends to the last {window} tokens, and {places} are asked for: --engine fused attends to "
            "all; use fewer tokens or --engine graph."
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UsageError(f"--engine fused knows SiLU, this model has {config.hidden_act}: use --engine graph.")
    if device.type != "cuda":
        return
    if dtype == torch.float32:
        raise UsageError("--engine fused computes in bf16 or fp16: use --precision bf16, fp16, int8 or int4.")
    if size not in HEAD_SIZES or group > MOST_GROUP or config.hidden_size % 64 or config.intermediate_size % 64:
        raise UsageError(
            f"--engine fused has heads of 64 or 128 elements, at most {MOST_GROUP} a key, and sizes that divide by 64; "
            f"this model has {size}, {group}, {config.hidden_size} and {config.intermediate_size}: use --engine graph."
        )


def _weight(module: nn.Module) -> Weight:
    """Return the weight of a linear layer as it is stored; UsageError for a layer that is none."""
    try:
        found = weight_of(module)
    except ValueError as error:
        raise UsageError(f"--engine fused: {error}") from error
    if found is not None:
        return found
    rows = getattr(module, "weight", None)
    if type(module) is not nn.Linear or rows is None or rows.dim() != 2:
        raise UsageError(f"--engine fused knows Linear, Linear8bitLt and Linear4bit, not {type(module).__name__}.")
    return Bf16Weight.of(rows.detach())


def _packed(weight: Weight) -> Weight:
    return weight.to_packed() if weight.can_pack() else weight


def _bias(module: Any) -> torch.Tensor | None:
    bias: torch.Tensor | None = getattr(module, "bias", None)
    return None if bias is None else bias.detach()
