"""The process of one candidate: ``python -m llmkern.evaluate.worker JOB.json ROWS.jsonl``.

Every step is told before it begins and every row written when it is whole, so that the evaluator knows how far a
process came that crashed, hung or ran out of memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch

from llmkern.errors import LlmkernError
from llmkern.evaluate import candidate as candidates
from llmkern.evaluate import inputs
from llmkern.evaluate.correctness import CandidateError, check
from llmkern.evaluate.energy import Scale, scale_of
from llmkern.evaluate.job import ROOF, UNCHANGED, Case, Check, Job, ModelRow, Row, job_from, to_json
from llmkern.evaluate.roof import roof_of
from llmkern.evaluate.timing import Turns, copies_for, measure
from llmkern.record.device.choose import choose_device
from llmkern.record.device.interface import Device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Tell = Callable[[dict[str, Any]], None]


class Evaluator:
    """One candidate on one device."""

    def __init__(self, job: Job, device: Device, tell: Tell) -> None:
        self.job, self.device, self._tell = job, device, tell
        self.dtype = DTYPES[job.dtype]
        self.candidate = candidates.load(job.spec)

    def run(self, case: Case, scale: Scale | None) -> Row:
        """Return all that is known of the candidate in *case*; what it does wrong is in the row."""
        row = Row(self.job.candidate, case)
        try:
            self._fill(row, case, scale)
        except CandidateError as error:
            row.error = f"{error}."
        except LlmkernError as error:
            row.error = str(error)
        except torch.cuda.OutOfMemoryError:
            row.error = "there was not enough memory on the GPU: try a smaller shape."
        except Exception as error:
            row.error = f"it failed with {type(error).__name__}: {_first_line(error)}"
            if "CUDA error" in str(error) or "cudaError" in str(error):
                # The context is gone with it; the next case needs a new process.
                self._tell({"row": to_json(row)})
                raise SystemExit(3) from error
        return row

    def _fill(self, row: Row, case: Case, scale: Scale | None) -> None:
        if case.format not in self.candidate.formats:
            row.error = f"it takes {' and '.join(self.candidate.formats)}, not {case.format}."
            return
        if self.job.dtype not in self.candidate.dtypes:
            row.error = f"it takes {' and '.join(self.candidate.dtypes)}, not {self.job.dtype}."
            return
        torch_device = self.device.torch_device
        timed = torch_device.type == "cuda" and not self.job.interpret
        for given in inputs.variants(case, self.job.group, self.dtype, self.job.seed, torch_device):
            self._tell({"step": "correctness", "case": to_json(case), "with": given.name})
            try:
                row.checks.append(check(self.candidate, given))
            except (CandidateError, AssertionError, ValueError, RuntimeError, TypeError) as error:
                # A candidate may have no tails; everything else it must take.
                if given.name != "odd tail" or "CUDA error" in str(error):
                    raise
                row.checks.append(inputs_refused(given.name))
        if not timed:
            return
        random = torch.Generator(device=torch_device).manual_seed(self.job.seed + 1)
        weight = inputs.random_weight(case, self.job.group, self.dtype, random)
        row.stored_bytes, row.code_bytes = weight.stored_bytes, weight.code_bytes
        if self.candidate.bytes_per_weight is not None:
            row.stored_bytes = row.code_bytes = self.candidate.bytes_per_weight * case.n * case.k
        x = inputs.activations(case, self.dtype, random)
        self._tell({"step": "latency", "case": to_json(case)})
        l2 = self.device.facts().l2_bytes or 50 * 2**20
        prepared = [self.candidate.prepare(weight.moved(torch.clone)) for _ in range(copies_for(row.stored_bytes, l2))]
        turns = Turns(lambda index: self.candidate.call(x, prepared[index], None), len(prepared))
        with torch.inference_mode():
            row.latency = measure(self.device, turns, self.candidate.spilled_bytes)
            self._tell({"step": "check after timing", "case": to_json(case)})
            row.after = check(self.candidate, inputs.Inputs("after timing", weight, x, None), prepared[-1])
            if scale is not None and self.job.energy:
                self._tell({"step": "energy", "case": to_json(case)})
                us = row.latency.cold_us[len(row.latency.cold_us) // 2]
                spans = scale.weigh(turns, us)
                scale.rest()
                row.energy = scale.joules(spans, us, row.stored_bytes)


def inputs_refused(name: str) -> Check:
    """Return the check of inputs that the candidate does not take."""
    return Check(name, None, None, 0, 0, 0)


def _in_model(job: Job, device: Device, scale: Scale | None) -> ModelRow:
    from llmkern.evaluate.in_model import Place, decode_with

    assert job.in_model is not None
    case = job.cases[0]
    place = Place(job.in_model, case.format, job.group, case.m)
    own = None if job.spec == UNCHANGED else candidates.load(job.spec)
    return decode_with(device, scale, place, job.candidate, own)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]


def main(job_file: str, rows_file: str) -> int:
    """Work off the job in *job_file*; lines of JSON go to *rows_file*."""
    job = job_from(Path(job_file).read_bytes())
    with open(rows_file, "ab", buffering=0) as rows:

        def tell(line: dict[str, Any]) -> None:
            rows.write(msgspec.json.encode(line) + b"\n")

        try:
            tell({"step": "load"})
            device = choose_device("cpu" if job.interpret else "auto")
            if job.spec == ROOF:
                with scale_of(device) if job.energy else nullcontext() as scale:
                    tell({"roof": to_json(roof_of(device, scale))})
                tell({"done": True})
                return 0
            if job.in_model is not None:
                weighs = job.energy and device.torch_device.type == "cuda"
                with scale_of(device) if weighs else nullcontext() as scale:
                    tell({"step": "decode of the model"})
                    tell({"model": to_json(_in_model(job, device, scale))})
                tell({"done": True})
                return 0
            evaluator = Evaluator(job, device, tell)
        except LlmkernError as error:
            tell({"failed": str(error)})
            return error.exit_code
        weighs = job.energy and device.torch_device.type == "cuda"
        with scale_of(device) if weighs else nullcontext() as scale:
            for case in job.cases:
                tell({"row": to_json(evaluator.run(case, scale))})
        tell({"done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
