"""Which precisions a device can run, and how many bytes they take."""

from __future__ import annotations

import pytest
import torch

from llmkern.errors import DeviceError, OutOfMemoryError
from llmkern.runfolder.vocabulary import PRECISIONS
from llmkern.workload.load import Source, load_model, stored_bytes
from llmkern.workload.models import build_config, find_model
from llmkern.workload.precision import (
    Workload,
    check_memory,
    check_precision,
    count_parameters,
    required_bytes,
    weight_bytes,
)
from llmkern.workload.weights import RandomWeights

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "double_quant"), [*((p, False) for p in PRECISIONS), ("int4", True)])
def test_the_estimate_of_weight_bytes_is_what_is_stored(precision: str, double_quant: bool) -> None:
    spec = find_model("qwen-tiny")
    loaded = load_model(spec, Source("random"), precision, CPU, RandomWeights(double_quant=double_quant))
    linear, other = count_parameters(build_config(spec))
    assert stored_bytes(loaded.model) == pytest.approx(weight_bytes(linear, other, precision, double_quant), rel=0.01)


@pytest.mark.parametrize(("precision", "capability", "least"), [("bf16", (7, 5), "8.0"), ("int8", (7, 0), "7.5")])
def test_a_gpu_that_is_too_old_is_named_with_what_it_would_need(
    precision: str, capability: tuple[int, int], least: str
) -> None:
    with pytest.raises(DeviceError, match=rf"needs compute capability {least}.*choose"):
        check_precision(precision, capability, True)
    check_precision(precision, (9, 0), True)
    check_precision(precision, None, True)


def test_missing_bitsandbytes_is_a_sentence() -> None:
    with pytest.raises(DeviceError, match=r"int4 needs bitsandbytes.*pip install"):
        check_precision("int4", (9, 0), False)
    check_precision("bf16", (9, 0), False)


def test_memory_is_refused_with_what_is_needed_and_what_is_there() -> None:
    needed = required_bytes(build_config(find_model("llama-70b")), Workload("bf16", 1, 512, 32))
    assert 130 < needed / 2**30 < 140
    with pytest.raises(OutOfMemoryError, match=r"needs about 13\d\.\d GiB, H100 has 79\.0 GiB free of 80\.0 GiB"):
        check_memory(needed, 79 * 2**30, 80 * 2**30, "H100")
    check_memory(needed, 2 * needed, 2 * needed, "H100")


def test_the_cache_grows_with_batch_and_tokens() -> None:
    config = build_config(find_model("qwen-7b"))
    one = required_bytes(config, Workload("bf16", 1, 1000, 24))
    more = required_bytes(config, Workload("bf16", 4, 1000, 24))
    # 2 x 28 layers x 4 heads x 128 x 1024 tokens x 2 bytes a sequence
    assert more - one >= 3 * 2 * 28 * 4 * 128 * 1024 * 2
