"""A small OpenAI-compatible server that streams, and does wrong what real ones do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL, KEY = "tiny", "secret"


class Stub(ThreadingHTTPServer):
    """*fault* of request number n (from 0, the trial first): error, stall, close, empty; *token_s* between tokens."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, faults: dict[int, str], **how: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.token_s = faults, how.get("token_s", 0.002)
        self.key, self.streams, self.only_chat = how.get("key"), how.get("streams", True), how.get("only_chat", False)
        # Tokens of a chunk, and whether it counts them when asked: "yes", "no" (it leaves them out), "refuses".
        self.of_chunk, self.counts = how.get("of_chunk", 1), how.get("counts", "yes")
        self.count, self.lock = 0, threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _json(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _allowed(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self._json(401, {"error": {"message": "who are you?"}})
        return False

    def do_GET(self) -> None:
        if self._allowed():
            models = [{"id": MODEL, "object": "model", "created": 0, "owned_by": "us"}]
            self._json(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        chat = self.path.endswith("/chat/completions")
        if self.server.only_chat and not chat:
            self._json(404, {"error": {"message": "no such address"}})
            return
        counts = asked.get("stream_options", {}).get("include_usage", False)
        if counts and self.server.counts == "refuses":
            self._json(422, {"error": {"message": "stream_options is unknown"}})
            return
        with self.server.lock:
            number, self.server.count = self.server.count, self.server.count + 1
        fault = self.server.faults.get(number, "")
        if fault == "error":
            self._json(500, {"error": {"message": "out of memory"}})
            return
        if not self.server.streams:
            self._json(200, {"id": "x", "object": "text_completion", "choices": [{"index": 0, "text": "all at once"}]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens = asked["max_tokens"]
        chunks = -(-tokens // self.server.of_chunk)
        for place in range(chunks):
            if fault == "empty":
                break
            if fault == "stall" and place == 1:
                time.sleep(30)
            if fault == "close" and place == 2:
                self.close_connection = True
                return
            time.sleep(self.server.token_s)
            self._chunk(chat, "word ", "length" if place == chunks - 1 else None)
        if counts and self.server.counts == "yes":
            usage = {
                "prompt_tokens": 1000 + number,
                "completion_tokens": tokens,
                "total_tokens": 1000 + number + tokens,
            }
            self._event({"choices": [], "usage": usage}, chat)
        self._write(b"data: [DONE]\n\n")
        self._write(b"")

    def _chunk(self, chat: bool, text: str, reason: str | None) -> None:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        choice |= {"delta": {"content": text}} if chat else {"text": text}
        self._event({"choices": [choice]}, chat)

    def _event(self, content: dict[str, Any], chat: bool) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        event = {"id": "x", "object": kind, "created": 0, "model": MODEL, **content}
        self._write(f"data: {json.dumps(event)}\n\n".encode())

    def _write(self, body: bytes) -> None:
        self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")
        self.wfile.flush()


@contextmanager
def stub(faults: dict[int, str] | None = None, **how: Any) -> Iterator[Stub]:
    """Yield a server that runs in threads of this process."""
    server = Stub(faults or {}, **how)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
