"""What an operator of PyTorch does, by its schema and its tensors: whether it computes, how many bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

# Operators that read of their table only what they give back.
_GATHERS = ("aten.embedding.", "aten.index.", "aten.index_select.", "aten.gather.")
# Operators that give back their input or, where that will not do, a copy: casts before all.
_MAY_COPY = ("to", "contiguous", "reshape", "flatten", "type_as")
# Fewer indices than this are too few to matter.
FEW_INDICES = 32
# Questions about a tensor that copy the answer from the device to the host.
_READ_BACK = ("item", "_local_scalar_dense", "is_nonzero", "equal")


DTYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
}


def describe(leaves: list[Any]) -> tuple[str, str]:
    """Return the shapes and the dtypes among the arguments *leaves* as table ``ops`` has them.

    A dtype that is an argument itself, as in a cast, stands behind "to".
    """
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    shapes = " ".join("x".join(map(str, t.shape)) or "1" for t in tensors)
    dtypes = [_dtype(t.dtype) for t in tensors] + [f"to {_dtype(x)}" for x in leaves if isinstance(x, torch.dtype)]
    return shapes, " ".join(dtypes)


def _dtype(dtype: torch.dtype) -> str:
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def signature_of(func: Any, leaves: list[Any]) -> str:
    """Return what makes two calls the same work: operator, shapes and dtypes among the arguments *leaves*.

    How many of a few indices there are depends on the data (LLM.int8() finds four outliers here and six there), and
    changes the work little: from one to FEW_INDICES - 1 of them are "few".
    """
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    _, dtypes = describe(leaves)
    shapes = " ".join("few" if _few_indices(t) else "x".join(map(str, t.shape)) or "1" for t in tensors)
    return f"{func}[{shapes}; {dtypes}]"


def _few_indices(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64) and 0 < len(tensor) < FEW_INDICES


def computes(operator: Any) -> bool:
    """Whether *operator* computes a tensor: neither a mere view of its input nor a question about one."""
    returns = operator._schema.returns
    if returns and not any("Tensor" in str(r.type) for r in returns):
        return False
    return not returns or any(r.alias_info is None or r.alias_info.is_write for r in returns)


def may_copy(operator: Any) -> bool:
    """Whether :func:`copied` has to be asked of each call of *operator*."""
    namespace, _, name = operator._schema.name.partition("::")
    return namespace == "aten" and name in (*_MAY_COPY, *_READ_BACK)


def copied(inputs: list[torch.Tensor], result: Any) -> bool:
    """Whether a call of an operator that :func:`may_copy` has copied *inputs*, or read them back from a device."""
    if not isinstance(result, torch.Tensor):
        return any(t.device.type != "cpu" for t in inputs)
    return all(result.data_ptr() != t.data_ptr() for t in inputs)


def touched_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the elements of *tensor*; those that an expanded view repeats count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride != 0 else 1
    return count * tensor.element_size()


def moved_bytes(op: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Return the fewest bytes that *op* moves: inputs read once, outputs written once."""
    written = sum(map(touched_bytes, outputs))
    if op.startswith("llmkern.next_token."):
        # Of the embedding, the last, one row a sequence is read, which becomes its hidden state.
        return written + sum(map(touched_bytes, inputs[:-1])) + touched_bytes(inputs[1])
    if op.startswith("llmkern.next_token_of_shortlist."):
        # Of the rows and the embedding at least one a sequence, which becomes its hidden state.
        return written + sum(map(touched_bytes, inputs[:3])) + 3 * touched_bytes(inputs[0])
    if op.startswith(_GATHERS):
        return 2 * written + sum(touched_bytes(t) for t in inputs[1:])
    return written + sum(map(touched_bytes, inputs))


def flops(
    func: Any,
    called: tuple[tuple[Any, ...], Mapping[str, Any]],
    result: Any,
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> int:
    """Return the operations of a product or attention *called* with (args, kwargs), 0 for everything else.

    By PyTorch's own formulas, and for what it has none for: 2 x results x inner dimension for products, 4 x batch x
    heads x queries x keys x head size for attention (masked halves counted, as PyTorch counts them).
    """
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        args, kwargs = called
        return int(formula(*args, **kwargs, out_val=result))
    name = str(func)
    if not outputs or not inputs:
        return 0
    if name.startswith("aten.scaled_dot_product_attention"):
        query, key = inputs[0].shape, inputs[1].shape
        return 4 * inputs[0].numel() * key[-2] if len(query) >= 2 else 0
    if name.startswith("llmkern.") and "_linear." in name:
        halves = 2 if called[1].get("pairs") else 1
        return 2 * halves * outputs[0].numel() * inputs[0].shape[-1]
    if name.startswith("llmkern.decode_attention."):
        return 4 * outputs[0].numel() * inputs[1].shape[2]
    quantized = name.startswith("bitsandbytes.") and any(w in name for w in ("linear", "gemv", "gemm", "scaled_mm"))
    if quantized or name.startswith(("aten.linear.", "aten.matmul.")):
        # The inner dimension is that of the activations, which come first.
        return 2 * outputs[0].numel() * inputs[0].shape[-1]
    return 0
