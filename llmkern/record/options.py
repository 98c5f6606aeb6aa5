"""What one traced run is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmkern.runfolder.facts import OptionFacts, without_home


@dataclass(frozen=True)
class TraceOptions:
    """The options of ``llmkern trace``; see its help for each."""

    model: str
    precision: str = "bf16"
    device: str = "auto"
    engine: str = "eager"
    weights: str = "auto"
    batch: int = 1
    prompt_tokens: int | None = None
    new_tokens: int = 32
    prompts: Path | None = None
    warmup: int = 5
    repeats: int | None = None
    trace_repeats: int | None = None
    seed: int = 0
    outliers: int = 6
    double_quant: bool = False
    int8_threshold: float = 6.0
    cudnn_attention: bool = True
    quick: bool = False
    no_cache: bool = False
    annotate_only: bool = False
    weigh_only: bool = False
    # More prompts, whose prefills are weighed in batches beside those of the batch that is generated for.
    prefill_prompts: Path | None = None
    estimate_ram: bool = False
    unweighed_window_s: float | None = None
    out: Path | None = None
    force: bool = False

    def facts(self) -> OptionFacts:
        """Return the options as run.json keeps them; where the run was written is no part of it."""
        kept = {name: getattr(self, name) for name in OptionFacts.__dataclass_fields__}
        for name in ("prompts", "prefill_prompts"):
            kept[name] = None if kept[name] is None else without_home(str(kept[name]))
        return OptionFacts(**{**kept, "model": without_home(self.model)})

    @property
    def records_kernels(self) -> bool:
        """Return whether anything but latency and energy is recorded by llmkern itself."""
        return not (self.annotate_only or self.weigh_only)
