"""Any OpenAI-compatible server by URL: requests are streamed, and what a server does wrong is told of its request."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llmkern.errors import DeviceError, UsageError
from llmkern.serve.server import Answers, Log

_CONNECT_S = 10.0
# A server says so of an address or of words that it does not know.
_UNKNOWN = (400, 404, 405, 422, 501)
# The same words in another order and after another number each time: nothing of a prompt is in a prefix cache.
_WORDS = (
    *("river", "turbine", "ledger", "winter", "copper", "signal", "harbour", "letter", "engine", "garden", "mirror"),
    *("silver", "market", "bridge", "window", "forest", "number", "salt", "glass", "stone", "paper", "field", "clock"),
)


@dataclass(frozen=True)
class Address:
    """Where a server is, which of its models is asked, and the key that it wants."""

    url: str
    model: str
    key: str = "none"


@dataclass(frozen=True)
class Counted:
    """Tokens of an answer, and of its prompt where the server told them (0: it did not)."""

    output: int
    prompt: int = 0


class Remote(Answers):
    """A server by URL that is asked by streaming, in a thread of its own."""

    def __init__(self, address: Address, patience_s: float, log: Log) -> None:
        super().__init__()
        openai = _library()
        self._address, self._log = address, log
        timeout = openai.Timeout(patience_s, connect=_CONNECT_S)
        self._loop = asyncio.new_event_loop()
        self._client = openai.AsyncOpenAI(base_url=address.url, api_key=address.key, max_retries=0, timeout=timeout)
        self._chat, self._full_length, self._counts = False, True, True
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmkern-client", daemon=True)

    def start(self) -> None:
        """Begin, and ask for the server's models; raises DeviceError or UsageError where it cannot be asked."""
        self._thread.start()
        try:
            names = [one.id for one in self._now(self._models())]
        except Exception as error:
            self.stop()
            raise _refused(error, self._address) from error
        if names and self._address.model not in names:
            self.stop()
            shown = ", ".join(names[:5])
            raise UsageError(f"{self._address.url} has no model {self._address.model!r}; it has: {shown}.")

    async def _models(self) -> list[Any]:
        return [one async for one in self._client.models.list()]

    def _now(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def try_out(self, prompt: str) -> None:
        """Ask once and wait, in the ways that servers know; raises DeviceError or UsageError where it knows none.

        Completions or chat, with the words that keep an answer from ending early or without them, and with those that
        make it count tokens or without them.
        """
        refusal: Exception | None = None
        ways = itertools.product((False, True), (True, False), (True, False))
        for self._chat, self._full_length, self._counts in ways:
            try:
                told = self._now(self._streamed(prompt, 4, lambda: None))
            except Exception as error:
                refusal = refusal or error
                if getattr(error, "status_code", None) in _UNKNOWN:
                    continue
                raise _refused(error, self._address) from error
            if told.output:
                return
            raise DeviceError(
                f"{self._address.url} answers without streaming: nothing can be said of the time to a token; use a "
                "server that streams (stream: true)."
            )
        assert refusal is not None
        raise _refused(refusal, self._address) from refusal

    def send(self, number: int, prompt: str, new_tokens: int) -> None:
        """Hand over request *number*; what comes of it is noted when it does."""
        asyncio.run_coroutine_threadsafe(self._ask(number, prompt, new_tokens), self._loop)

    async def _ask(self, number: int, prompt: str, new_tokens: int) -> None:
        def token() -> None:
            now_ns = time.time_ns()
            self._log.first_ns.setdefault(number, now_ns)
            self._log.last_ns[number] = now_ns

        try:
            told = await self._streamed(prompt, new_tokens, token)
            if not told.output:
                raise DeviceError("it answered without a token, or without streaming")
        except Exception as error:
            self.note_failed(number, f"{type(error).__name__}: {_line(error)}")
        else:
            if told.prompt:
                self._log.prompt_tokens[number] = told.prompt
            self.note_finished(number, told.output)

    async def _streamed(self, prompt: str, new_tokens: int, token: Callable[[], None]) -> Counted:
        """Return how many tokens came, as the server counts them or else in chunks; *token* is called at each chunk."""
        # What asks a server not to end an answer early is no part of the standard: most that serve models know it.
        more: dict[str, Any] = {"max_tokens": new_tokens, "temperature": 0.0, "stream": True}
        if self._full_length:
            more["extra_body"] = {"ignore_eos": True, "min_tokens": new_tokens}
        if self._counts:
            more["stream_options"] = {"include_usage": True}
        if self._chat:
            asked = self._client.chat.completions.create(
                model=self._address.model, messages=[{"role": "user", "content": prompt}], **more
            )
        else:
            asked = self._client.completions.create(model=self._address.model, prompt=prompt, **more)
        count, prompt_tokens, ended = 0, 0, False
        usage: Any = None
        async with await asked as stream:
            async for chunk in stream:
                usage = getattr(chunk, "usage", None) or usage
                for choice in getattr(chunk, "choices", None) or ():
                    text = getattr(getattr(choice, "delta", None), "content", None) or getattr(choice, "text", None)
                    if text:
                        count += 1
                        token()
                    ended = ended or bool(getattr(choice, "finish_reason", None))
        if count and not ended:
            raise DeviceError("the stream ended before the answer did")
        if count and usage is not None:
            # A chunk may hold several tokens, or a part of one.
            count = _whole(getattr(usage, "completion_tokens", None)) or count
            prompt_tokens = _whole(getattr(usage, "prompt_tokens", None))
        return Counted(count, prompt_tokens)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        # Answers that are still open end with their connections.
        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_CONNECT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CONNECT_S)
        self._loop.close()

    async def _close(self) -> None:
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UsageError("--url needs a package that is not here: pip install openai.") from error
    return openai


def _whole(value: object) -> int:
    return value if isinstance(value, int) and 0 < value < 2**40 else 0


def _line(error: BaseException) -> str:
    body = getattr(error, "body", None)
    if body:
        return str(body)[:300]
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]


def _refused(error: Exception, address: Address) -> UsageError | DeviceError:
    """Return why a server cannot be asked, in a sentence."""
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return UsageError(f"{address.url} refuses the key ({status}): set OPENAI_API_KEY to one that it knows.")
    if status == 404:
        return UsageError(
            f"{address.url} knows no such address or model ({_line(error)}): --url ends with /v1 as a rule, --model is "
            "a name that the server lists."
        )
    if status is not None:
        return DeviceError(f"{address.url} answers {status} ({_line(error)}): its log says why.")
    if isinstance(error, DeviceError | UsageError):
        return error
    return DeviceError(
        f"{address.url} cannot be reached ({type(error).__name__}: {_line(error)}): start the server, or check the "
        "address."
    )


def text_of(number: int, tokens: int, seed: int) -> str:
    """Return a prompt of about *tokens* tokens for request *number*: as many words, other ones for each."""
    generator = random.Random(seed * 1_000_003 + number)
    return " ".join([str(generator.randrange(10**6)), *generator.choices(_WORDS, k=max(1, tokens - 3))])
