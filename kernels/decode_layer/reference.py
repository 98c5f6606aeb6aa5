"""The kernels of a decode step in plain PyTorch, in fp32 between reading and writing: what others are held against."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x [B, H] over the root of its mean square, times weight [H], in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotated(x: torch.Tensor, places: torch.Tensor, turn: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return x [B, T, heads, D] in fp32, turned by its place [B, T]; turn [D / 2] is the angle of one step."""
    angles = places.float()[..., None, None] * turn.float()
    cosine, sine = angles.cos() * scaling, angles.sin() * scaling
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def attention(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    start: torch.Tensor,
    turn: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return the attention [B, heads * D] of one new token over its context; its key and value are put in the cache.

    qkv [B, (queries + 2 * heads) * D]; keys and values [B, heads, T, D]; position [B] is the new token's place, start
    [B] the first that is no padding.
    """
    batch, heads, _, size = keys.shape
    rows = qkv.view(batch, 1, -1, size)
    queries = rows.shape[2] - 2 * heads
    places = (position - start)[:, None]
    own = rotated(rows[:, :, : queries + heads], places, turn, scaling)[:, 0]
    which = torch.arange(batch, device=qkv.device)
    keys[which, :, position.long()] = own[:, queries:].to(keys.dtype)
    values[which, :, position.long()] = rows[:, 0, queries + heads :].to(values.dtype)
    index = torch.arange(keys.shape[2], device=qkv.device)
    seen = (index >= start[:, None]) & (index <= position[:, None])
    query = own[:, :queries].view(batch, heads, queries // heads, size)
    scores = (query @ keys.float().transpose(2, 3)) * size**-0.5
    shares = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    # What lies beyond the context may be anything; nothing of it counts.
    context = values.float().masked_fill(~seen[:, None, :, None], 0.0)
    return (shares @ context).view(batch, queries * size).to(qkv.dtype)


def next_token(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    position: torch.Tensor,
    tokens: torch.Tensor,
    embedding: torch.Tensor,
) -> None:
    """Note the largest of logits [B, V] in tokens [B, T] at the place after position [B], and go on to it.

    hidden [B, H] becomes its embedding. Of equal ones the first is the largest.
    """
    chosen = logits.argmax(-1)
    position += 1
    there = position < tokens.shape[1]
    which = torch.arange(len(chosen), device=logits.device)[there]
    tokens[which, position[there].long()] = chosen[there]
    hidden.copy_(embedding[chosen])


def next_token_of_shortlist(
    x: torch.Tensor,
    rough: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    hidden: torch.Tensor,
    position: torch.Tensor,
    tokens: torch.Tensor,
    embedding: torch.Tensor,
) -> None:
    """Go on to the largest of x [B, H] · rows [V, H], reading only rows that *rough* does not rule out.

    rough [B, V] are the logits that the rows rounded to int8 gave, scales [V] the largest magnitudes of the rows. What
    is chosen is the largest in fp32, as if all rows had been read (see allowed()).
    """
    logits = x.float() @ rows.float().T
    next_token(logits.masked_fill(~allowed(x, rough, scales), float("-inf")), hidden, position, tokens, embedding)


def allowed(x: torch.Tensor, rough: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return which rows [B, V] may have the largest logit.

    A row rounded to int8 is off by at most scale / 254 in each element, so its logit is by scale / 254 x sum(|x|); to
    that come sums in fp32 (2^-24 of scale x sum(|x|) for each element) and the 16 bits of a rough logit (2^-8 of it).
    Where a row's upper bound is below the largest lower bound, another's logit is larger.
    """
    wide, sums = rough.float(), x.float().abs().sum(-1, keepdim=True)
    step = 1 / 254 + x.shape[-1] * 2**-24
    error = 1.0001 * step * scales.float() * sums + 2**-8 * wide.abs() + 1e-6
    return ~(wide + error < (wide - error).amax(-1, keepdim=True))
