"""The kind of a kernel: by what launched it, by its name only where that is not known."""

from __future__ import annotations

import pandas as pd
import pytest

from llmkern.attribute.time.kinds import KINDS, RULES, kind_of, kinds
from llmkern.attribute.time.operators import UNIDENTIFIED

LINEAR, INT8, QUANT = "aten.linear.default", "bitsandbytes.int8_mixed_scaled_mm.default", "int8_vectorwise_quant"
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<8, at::native::MulFunctor<float>>(int)"


@pytest.mark.parametrize(
    ("op", "module", "shapes", "name", "kind"),
    [
        (LINEAR, "model.layers.*.mlp.up_proj", "1x1x3584 18944x3584", "nvjet_sm90_tst_256x8", "gemv"),
        (LINEAR, "model.layers.*.mlp.up_proj", "1x512x3584 18944x3584", "nvjet_sm90_tst_192x128", "gemm"),
        (LINEAR, "lm_head", "1x1x3584 152064x3584", "void cublasLt::splitKreduce_kernel<32>", "gemv"),
        (LINEAR, "lm_head", "16x1x3584 152064x3584", "nvjet_sm90_tst_64x8", "gemm"),
        (INT8, "q_proj", "1x3584 1x3584", "void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8>", "gemv"),
        (INT8, "q_proj", "512x3584 512x3584", "void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8>", "gemm"),
        (INT8, "q_proj", "1x3584 1x3584", "void kdequant_mm_int32_fp16<4, 512>", "dequantize"),
        (INT8, "q_proj", "1x3584 1x3584", "void at::native::index_elementwise_kernel<128>", "outlier"),
        (INT8, "q_proj", "1x3584 1x3584", "memcpy DtoD (device)", "outlier"),
        (f"bitsandbytes.{QUANT}.default", "q_proj", "1x3584", "void kInt8VectorQuant<__half>", "quantize"),
        (f"bitsandbytes.{QUANT}.default", "q_proj", "1x3584", "at::native::reduce_kernel<or_kernel>", "outlier"),
        (
            INT8,
            "q_proj",
            "1x3584 1x3584",
            "void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>",
            "cast",
        ),
        (INT8, "q_proj", "1x3584 1x3584", "void at::native::elementwise_kernel<CUDAFunctor_add<float>>", "elementwise"),
        ("bitsandbytes.gemm_4bit.default", "q_proj", "1x1x3584 6422528x1", "void gemm_4bit_simt<bf16>", "gemv"),
        ("bitsandbytes.gemm_4bit.default", "q_proj", "16x1x3584 6422528x1", "void gemm_4bit_sm80_m16n8k16", "gemm"),
        ("bitsandbytes.gemm_4bit.default", "q_proj", "1x512x3584", "void kDequantizeBlockwise<bf16>", "dequantize"),
        ("bitsandbytes.gemm_4bit.default", "q_proj", "1x512x3584", "nvjet_sm90_tst_112x128", "gemm"),
        ("aten.scaled_dot_product_attention.default", "self_attn", "1x28x1x128", "memset", "memset"),
        ("aten.scaled_dot_product_attention.default", "self_attn", "", "cudnn_generated_fort_native_sdpa", "attention"),
        ("aten.to.dtype", "model.layers.*.input_layernorm", "1x1x3584", ELEMENTWISE, "cast"),
        ("aten.to.device", "", "1", "memcpy HtoD (pageable)", "copy"),
        ("aten.mean.dim", "model.layers.*.input_layernorm", "1x1x3584", "reduce_kernel", "norm"),
        ("aten.matmul.default", "model.rotary_emb", "1x64x1 1x1x1", "cutlass sgemm", "rope"),
        ("aten.cat.default", "model.layers.*.self_attn", "1x28x1x64 1x28x1x64", "CatArrayBatchedCopy", "rope"),
        ("aten.cat.default", "model.layers.*.self_attn", "1x4x512x128 1x4x1x128", "CatArrayBatchedCopy", "copy"),
        ("aten.mul.Tensor", "model.layers.*.mlp", "1x1x18944 1x1x18944", ELEMENTWISE, "elementwise"),
        ("aten.argmax.default", "", "1x152064", "reduce_kernel", "sampling"),
        ("aten.embedding.default", "model.embed_tokens", "152064x3584 1x1", "indexSelectSmallIndex", "gather"),
        ("", "", "", "triton_red_fused_mean_0", "reduce"),
        ("", "", "", "triton_poi_fused_mul_1", "elementwise"),
        ("", "", "", "void flash::flash_fwd_kernel<>", "attention"),
        ("", "", "", "ampere_fp16_s16816gemm_fp16_128x64_tn", "gemm"),
        ("", "", "", "my_own_thing", "other"),
    ],
)
def test_each_kernel_has_its_kind(op: str, module: str, shapes: str, name: str, kind: str) -> None:
    assert kind_of(op, module, shapes, name) == kind


def test_rules_name_no_kind_of_their_own() -> None:
    assert {rule.kind for rule in RULES} <= set(KINDS)


def test_a_frame_is_answered_row_by_row() -> None:
    rows = [(LINEAR, "m", "1x1x8 8x8", "nvjet"), (UNIDENTIFIED, "", "", "memset"), (LINEAR, "m", "1x1x8 8x8", "nvjet")]
    frame = pd.DataFrame(rows, columns=["op", "module", "shapes", "name"])
    assert list(kinds(frame)) == ["gemv", "memset", "gemv"]
    assert len(kinds(frame.iloc[:0])) == 0


@pytest.mark.parametrize(
    ("op", "kind"),
    [("bitsandbytes.int8_mixed_scaled_mm.default", "gemv"), (f"bitsandbytes.{QUANT}.default", "quantize")],
)
def test_on_the_cpu_an_operator_is_what_it_is_for(op: str, kind: str) -> None:
    assert kind_of(op, "model.layers.*.mlp.up_proj", "1x1x8 8x8", op) == kind
