"""From the options of the command to a request, and to what came of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llmkern.errors import UsageError
from llmkern.evaluate import peers as peer_list
from llmkern.evaluate.candidate import split_spec
from llmkern.evaluate.evaluation import Contender, Evaluation, Request, evaluate
from llmkern.evaluate.job import Case
from llmkern.evaluate.shapes import LayerShape, parse_shapes
from llmkern.progress import Stages
from llmkern.workload.models import find_model

# What a kernel is tried on where there is no GPU: Triton's interpreter needs a second for this.
CUT_N, CUT_K, CUT_M = 256, 512, 8


def contenders_of(candidates: Iterable[str], formats: Iterable[str], peers: bool, interpret: bool) -> list[Contender]:
    """Return the user's candidates, then the peers. Raises UsageError for names given twice."""
    found = [Contender(*split_spec(text), own=True) for text in candidates]
    specs: list[str] = []
    if peers:
        for format in formats:
            specs += [spec for spec in peer_list.available(format) if spec not in specs]
    if interpret:
        # The CUDA kernels need a GPU; bitsandbytes' CPU path is no peer of a GPU kernel.
        specs = [spec for spec in specs if spec == "llmkern:triton"]
    found += [Contender(peer_list.name_of(spec), spec, own=False) for spec in specs]
    twice = [c.name for i, c in enumerate(found) if c.name in {other.name for other in found[:i]}]
    if twice:
        raise UsageError(f"two candidates are called {twice[0]!r}: tell them apart as NAME=CANDIDATE.")
    return found


def cases_of(shapes: Iterable[LayerShape], formats: Iterable[str], batches: Iterable[int], group: int) -> list[Case]:
    """Return every format, shape and number of tokens. Raises UsageError where an int4 group does not divide K."""
    shapes, batches = list(shapes), list(batches)
    found = []
    for format in formats:
        for shape in shapes:
            if format == "int4" and shape.k % group:
                raise UsageError(f"int4 in groups of {group} needs K to divide by it, {shape.label} has K = {shape.k}.")
            if format == "nf4" and shape.n * shape.k % group:
                raise UsageError(f"NF4 in blocks of {group} needs N x K to divide by it, {shape.label} does not.")
            found += [Case(format, shape.n, shape.k, m, shape.label) for m in batches]
    return found


def evaluated(
    candidates: tuple[str, ...],
    *,
    formats: tuple[str, ...],
    shapes: str,
    batch: tuple[int, ...],
    dtype: str | None,
    group: str,
    energy: bool,
    peers: bool,
    in_model: str | None,
    seed: int,
    timeout: float,
) -> Evaluation:
    """Return the evaluation of *candidates*; the other arguments are the command's options. Raises UsageError."""
    layers = parse_shapes(shapes)
    if in_model is not None:
        find_model(in_model)
        if len(formats) != 1:
            raise UsageError(f"--in-model needs one --format, not {','.join(formats)}: a model has its layers in one.")
    interpret = not torch.cuda.is_available()
    if interpret:
        layers = _distinct(LayerShape(min(s.n, CUT_N), min(s.k, CUT_K), s.label) for s in layers)
        batch = tuple(dict.fromkeys(min(m, CUT_M) for m in batch))
        if dtype == "bf16":
            raise UsageError(
                "--dtype bf16 needs a GPU: Triton's interpreter multiplies bf16 as integers; use fp16 here."
            )
    request = Request(
        contenders=tuple(contenders_of(candidates, formats, peers, interpret)),
        cases=tuple(cases_of(layers, formats, batch, int(group))),
        dtype=dtype or ("fp16" if interpret else "bf16"),
        group=int(group),
        energy=energy and not interpret,
        timeout_s=timeout,
        seed=seed,
        interpret=interpret,
        in_model=in_model,
    )
    if not request.contenders:
        raise UsageError("there is nothing to evaluate: name a candidate, or leave out --no-peers.")
    device = "CPU (no GPU)" if interpret else torch.cuda.get_device_name(0)
    stages = Stages(quiet=False)
    with stages.stage("Evaluating", len(request.contenders) + (not interpret)) as advance:
        return evaluate(request, device, lambda _name: advance())


def _distinct(shapes: Iterable[LayerShape]) -> list[LayerShape]:
    found: dict[tuple[int, int], LayerShape] = {}
    for shape in shapes:
        found.setdefault((shape.n, shape.k), shape)
    return list(found.values())
