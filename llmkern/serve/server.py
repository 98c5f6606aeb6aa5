"""Transformers' continuous batching in this process, and what each iteration of its loop computed of which request."""

from __future__ import annotations

import functools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import nvtx

from llmkern.errors import DeviceError
from llmkern.record.device.interface import KernelRecorder
from llmkern.runfolder.vocabulary import DOMAIN

FINISHED, FAILED, UNANSWERED = "finished", "failed", "unanswered"
# Flash attention is not everywhere, PyTorch's is: this keeps newer releases from fetching the other.
_NO_SWITCH = "auto_switch_to_flash"
_COLLECT_S, _SETTLE_S = 0.1, 10.0
# Tokens of a block of Transformers' cache; on a CPU: requests at once, and tokens of an iteration, at the most.
_PAGE, _TOGETHER, _MOST_TOKENS = 256, 64, 4096


@dataclass
class Log:
    """What the server's loop did: iterations, tokens of each request in them; drained by the pump from its thread."""

    iterations: list[tuple[int, int, int]] = field(default_factory=list)
    processed: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    first_ns: dict[int, int] = field(default_factory=dict)
    last_ns: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    # Tokens of prompts as a server by URL counts them.
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    count: int = 0
    # One that sees but the thread that starts it, to be started by the server's own.
    recorder: KernelRecorder | None = None

    def drain(self) -> dict[str, Mapping[str, Any]]:
        """Return and forget the rows since the last call, as columns of tables iterations and processed."""
        with self.lock:
            iterations, self.iterations = self.iterations, []
            processed, self.processed = self.processed, []
        names = ("iteration", "start_ns", "end_ns")
        tokens = ("iteration", "request", "prefill_tokens", "decode_tokens", "new_tokens")
        return {
            table: dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
            for table, columns, rows in (("iterations", names, iterations), ("processed", tokens, processed))
            # While nobody asks there is nothing.
            if rows
        }

    def add(self, start_ns: int, end_ns: int, rows: list[tuple[int, int, int, int]]) -> None:
        """Take one iteration: of each request its number, prefill, decode and new tokens."""
        with self.lock:
            number, self.count = self.count, self.count + 1
            self.iterations.append((number, start_ns, end_ns))
            for request, prefill, decode, new in rows:
                self.processed.append((number, request, prefill, decode, new))
                if new:
                    self.first_ns.setdefault(request, end_ns)
                    self.last_ns[request] = end_ns
                    self.tokens[request] = self.tokens.get(request, 0) + new


@dataclass
class Scheduled:
    """The iteration that is being computed: when it began and which requests are in it."""

    start_ns: int = 0
    rows: list[tuple[Any, int, int]] = field(default_factory=list)


@contextmanager
def logged(log: Log, synchronize: Callable[[], None]) -> Iterator[None]:
    """Note every iteration of continuous batching in *log*, with an NVTX range around it, for the time.

    An iteration lasts from the moment at which its batch is put together to the one at which its tokens are there.
    """
    from transformers.generation.continuous_batching import continuous_api

    processor = continuous_api.ContinuousBatchProcessor
    scheduled = Scheduled()
    recording: list[KernelRecorder] = []
    domain = nvtx.get_domain(DOMAIN)
    prepare, update = processor.prepare_next_batch, processor.update_batch

    @functools.wraps(prepare)
    def prepared(self: Any) -> bool:
        begin_ns = time.time_ns()
        schedule = self.scheduler.schedule_batch

        def noted(*arguments: Any, **more: Any) -> Any:
            found = schedule(*arguments, **more)
            states = found[0] if isinstance(found, tuple) else found
            scheduled.rows = [_tokens(state) for state in states or ()]
            return found

        self.scheduler.schedule_batch = noted
        try:
            there: bool = prepare(self)
        finally:
            del self.scheduler.schedule_batch
        if there:
            scheduled.start_ns = begin_ns
            if log.recorder is not None:
                recording.append(log.recorder)
                log.recorder.start(host_calls=False)
            domain.push_range(domain.get_event_attributes(message=f"iteration {log.count}", category="iteration"))
        return there

    @functools.wraps(update)
    def updated(self: Any) -> None:
        before = [len(state.generated_tokens) for state, _, _ in scheduled.rows]
        try:
            update(self)
            synchronize()
        finally:
            if recording:
                recording.pop().stop()
            domain.pop_range()
        rows = []
        for (state, prefill, decode), had in zip(scheduled.rows, before, strict=True):
            name = str(state.request_id)
            if name.isdigit():
                rows.append((int(name), prefill, decode, len(state.generated_tokens) - had))
        log.add(scheduled.start_ns, time.time_ns(), rows)

    patched: Any = processor
    patched.prepare_next_batch, patched.update_batch = prepared, updated
    try:
        yield
    finally:
        patched.prepare_next_batch, patched.update_batch = prepare, update


def _tokens(scheduled: Any) -> tuple[Any, int, int]:
    """Return the state of a scheduled request and how many prefill and decode tokens are computed of it."""
    state = getattr(scheduled, "state", scheduled)
    count = len(state.tokens_to_process)
    decoding = len(state.generated_tokens) > 0
    return state, 0 if decoding else count, count if decoding else 0


class Answers(ABC):
    """How requests ended, and waiting for them: what every kind of server has."""

    def __init__(self) -> None:
        # Tokens of the answers, and reasons, by number.
        self.finished: dict[int, int] = {}
        self.failed: dict[int, str] = {}
        self._answered = threading.Condition()

    def note_finished(self, number: int, tokens: int) -> None:
        with self._answered:
            self.finished[number] = tokens
            self._answered.notify_all()

    def note_failed(self, number: int, reason: str) -> None:
        with self._answered:
            self.failed[number] = reason
            self._answered.notify_all()

    @property
    def answered(self) -> int:
        return len(self.finished) + len(self.failed)

    def wait(self, count: int, seconds: float) -> bool:
        """Wait until *count* requests were answered, *seconds* at most; return whether they were."""
        with self._answered:
            return self._answered.wait_for(lambda: self.answered >= count, seconds)

    def settle(self) -> None:  # noqa: B027
        """Return when what is known of finished requests is all that there is to know: mostly at once."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it can still answer."""

    @abstractmethod
    def send(self, number: int, prompt: Any, new_tokens: int) -> None:
        """Hand over request *number* without waiting for its answer."""


@dataclass(frozen=True)
class Room:
    """What a server is to have room for: *lengths* of all requests in tokens, and limits of an iteration."""

    lengths: tuple[int, ...]
    max_batch_tokens: int | None = None
    max_requests: int | None = None

    def config(self) -> dict[str, int]:
        """Return the limits as Transformers calls them."""
        asked = {"max_batch_tokens": self.max_batch_tokens, "max_requests_per_batch": self.max_requests}
        return {name: value for name, value in asked.items() if value is not None}

    def least(self) -> dict[str, int]:
        """Return a cache that holds as many of the longest requests as come together at the most."""
        together = sorted(self.lengths, reverse=True)[: self.max_requests or _TOGETHER]
        blocks = sum(-(-length // _PAGE) + 1 for length in together)
        return {"num_blocks": blocks, "max_batch_tokens": self.max_batch_tokens or min(_MOST_TOKENS, blocks * _PAGE)}


class Server(Answers):
    """The manager of continuous batching over *model*, without prefix sharing, one iteration after the other."""

    def __init__(self, model: Any, log: Log, room: Room) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        logging.getLogger("transformers").setLevel(logging.ERROR)
        super().__init__()
        self._log = log
        self._stopped = threading.Event()
        known = ContinuousBatchingConfig.__dataclass_fields__
        # Older releases of Transformers call the same attention so.
        model.set_attn_implementation("sdpa" if _NO_SWITCH in known else "paged|sdpa")
        config: dict[str, Any] = {"allow_block_sharing": False, "use_async_batching": False, "use_cuda_graph": False}
        config[_NO_SWITCH] = False
        config |= room.config()
        if model.device.type == "cpu":
            # It would take nine tenths of the memory of this machine.
            config |= room.least()
        batching = ContinuousBatchingConfig(**{key: value for key, value in config.items() if key in known})
        # No token ends an answer: it is as long as it was asked to be.
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=2)
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )

    def start(self) -> None:
        self._manager.start()
        self._collector = threading.Thread(target=self._collect, name="llmkern-answers", daemon=True)
        self._collector.start()

    def _collect(self) -> None:
        while not self._stopped.is_set():
            result = self._manager.get_result(timeout=_COLLECT_S)
            if result is not None:
                self._answer(result)

    def send(self, number: int, prompt: list[int], new_tokens: int) -> None:
        """Hand request *number* to the server; raises DeviceError where it takes no more."""
        taken = self._manager.add_request(prompt, request_id=str(number), max_new_tokens=new_tokens, eos_token_id=-1)
        if taken is None:
            raise DeviceError(f"the server took no request {number}: it has stopped; its log says why.")

    def _answer(self, result: Any) -> None:
        number = int(result.request_id)
        if result.error:
            self.note_failed(number, str(result.error))
        elif result.is_finished():
            self.note_finished(number, len(result.generated_tokens))

    def settle(self) -> None:
        """Wait for the iteration that finished the last request: its answers are there before it is noted."""
        until_s = time.monotonic() + _SETTLE_S
        while any(self._log.tokens.get(n, 0) < tokens for n, tokens in self.finished.items()):
            if time.monotonic() > until_s:
                return
            time.sleep(0.001)

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running())

    def stop(self) -> None:
        self._manager.stop(block=True, timeout=30)
        self._stopped.set()
        self._collector.join(10 * _COLLECT_S)


def prompt_of(number: int, tokens: int, vocabulary: int, seed: int) -> list[int]:
    """Return *tokens* token ids of request *number*, other ones for each: nothing of them is shared."""
    from llmkern.workload.prompts import builtin_prompts

    ids: list[int] = builtin_prompts(1, tokens, None, vocabulary, seed + 7919 * number).input_ids[0].tolist()
    return ids
