"""Kernels per token step: llmkern's recorder against torch.profiler, name by name, for the same step.

python -m bench.completeness --model qwen-7b
"""

from __future__ import annotations

import argparse
import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache

from bench.result import case, metric, write
from bench.workload import loaded_at
from llmkern.record.device.choose import choose_device
from llmkern.record.device.interface import Device
from llmkern.record.generation import cache_argument
from llmkern.runfolder.facts import RecorderFacts

Step = Callable[[], None]
PROMPT_TOKENS = 64


def count_ours(device: Device, step: Step) -> tuple[Counter[str], RecorderFacts]:
    """Return how often each kernel or copy ran in one *step* by our recorder, and the recorder's facts."""
    with device.recorder() as recorder:
        recorder.start()
        step()
        device.synchronize()
        recorder.discard()
        step()
        device.synchronize()
        recorder.stop()
        rows, facts = recorder.drain()["kernels"], recorder.facts()
    kinds, names = rows["kind"].to_pylist(), rows["name"].to_pylist()
    # The two tools word copies and memsets differently: their kind is enough to compare.
    counted = Counter(n if k == "kernel" else k for k, n in zip(kinds, names, strict=True))
    return counted, facts


def count_profiler(device: Device, step: Step) -> Counter[str]:
    """Return the same by torch.profiler."""
    step()
    device.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        device.synchronize()
    counted: Counter[str] = Counter()
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            name = event.name()
            kind = "memcpy" if name.startswith("Memcpy") else "memset" if name.startswith("Memset") else name
            counted[kind] += 1
    return counted


def prompt_ids(device: Device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, 1000, (1, PROMPT_TOKENS), generator=generator).to(device.torch_device)


def decode_step(model: Any, device: Device) -> Step:
    """Return one decode forward of *model* over a filled cache, eager."""
    ids = prompt_ids(device)
    last = ids[:, -1:].clone()

    def step() -> None:
        # The token of the step before, if there was one.
        if cache.get_seq_length() > PROMPT_TOKENS:
            cache.crop(-1)
        with torch.inference_mode():
            model(input_ids=last, **{cache_argument(model): cache}, use_cache=True)

    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, **{cache_argument(model): cache}, use_cache=True)
    return step


def graph_step(model: Any, device: Device) -> Step:
    """Return one decode forward of *model* captured in a CUDA graph over a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + 8)
    ids = prompt_ids(device)
    token = ids[:, -1:].clone()
    position = torch.tensor([[PROMPT_TOKENS]], device=device.torch_device)

    def forward() -> None:
        model(input_ids=token, **{cache_argument(model): cache}, position_ids=position, use_cache=True)

    with torch.inference_mode():
        model(input_ids=ids, **{cache_argument(model): cache}, use_cache=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
    return graph.replay


def compared(name: str, ours: Counter[str], lost: int, theirs: Counter[str]) -> dict[str, Any]:
    """Return the case that compares both tools' counts, printed as well."""
    missing, extra = theirs - ours, ours - theirs
    passed = ours == theirs and lost == 0
    note = "" if passed else f"only torch.profiler: {dict(missing)}; only llmkern: {dict(extra)}"
    print(
        f"{name:12s} llmkern {ours.total():6d}  torch.profiler {theirs.total():6d}  dropped {lost}  {note[:400]}",
        flush=True,
    )
    metrics = {
        "llmkern": metric(ours.total(), "1"),
        "torch_profiler": metric(theirs.total(), "1"),
        "distinct_names": metric(len(ours), "1"),
        "dropped_records": metric(lost, "1"),
    }
    return case(name, {"prompt_tokens": PROMPT_TOKENS, "batch": 1}, metrics, passed, note)


def each_step(model: str, device: Device, count: Callable[[Device, Step], Any]) -> dict[str, Any]:
    """Return what *count* finds in one token step of *model* at each precision, and in a CUDA graph of it."""
    found = {}
    for precision in ("bf16", "int8", "int4"):
        loaded = loaded_at(model, precision, device)
        found[precision] = count(device, decode_step(loaded.model, device))
        if precision == "bf16":
            found["bf16 graph"] = count(device, graph_step(loaded.model, device))
        del loaded
        gc.collect()
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    device = choose_device("cuda")
    # torch.profiler keeps CUPTI once it has it, so ours counts everything first; seeds make the steps the same.
    ours = each_step(arguments.model, device, count_ours)
    theirs = each_step(arguments.model, device, count_profiler)
    cases = [compared(name, counted, facts.lost, theirs[name]) for name, (counted, facts) in ours.items()]
    print(write("completeness", cases, arguments.results))


if __name__ == "__main__":
    main()
