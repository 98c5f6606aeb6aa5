"""One frame over many runs: per run and phase the joules and seconds per token, with and without padding."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmkern.attribute.energy.phases import PhaseWeight, Weighed, weigh_phases
from llmkern.errors import LlmkernError, UsageError
from llmkern.estimate import Estimate, from_samples
from llmkern.runfolder import RunFolder
from llmkern.runfolder.facts import RunFacts
from llmkern.runfolder.place import FACTS, PARTIAL
from llmkern.runfolder.vocabulary import DECODE, PRECISIONS, PREFILL

GENERATE = "generate"
PHASES = (PREFILL, DECODE, GENERATE)
# What a run is told apart by; runs that are alike in all of them but the draw are draws of one configuration.
AXES = ("model", "precision", "engine", "batch", "prompts", "prompt_tokens", "new_tokens")
# Estimates of a row: name, unit. Each has three columns, the last two with the ends of its 95 % interval.
MEASURES = {
    "latency": "s",
    "energy": "J",
    "power": "W",
    "energy_per_effective_input_token": "J",
    "energy_per_computed_input_token": "J",
    "energy_per_output_token": "J",
    "energy_per_computed_output_token": "J",
    "energy_per_request": "J",
    "output_tokens_per_joule": "",
    "energy_per_1000_output_tokens": "Wh",
    "latency_per_token": "s",
}
_WH = 1000.0 / 3600.0


@dataclass(frozen=True)
class Tokens:
    """Tokens of one batch: *effective* ones of prompts without padding and of answers as long as they are wanted.

    Computed ones are what the model computed: rows x the longest.
    """

    batch: int
    effective_input: int
    computed_input: int
    effective_output: int
    computed_output: int

    @property
    def padding(self) -> int:
        return self.computed_input - self.effective_input


@dataclass(frozen=True)
class Run:
    """One run of a study: what it was, and per phase its estimates by the names of MEASURES."""

    folder: Path
    axes: dict[str, Any]
    draw: int
    tokens: Tokens
    # Of the prompts whose prefill was weighed: those of the batch, or all of the prompt set.
    prefilled: Tokens
    measures: dict[str, dict[str, Estimate]]
    facts: RunFacts
    weighed: Weighed
    # Inter-token times in s: median, 90th and 99th percentile; empty where the host does not wait for a token.
    inter_token_s: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(self.axes.values())


@dataclass(frozen=True)
class Collection:
    """Runs that can be compared, and for the others why they are left out."""

    runs: list[Run]
    left_out: dict[str, str]

    def frame(self) -> pd.DataFrame:
        """Return a row per run and phase: axes, tokens, every measure with its interval, latencies."""
        return pd.DataFrame([row for run in self.runs for row in _rows(run)])

    def books(self) -> pd.DataFrame:
        """Return per run what the counter moved over its weighed windows, and the accounts that this is, in J."""
        rows = []
        for run in self.runs:
            known = run.weighed
            if known.counter_j is None:
                continue
            rows.append(
                {
                    "run": run.folder.name,
                    "counter_j": known.counter_j,
                    "windows_j": known.windows_j,
                    "idle_j": known.idle_j,
                    "residual_j": known.residual_j,
                    "effective_tokens": run.prefilled.effective_input,
                    "padding_tokens": run.prefilled.padding,
                    "computed_tokens": run.prefilled.computed_input,
                }
            )
        return pd.DataFrame(rows)


def find_runs(folders: list[Path]) -> list[Path]:
    """Return the run folders in *folders*: those themselves, and those of a study or any folder of runs.

    Raises UsageError for a folder that is not there or has none.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder: give run folders, or the folder of a study.")
        if (folder / FACTS).is_file():
            inside = [folder]
        else:
            inside = sorted(
                file.parent
                for pattern in (f"*/{FACTS}", f"runs/*/{FACTS}")
                for file in folder.glob(pattern)
                if PARTIAL not in file.parent.name
            )
        if not inside:
            raise UsageError(f"{folder} holds no run folder: give run folders, or the folder of a study.")
        found += [path for path in inside if path not in found]
    return found


def collect(folders: list[Path], opened: Callable[[Path], RunFolder] = RunFolder) -> Collection:
    """Return what the complete, weighed runs in *folders* say; raises UsageError where there is none."""
    runs, left_out = [], {}
    for path in find_runs(folders):
        try:
            runs.append(read_run(opened(path)))
        except LlmkernError as error:
            left_out[path.name] = str(error)
    runs.sort(key=_place)
    return Collection(runs, left_out)


def _place(run: Run) -> tuple[Any, ...]:
    """Return where *run* stands among others: models by their size, precisions as everywhere, numbers as numbers."""
    axes = run.axes
    size = run.facts.model.parameters if run.facts.model is not None else 0
    precision = PRECISIONS.index(axes["precision"]) if axes["precision"] in PRECISIONS else len(PRECISIONS)
    numbers = [axes[name] for name in ("prompt_tokens", "new_tokens", "batch")]
    return (size, axes["model"], axes["prompts"], axes["engine"], precision, *numbers, run.draw)


def read_run(run: RunFolder) -> Run:
    """Return one run; raises LlmkernError for one that is not complete or was not weighed."""
    path, facts = run.path, run.facts
    if not run.complete:
        raise UsageError(f"it is {run.status}, not complete.")
    if facts.imported is not None or facts.prompts is None:
        raise UsageError("it is a capture of another tool: nothing was weighed.")
    # Kernels, where there are any, say nothing here.
    if run.has("requests"):
        raise UsageError(f"it served requests: 'llmkern report {path}' tells of them.")
    weighed = weigh_phases(run, facts.device.counter, facts.device.counted)
    if weighed is None or not weighed.phases:
        told = " ".join(weighed.unknown.values()) if weighed is not None else "no window was weighed."
        raise UsageError(told)
    tokens = prefilled = tokens_of(facts)
    measures = {name: of_phase(name, weight, tokens, facts) for name, weight in weighed.phases.items()}
    if weighed.prompt_set is not None and facts.prompt_set is not None:
        prefilled = replace(
            tokens,
            batch=tokens.batch * facts.prompt_set.batches,
            effective_input=facts.prompt_set.effective_tokens,
            computed_input=facts.prompt_set.computed_tokens,
        )
        measures[PREFILL] = _of_prompt_set(weighed.prompt_set, prefilled, facts.prompt_set.batches, facts)
    if PREFILL in weighed.phases and DECODE in weighed.phases:
        whole = _generate(weighed, facts.options.new_tokens)
        measures[GENERATE] = of_phase(GENERATE, whole, tokens, facts)
    return Run(path, axes_of(facts), _draw(facts), tokens, prefilled, measures, facts, weighed, _inter_token_s(run))


def axes_of(facts: RunFacts) -> dict[str, Any]:
    """Return what the run *facts* is told apart by; prompts of a file by the file's name without its draw."""
    options = facts.options
    drawn = options.prompts is not None
    model = facts.model.name if facts.model is not None else options.model
    return {
        "model": model,
        "precision": options.precision,
        "engine": options.engine,
        "batch": facts.prompts.batch if facts.prompts is not None else options.batch,
        "prompts": Path(options.prompts or "").stem.partition(f"-b{options.batch}-d")[0],
        "prompt_tokens": 0 if drawn or facts.prompts is None else facts.prompts.tokens or 0,
        "new_tokens": 0 if drawn else options.new_tokens,
    }


def _draw(facts: RunFacts) -> int:
    if facts.options.prompts is None:
        return facts.options.seed
    found = re.search(r"-b\d+-d(\d+)", Path(facts.options.prompts).stem)
    return int(found[1]) if found else 0


def tokens_of(facts: RunFacts) -> Tokens:
    """Return the tokens of a batch of the run *facts*."""
    prompts, new_tokens = facts.prompts, facts.options.new_tokens
    assert prompts is not None
    computed = prompts.batch * new_tokens
    answers = sum(prompts.output_tokens) if prompts.output_tokens else computed
    return Tokens(prompts.batch, sum(prompts.effective_tokens), prompts.computed_tokens, answers, computed)


def _generate(weighed: Weighed, new_tokens: int) -> PhaseWeight:
    """Return a whole generation, round by round: prefill and what follows are measured in it together."""
    first, rest = weighed.phases[PREFILL], weighed.phases[DECODE]
    steps = new_tokens - 1

    def summed(a: list[float], b: list[float]) -> list[float]:
        return [x + steps * y for x, y in zip(a, b, strict=True)]

    latency_s = summed(first.latency_samples_s, rest.latency_samples_s)
    energy_j = summed(first.energy_samples_j, rest.energy_samples_j)
    known = [value for value in energy_j if value == value]
    joules = from_samples(known) if known else None
    seconds = from_samples(latency_s)
    return PhaseWeight(GENERATE, "batch", seconds, latency_s, joules, energy_j, seconds, joules)


def _of_prompt_set(weight: PhaseWeight, tokens: Tokens, batches: int, facts: RunFacts) -> dict[str, Estimate]:
    """Return the measures of all prefills of a prompt set together; their latency is that of one batch, in the mean."""
    joules = None if weight.energy_j is None else weight.energy_j.scaled(batches)
    whole = replace(weight, latency_s=weight.latency_s.scaled(batches), energy_j=joules)
    return {**of_phase(PREFILL, whole, tokens, facts), "latency": weight.latency_s}


def of_phase(name: str, weight: PhaseWeight, tokens: Tokens, facts: RunFacts) -> dict[str, Estimate]:
    """Return the measures of a phase of one batch: in *decode* of all its steps, of one only where the name says so."""
    steps = facts.options.new_tokens - 1 if name == DECODE else 1
    latency_s = weight.latency_s.scaled(steps)
    found = {"latency": latency_s}
    if name == DECODE:
        found["latency_per_token"] = weight.latency_s
    if weight.energy_j is None:
        return found
    energy_j = weight.energy_j.scaled(steps)
    found |= {"energy": energy_j, "power": energy_j.with_(latency_s, np.divide)}
    found["energy_per_request"] = energy_j.scaled(1 / tokens.batch)
    if name != DECODE:
        found["energy_per_effective_input_token"] = energy_j.scaled(1 / tokens.effective_input)
        found["energy_per_computed_input_token"] = energy_j.scaled(1 / tokens.computed_input)
    if name != PREFILL:
        # The first token of each answer comes out of the prefill.
        first = tokens.batch if name == DECODE else 0
        effective, computed = tokens.effective_output - first, tokens.computed_output - first
        found["energy_per_computed_output_token"] = energy_j.scaled(1 / computed)
        if effective > 0:
            each = energy_j.scaled(1 / effective)
            found["energy_per_output_token"] = each
            found["output_tokens_per_joule"] = each.map(lambda joules: 1 / joules)
            found["energy_per_1000_output_tokens"] = each.scaled(_WH)
    return found


def _inter_token_s(run: RunFolder) -> tuple[float, ...]:
    """Return the percentiles 50, 90 and 99 of the time from one token to the next, over all weighed generations.

    With the fused engine the host does not wait for tokens, and its ranges are not theirs.
    """
    if run.facts.options.engine == "fused":
        return ()
    ranges = run.table("ranges")
    found = ranges[(ranges["pass"] == "weigh") & (ranges["category"] == "token")]
    found = found[found["new_tokens"] == found["new_tokens"].max()].sort_values("start_ns")
    same = found["token"].diff() == 1
    between_s = found["end_ns"].diff()[same & (found["phase"] == DECODE)] / 1e9
    if len(between_s) < 2:
        return ()
    return tuple(float(q) for q in np.percentile(between_s, [50, 90, 99]))


def _rows(run: Run) -> list[dict[str, Any]]:
    shared: dict[str, Any] = {
        "run": run.folder.name,
        "draw": run.draw,
        "device": run.facts.device.name,
        "weights": run.facts.model.weights if run.facts.model is not None else "",
        "parameters": run.facts.model.parameters if run.facts.model is not None else 0,
    }
    prefill = run.measures.get(PREFILL, {}).get("latency")
    shared["time_to_first_token_s"] = None if prefill is None else prefill.value
    percentiles = run.inter_token_s or (None,) * 3
    shared |= {f"inter_token_p{q}_s": value for q, value in zip((50, 90, 99), percentiles, strict=True)}
    rows = []
    for phase in PHASES:
        if phase not in run.measures:
            continue
        tokens = run.prefilled if phase == PREFILL else run.tokens
        row = {
            **run.axes,
            "phase": phase,
            **shared,
            "requests": tokens.batch,
            "effective_input_tokens": tokens.effective_input,
            "padding_tokens": tokens.padding,
            "computed_input_tokens": tokens.computed_input,
            "effective_output_tokens": tokens.effective_output,
            "computed_output_tokens": tokens.computed_output,
        }
        for name, unit in MEASURES.items():
            estimate = run.measures[phase].get(name)
            column = f"{name}_{unit.lower()}" if unit else name
            for end in ("value", "low", "high"):
                key = column if end == "value" else f"{column}_{end}"
                row[key] = None if estimate is None else getattr(estimate, end)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Pooled:
    """Draws of one configuration together: joules of all of them over the tokens of all of them."""

    axes: dict[str, Any]
    runs: list[Run]

    def per(self, phase: str, measure: str) -> Estimate | None:
        """Return *measure* (by a token, a request) of *phase* over all draws; None where one does not know it.

        Sum of joules by sum of tokens: a batch of short prompts does not count as much as one of long ones.
        """
        if measure == "output_tokens_per_joule":
            joules = self.per(phase, "energy_per_output_token")
            return None if joules is None else joules.map(lambda each: 1 / each)
        parts = []
        for number, run in enumerate(self.runs):
            measures = run.measures.get(phase, {})
            each, whole = measures.get(measure), measures.get("energy")
            if each is None:
                return None
            per_token = measure.startswith("energy_per") and whole is not None
            count = whole.value / each.value if per_token and whole is not None else 1.0
            parts.append((each.of_another_run(number) if number else each, count))
        total = sum(count for _, count in parts)
        joined = parts[0][0].scaled(parts[0][1] / total)
        for each, count in parts[1:]:
            joined = joined + each.scaled(count / total)
        return joined


def pooled(runs: list[Run]) -> list[Pooled]:
    """Return the configurations of *runs* in their order, with all draws of each."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(run.key, []).append(run)
    return [Pooled(group[0].axes, group) for group in found.values()]
