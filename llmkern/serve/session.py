"""One run of a server from options to a finished run folder."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmkern.errors import DeviceError, UsageError
from llmkern.progress import Stages
from llmkern.record import signals
from llmkern.record.options import TraceOptions
from llmkern.record.passes.timeline import flushed
from llmkern.record.passes.weigh import idle
from llmkern.record.rig import Rig
from llmkern.runfolder import RunWriter
from llmkern.runfolder.vocabulary import SERVE, TIME, WINDOW
from llmkern.serve.arrivals import Schedule, schedule
from llmkern.serve.client import Limits, Sent, send_all, wait_for
from llmkern.serve.server import FAILED, FINISHED, UNANSWERED, Answers, Log, Room, Server, logged, prompt_of
from llmkern.session import assemble, finish, prepare, recording
from llmkern.study.plan import Lengths
from llmkern.study.prompts import drawn
from llmkern.workload.engine import attention

# Rests before and after, for the floor.
_REST_S, _RESTS = 1.2, 3
# While requests are served a tick a second: a read of the counter holds up launches for some 3 ms, and what iterations
# take between two ticks the driver's power samples say.
_TICK_S = 1.0
# What is warmed up with: every kernel, at a batch of some.
_WARMUP, _WARMUP_S = 4, 600.0


@dataclass(frozen=True)
class ServeOptions:
    """What is asked of a server: the model's *trace* options, *requests* of which lengths, and how they arrive."""

    trace: TraceOptions
    arrivals: str
    requests: int
    prompts: Lengths
    answers: Lengths
    max_in_flight: int | None = None
    max_batch_tokens: int | None = None
    max_requests_per_batch: int | None = None
    patience_s: float = 600.0
    # So many of them come once more, after the window, with every kernel recorded.
    record_requests: int = 0
    # All that two runs must have in common to be of the same requests to the same server.
    asked: str = ""


def planned(options: ServeOptions) -> Schedule:
    """Return the arrivals that *options* ask for; the same seed gives the same lengths to every pattern."""
    generator = random.Random(options.trace.seed)
    prompts = drawn(options.prompts, options.requests, generator)
    answers = drawn(options.answers, options.requests, generator)
    return schedule(options.arrivals, list(zip(prompts, answers, strict=True)), options.trace.seed)


def serve(options: ServeOptions, stages: Stages) -> Path:
    """Serve the requests in this process, record what they took, and return the run folder.

    Raises LlmkernError with a sentence for every cause that the user can do something about, a signal among them.
    """
    started_s = time.monotonic()
    made = planned(options)
    longest = max(arrival.prompt_tokens for arrival in made.arrivals)
    answer = max(arrival.output_tokens for arrival in made.arrivals)
    if options.trace.engine != "eager":
        raise UsageError(f"--engine {options.trace.engine} has no continuous batching: leave it out.")
    # What must fit before anything is loaded: the longest request.
    trace = replace(options.trace, prompt_tokens=longest, new_tokens=max(2, answer), batch=1, annotate_only=True)
    job = prepare(trace)
    if options.record_requests:
        try:
            job.device.check_unprofiled()
        except DeviceError as error:
            raise DeviceError(
                "a profiler watches this process: add --record-requests 0, so that it alone records kernels."
            ) from error
    writer = RunWriter(job.target, job.facts(), force=trace.force)
    with recording(writer, job.out_of_memory()), attention(cudnn=trace.cudnn_attention):
        rig = assemble(job, writer, stages)
        labels = {"arrivals": made.pattern, "requests": str(len(made.arrivals)), "server": "in process"}
        writer.note(labels=labels | {"asked": options.asked})
        record(rig, options, made)
        with signals.deferred():
            finish(writer, stages, elapsed_s=round(time.monotonic() - started_s, 3), clock=rig.clock.facts())
    return job.target


def record(rig: Rig, options: ServeOptions, made: Schedule) -> None:
    """Start the server in this process, warm it up, and let the requests arrive under the sensors."""
    vocabulary = int(rig.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    prompts = [
        prompt_of(number, arrival.prompt_tokens, vocabulary, options.trace.seed)
        for number, arrival in enumerate(made.arrivals)
    ]
    log = Log()
    lengths = tuple(arrival.prompt_tokens + arrival.output_tokens for arrival in made.arrivals)
    room = Room((*lengths, *[max(lengths)] * _WARMUP), options.max_batch_tokens, options.max_requests_per_batch)
    server = Server(rig.model, log, room)
    with rig.metered(), logged(log, rig.device.synchronize):
        server.start()
        try:
            with rig.stages.stage("Warming up"):
                _warm_up(server, prompts[0], made)
            work = Arriving(made, prompts, server, log, Limits(options.max_in_flight, options.patience_s))
            arrive(rig, work)
            # One that has stopped answers no more; what it did is recorded.
            if options.record_requests and server.alive:
                with rig.stages.stage("Recording kernels"):
                    record_some(rig, work, min(options.record_requests, len(prompts)))
        finally:
            server.stop()
    rig.writer.note(sensors={meter.name: meter.facts() for meter in rig.meters})


@dataclass(frozen=True)
class Arriving:
    """Requests of a schedule with their prompts, the server that they are sent to, and where it is noted."""

    made: Schedule
    prompts: list[Any]
    server: Answers
    log: Log
    limits: Limits


def arrive(rig: Rig, work: Arriving) -> None:
    """Let the requests arrive under the sensors, with rests before and after for the floor."""
    sent = Sent()
    with rig.pumped(SERVE, work.log.drain) as pump:
        _rest(rig)
        work.log.drain()
        try:
            with rig.stages.stage(f"Serving {len(work.prompts)} requests: {work.made.pattern}"):
                rig.pace(_TICK_S)
                rig.wait_for_ticks(1)
                with rig.annotator.range(f"serve {work.made.pattern}", WINDOW):
                    send_all(work.made, work.prompts, work.server, work.limits, pump.check, sent)
                    work.server.settle()
        finally:
            # Whatever ended it: what was answered is kept.
            rig.writer.append("requests", _rows(work, sent))
        _rest(rig)


def record_some(rig: Rig, work: Arriving, count: int) -> None:
    """Let the first *count* requests arrive once more, with every kernel recorded: what iterations consist of."""
    first = len(work.prompts) + _WARMUP
    with rig.device.recorder() as recorder:
        if recorder.of_one_thread:
            work.log.recorder = recorder
        else:
            recorder.start(host_calls=False)
        # The first launches under a new recorder are slow: run and forget them.
        answered = work.server.answered
        work.server.send(first, work.prompts[0], 2)
        wait_for(work.server, answered + 1, _WARMUP_S, signals.check)
        work.server.settle()
        rig.device.synchronize()
        recorder.discard()
        work.log.drain()
        with rig.pumped(TIME, lambda: flushed(recorder, TIME), work.log.drain) as pump:
            begin = Sent()
            again = replace(work.made, arrivals=work.made.arrivals[:count])
            work.server.finished.clear()
            work.server.failed.clear()
            send_all(again, work.prompts, work.server, work.limits, pump.check, begin, first + 1)
            work.server.settle()
            rig.device.synchronize()
            work.log.recorder = None
            if not recorder.of_one_thread:
                recorder.stop()
        rig.writer.note(recorders={**rig.writer.facts.recorders, TIME: recorder.facts()})


def _warm_up(server: Answers, prompt: Any, made: Schedule) -> None:
    """Answer a few requests like the first; their numbers lie beyond those of the schedule."""
    beyond = len(made.arrivals)
    for number in range(beyond, beyond + _WARMUP):
        server.send(number, prompt, min(8, made.arrivals[0].output_tokens + 1))
    wait_for(server, _WARMUP, _WARMUP_S, signals.check)
    if len(server.finished) < _WARMUP:
        reasons = next(iter(server.failed.values()), "it has stopped, or was silent for ten minutes")
        raise DeviceError(f"the server does not answer its first requests ({reasons[:300]}).")
    server.finished.clear()


def _rest(rig: Rig) -> None:
    for _ in range(_RESTS):
        idle(rig, _REST_S)


def _rows(work: Arriving, sent: Sent) -> dict[str, Any]:
    """Return the columns of table requests: every request that was to be sent until now, answered or not."""
    numbers, server, log = sorted(sent.intended_ns), work.server, work.log
    status = [FINISHED if n in server.finished else FAILED if n in server.failed else UNANSWERED for n in numbers]
    return {
        "request": numbers,
        "intended_ns": [sent.intended_ns[n] for n in numbers],
        "sent_ns": [sent.sent_ns.get(n) for n in numbers],
        "first_token_ns": [log.first_ns.get(n) for n in numbers],
        "last_token_ns": [log.last_ns.get(n) for n in numbers],
        "prompt_tokens": [log.prompt_tokens.get(n, work.made.arrivals[n].prompt_tokens) for n in numbers],
        "output_tokens": [server.finished.get(n, 0) for n in numbers],
        "status": status,
        "reason": [server.failed.get(n, "") for n in numbers],
    }
