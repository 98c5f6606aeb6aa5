"""The kind of each kernel: by the operator and module that launched it first, by its name second.

A new rule is a new row. Rows are tried in their order, the first that matches in all its patterns wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.time.operators import UNIDENTIFIED

KINDS = (
    *("gemm", "gemv", "attention", "quantize", "dequantize", "outlier", "norm", "rope", "elementwise", "cast"),
    *("reduce", "gather", "sampling", "copy", "memset", "communication", "other"),
)


@dataclass(frozen=True)
class Rule:
    """A kind for kernels whose operator, module, argument shapes and name hold these patterns."""

    kind: str
    op: str = ""
    module: str = ""
    shapes: str = ""
    name: str = ""


_PRODUCT = r"^aten\.(linear|matmul|mm|addmm|bmm|baddbmm)\b"
# One row of activations: all dimensions before the last are 1.
_ONE_ROW = r"^(1x)*\d+ "

RULES = (
    Rule("memset", name=r"^memset"),
    Rule("rope", module=r"rotary"),
    # On the CPU an operator is its own kernel, and what it is for is all that can be said of it.
    Rule("gemv", op=r"int8_.*(linear|mm)\b", shapes=_ONE_ROW, name=r"^bitsandbytes\."),
    Rule("gemm", op=r"int8_.*(linear|mm)\b", name=r"^bitsandbytes\."),
    Rule("quantize", op=r"int8_(double_|vectorwise_)?quant", name=r"^bitsandbytes\."),
    # LLM.int8(): the search for outliers and everything on their fp16 side path, as bitsandbytes lays it out.
    Rule("quantize", op=r"int8_(double_|vectorwise_)?quant", name=r"kInt8VectorQuant|RowColStats|DoubleRowCol"),
    Rule("outlier", op=r"int8_(double_|vectorwise_)?quant"),
    # The same product is of the same kind at every precision, whatever kernel computes it.
    Rule("gemv", op=r"int8_.*(linear|mm)", shapes=_ONE_ROW, name=r"gemm_s8|i16832gemm|igemm|imma"),
    Rule("gemm", op=r"int8_.*(linear|mm)", name=r"gemm_s8|i16832gemm|igemm|imma"),
    Rule("dequantize", op=r"int8_.*mm", name=r"kdequant_mm"),
    Rule("dequantize", op=r"int8_(mm_|vectorwise_)?dequant"),
    # The product leaves in fp16 and is cast to the type of its input; then comes the bias.
    Rule("cast", op=r"int8_(mixed_)?scaled_mm", name=r"direct_copy_kernel"),
    Rule("elementwise", op=r"int8_(mixed_)?scaled_mm", name=r"CUDAFunctor_add"),
    Rule("outlier", op=r"int8_(mixed_)?scaled_mm"),
    # NF4 and FP4: one fused kernel for few rows, dequantize and product for more.
    Rule("gemv", op=r"bitsandbytes\.(gemm|gemv)_4bit", shapes=_ONE_ROW, name=r"gemm_4bit|gemv_4bit"),
    Rule("gemm", op=r"bitsandbytes\.(gemm|gemv)_4bit", name=r"gemm_4bit|gemv_4bit"),
    Rule("dequantize", op=r"bitsandbytes\..*4bit", name=r"[dD]equantize"),
    Rule("gemm", op=r"bitsandbytes\.(gemm|gemv)_4bit"),
    Rule("quantize", op=r"bitsandbytes\.quantize"),
    Rule("dequantize", op=r"bitsandbytes\.dequantize"),
    Rule("attention", op=r"scaled_dot_product|flash_attn|attention"),
    Rule("gemv", op=r"^llmkern\.\w+_linear", shapes=_ONE_ROW),
    Rule("gemm", op=r"^llmkern\.\w+_linear"),
    Rule("norm", op=r"^llmkern\.rms_norm"),
    Rule("sampling", op=r"^llmkern\.next_token"),
    Rule("gemv", op=_PRODUCT, shapes=_ONE_ROW),
    Rule("gemm", op=_PRODUCT),
    Rule("cast", op=r"^aten\.(to|_to_copy)\b", name=r"^(?!memcpy)"),
    Rule("copy", op=r"^aten\.(to|_to_copy)\b"),
    Rule("norm", module=r"norm$"),
    Rule("norm", op=r"(layer|rms|group)_norm"),
    # Rotating half of each head: two equal halves are put together, a cache grows by unequal parts.
    Rule("rope", op=r"^aten\.cat\b", module=r"attn$", shapes=r"^(\S+) \1$"),
    Rule("rope", op=r"^aten\.(mul|neg|add)\b", module=r"attn$"),
    Rule("gather", op=r"^aten\.(embedding|index|gather|index_select|slice_scatter|scatter)"),
    Rule("sampling", op=r"^aten\.(argmax|topk|multinomial|sort|_?softmax)", module=r"^$"),
    Rule("reduce", op=r"^aten\.(sum|mean|max|min|amax|amin|any|all|cumsum|prod|var|_?softmax|argmax|norm)\b"),
    Rule("copy", op=r"^aten\.(item|_local_scalar_dense|is_nonzero|equal)\b"),
    Rule(
        "copy",
        op=r"^aten\.(cat|stack|clone|copy_|contiguous|reshape|flatten|repeat|expand|pad|constant_pad_nd|roll)\b",
    ),
    Rule("copy", name=r"^memcpy"),
    Rule("elementwise", op=r"^aten\."),
    # No operator is known: the name is all there is. A wrong kind is worse than none.
    Rule("communication", name=r"^(?i:nccl|rccl)|nccl(Dev)?Kernel|cross_device_reduce|AllReduce|all_reduce_kernel"),
    # What a norm or an attention could do besides stands in its template's arguments, mostly as "no".
    Rule("norm", name=r"(?i)(layer|rms|group)_?norm"),
    Rule("copy", name=r"reshape_and_cache|concat_and_cache|store_kv|kv_?cache_(copy|store|write)"),
    Rule("quantize", name=r"(?i)quantize_with|(^|::|_)((dynamic|static|per_token|per_channel|scaled|nvfp4)_)+\w*quant"),
    Rule("attention", name=r"(?i)flash_?(fwd|bwd|att|dec)|fmha|attention|sdpa|flash::|(prefill|decode)with\w*kv"),
    Rule("attention", name=r"(?i)mla_\w*kernel"),
    Rule("copy", name=r"(?i)(re|pre)pack"),
    Rule("gemm", name=r"(?i)marlin|machete|gptq|awq_gemm|exl2|mul_mat_[qv]|gemm_(half|forward)_q"),
    Rule("dequantize", name=r"(?i)dequant"),
    Rule("gemv", name=r"(?i)gemv|dot_kernel"),
    Rule("gemm", name=r"(?i)(?<!fb)gemm(?!_gpu)|nvjet|cutlass|cublas|splitk|matmul|ampere_.*_tn|xmma"),
    Rule("gemm", name=r"^Cijk_|^bmm_|^_?(fused_)?moe_kernel"),
    Rule("quantize", name=r"(?i)(?<!de)quanti[sz]e|kInt8VectorQuant|_quant_kernel|quant_fp8|to_mx"),
    Rule("rope", name=r"(?i)rotary|(^|[_:])rope"),
    Rule("sampling", name=r"(?i)argmax|top_?[kp]|(^|[_:])sampl(e|ing)(?!d)|multinomial"),
    # PyTorch's copies that change no dtype say so ("nocast"); casts load or store with one, or lack that word.
    Rule("copy", name=r"nocast.*direct_copy_kernel|CatArray|copy_kernel_cuda(?!.*(BFloat16|Half|float))|copy_device"),
    Rule("cast", name=r"(bfloat16|float16|float8)_copy_kernel|(Load|Store)WithCast|direct_copy_kernel"),
    Rule("gather", name=r"index|gather|scatter|embedding|permute_[12]D"),
    Rule("reduce", name=r"(?i)reduce|softmax|cumsum|scan|^triton_(red|per)_"),
    Rule("elementwise", name=r"elementwise|fill|arange|upsample|^triton_|(silu|gelu|swiglu|act)_and_mul"),
)


@cache
def _holds(pattern: str, text: str) -> bool:
    # Kernels are many, operators, modules and shapes few.
    return re.search(pattern, text) is not None


@cache
def kind_of(op: str, module: str, shapes: str, name: str) -> str:
    """Return the kind of a kernel called *name* that *op* launched in *module* with arguments of *shapes*."""
    for rule in RULES:
        parts = ((rule.op, op), (rule.module, module), (rule.shapes, shapes), (rule.name, name))
        if all(not pattern or _holds(pattern, text) for pattern, text in parts):
            return rule.kind
    return "other"


def kinds(kernels: pd.DataFrame) -> Any:
    """Return the kind (a categorical) of each of *kernels* (op, module, shapes, name)."""
    columns = [kernels[c].astype("category").cat for c in ("op", "module", "shapes", "name")]
    key = np.zeros(len(kernels), np.int64)
    for column in columns:
        key *= len(column.categories)
        key += column.codes.to_numpy()
    # Thousands of kernels are of a few hundred combinations.
    _, first, again = np.unique(key, return_index=True, return_inverse=True)
    texts = [column.categories.to_numpy(object)[column.codes.to_numpy()[first]] for column in columns]
    found = []
    for row in zip(*texts, strict=True):
        op, module, shapes, name = map(str, row)
        found.append(KINDS.index(kind_of("" if op == UNIDENTIFIED else op, module, shapes, name)))
    return pd.Categorical.from_codes(np.array(found, np.int8)[again], categories=pd.Index(KINDS))
