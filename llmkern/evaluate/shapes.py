"""The linear layers of a model as [N, K], as a server fuses them: q|k|v, o, gate|up, down."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmkern.errors import UsageError
from llmkern.workload.models import REGISTRY, find_model

_SIZE = re.compile(r"(\d{1,7})x(\d{1,7})")


@dataclass(frozen=True)
class LayerShape:
    """*n* output rows of *k* weights; *label* says of what."""

    n: int
    k: int
    label: str


def layers_of(model: str) -> list[LayerShape]:
    """Return the four linear layers of a model of the registry. Raises UsageError for a name it does not know."""
    spec = find_model(model)
    known = spec.architecture
    if not known:
        raise UsageError(f"--shapes {model!r} is no model of the registry: name one ('llmkern models'), or give NxK.")
    hidden, inner = known["hidden_size"], known["intermediate_size"]
    head = known.get("head_dim", hidden // known["num_attention_heads"])
    heads, kv = known["num_attention_heads"] * head, known["num_key_value_heads"] * head
    sizes = {
        "qkv": (heads + 2 * kv, hidden),
        "o": (hidden, heads),
        "gate|up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    return [LayerShape(n, k, f"{spec.name} {name}") for name, (n, k) in sizes.items()]


def parse_shapes(text: str) -> list[LayerShape]:
    """Return the distinct shapes that ``--shapes`` names: models of the registry and sizes NxK, separated by commas.

    Raises UsageError.
    """
    found: dict[tuple[int, int], LayerShape] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        size = _SIZE.fullmatch(part)
        shapes = [LayerShape(int(size[1]), int(size[2]), part)] if size else layers_of(part)
        for shape in shapes:
            if shape.n < 1 or shape.k < 1:
                raise UsageError(f"--shapes {part}: N and K must be at least 1.")
            found.setdefault((shape.n, shape.k), shape)
    if not found:
        raise UsageError(f"--shapes {text!r} names no shape: give models ({', '.join(REGISTRY)}) or sizes as NxK.")
    return list(found.values())
