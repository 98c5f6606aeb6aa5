"""Whether the fused decoder is right: its logits, and bitsandbytes' own, against the dequantized model in fp32.

python -m bench.fused [--model qwen-7b] [--precisions int8 int4 bf16] [--tokens 256]: its greedy tokens are put through
the fp32 model in one pass; where that would have chosen another, the difference of the two logits is told in units of
the fused model's error of a logit.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.result import case, metric, write
from llmkern.kernels.modules import weight_of
from llmkern.workload.fused import FusedModel
from llmkern.workload.load import Source, load_model
from llmkern.workload.models import find_model

PROMPT_TOKENS, SEQUENCES, PADDED = 128, 3, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-7b")
    parser.add_argument("--precisions", nargs="*", default=["int8", "int4", "bf16"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    found = []
    for precision in arguments.precisions:
        found.append(compared(arguments.model, precision, arguments.tokens, torch.device(arguments.device)))
        print(found[-1]["name"], {k: v["value"] for k, v in found[-1]["metrics"].items()}, flush=True)
        write("fused", found, arguments.results)


def prompts(vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts of which all but the first are padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, vocabulary, (SEQUENCES, PROMPT_TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, :PADDED] = 0
    return ids.to(device), mask.to(device)


def logits_of(model: Any, ids: torch.Tensor, mask: torch.Tensor, first: int) -> torch.Tensor:
    """Return the logits [B, T - first, V] after places *first* and later, in fp32."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=places).last_hidden_state[:, first:]
        return model.lm_head(hidden).float()


def in_fp32(model: Any) -> Any:
    """Return *model* with every quantized weight dequantized, all in fp32."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            weight = weight_of(child)
            if weight is None:
                continue
            linear = nn.Linear(weight.k, weight.n, bias=child.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.dequantized(), requires_grad=False)
            if child.bias is not None:
                linear.bias = nn.Parameter(child.bias.detach().float(), requires_grad=False)
            setattr(parent, name, linear)
    return model.float()


def compared(model_name: str, precision: str, tokens: int, device: torch.device) -> dict[str, Any]:
    """Return how far the fused model and the model as it was loaded are from the same weights in fp32."""
    spec = find_model(model_name)

    def fresh() -> Any:
        return load_model(spec, Source("random"), precision, device).model

    fused = FusedModel(fresh(), PROMPT_TOKENS + tokens, SEQUENCES)
    ids, mask = prompts(fused.config.vocab_size, device)
    with torch.inference_mode():
        whole = fused.generate(ids, mask, tokens)
        fused.prefill(ids, mask)
        # The logits of a decode step: the second token's, with the cache of the prefill.
        ours = fused.logits().float()
        alone = FusedModel(fresh(), PROMPT_TOKENS + tokens, 1).generate(ids[1:2, PADDED:], mask[1:2, PADDED:], tokens)
    del fused
    gc.collect()
    torch.cuda.empty_cache()
    seen = torch.cat([mask, torch.ones_like(whole[:, PROMPT_TOKENS:])], 1)
    second = PROMPT_TOKENS + 1
    loaded = fresh()
    theirs = logits_of(loaded, whole[:, :second], seen[:, :second], PROMPT_TOKENS)[:, 0]
    exact = in_fp32(loaded)
    truth = logits_of(exact, whole, seen, PROMPT_TOKENS - 1)[:, :-1]
    chosen = whole[:, PROMPT_TOKENS:]
    # How far the fused model's own logits are from the truth, at the place where both saw the same tokens.
    error = (ours - truth[:, 1]).pow(2).mean().sqrt()
    margins = truth.amax(-1) - truth.gather(-1, chosen[..., None])[..., 0]
    other = margins > 0
    # Alone and padded differ by rounding; they part where two tokens are as good.
    apart = (chosen[1] != alone[0, -tokens:]).nonzero()
    first = int(apart[0]) if len(apart) else None
    tie = (
        0.0
        if first is None
        else float((truth[1, first, chosen[1, first]] - truth[1, first, alone[0, -tokens + first]]).abs())
    )
    metrics = {
        "error": metric(_distance(ours, truth[:, 1]), "1"),
        "error_as_loaded": metric(_distance(theirs, truth[:, 1]), "1"),
        "steps": metric(chosen.numel(), "1"),
        "other_token": metric(int(other.sum()), "1"),
        "largest_margin": metric(float((margins / error).max()), "errors of a logit"),
        "padded_parts_after": metric(tokens if first is None else first, "tokens"),
        "padded_parts_by": metric(tie / float(error), "errors of a logit"),
    }
    del loaded, exact, truth
    gc.collect()
    torch.cuda.empty_cache()
    ties = max(metrics[name]["value"] for name in ("largest_margin", "padded_parts_by"))
    right = ties < 6 and metrics["error"]["value"] <= metrics["error_as_loaded"]["value"]
    return case(f"{model_name} {precision}", {"tokens": tokens, "sequences": SEQUENCES}, metrics, right)


def _distance(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def table(document: dict[str, Any]) -> list[str]:
    """Return the lines of docs/decode.md."""
    rows = [
        "| model | error of logits, fused | as loaded | greedy steps | another token than fp32 | by at most | padded "
        "and alone part after | by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in document["cases"]:
        m = {name: entry["value"] for name, entry in found["metrics"].items()}
        rows.append(
            f"| {found['name']} | {m['error']:.4f} | {m['error_as_loaded']:.4f} | {m['steps']:.0f} | "
            f"{m['other_token']:.0f} | {m['largest_margin']:.1f} | {m['padded_parts_after']:.0f} tokens | "
            f"{m['padded_parts_by']:.1f} |"
        )
    return rows


if __name__ == "__main__":
    main()
