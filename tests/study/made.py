"""Runs of a study with known joules per token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llmkern.runfolder import RunFolder
from llmkern.runfolder.document import encode
from tests.synthetic import Truth, synthetic_run


@dataclass(frozen=True)
class Asked:
    """What a run was asked for; *lengths* and *answers* are tokens of each row."""

    model: str = "qwen-tiny"
    precision: str = "bf16"
    lengths: tuple[int, ...] = (100,)
    answers: tuple[int, ...] = ()
    prompts: str | None = None
    uuid: str = "GPU-1"


def made_run(folder: Path, asked: Asked, **truth: float | int | bool) -> RunFolder:
    """Write a complete, weighed run and return it."""
    run, known = synthetic_run(folder, Truth(**{"rounds": 6, "jitter": 0.01, **truth}))  # type: ignore[arg-type]
    facts = run.facts
    assert facts.prompts is not None
    assert facts.model is not None
    batch, longest = len(asked.lengths), max(asked.lengths)
    facts = replace(
        facts,
        options=replace(
            facts.options, model=asked.model, precision=asked.precision, batch=batch, prompts=asked.prompts
        ),
        model=replace(facts.model, name=asked.model),
        device=replace(facts.device, uuid=asked.uuid),
        prompts=replace(
            facts.prompts,
            batch=batch,
            tokens=longest,
            effective_tokens=asked.lengths,
            computed_tokens=batch * longest,
            output_tokens=tuple(min(n, known.new_tokens) for n in asked.answers),
        ),
    )
    (run.path / "run.json").write_bytes(encode(facts))
    return RunFolder(run.path)
