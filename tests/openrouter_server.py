"""OpenRouter on this machine, or (`openrouter=False`) a plain OpenAI-compatible server: answers, usage, and faults on order.

    with model_server() as vendor:
        vendor.reply = lambda asked: "a cat"                       # what chat answers; a dict is sent as JSON text
        vendor.fault(no_credit(), when=lambda asked: "dog" in asked.text, times=1)
        ... Settings(openrouter_api_key="sk-or-v1-…", openrouter_base_url=vendor.url) ...
        assert vendor.asked[0].images == [...]

Formats: https://openrouter.ai/docs/api-reference. The error bodies are those that OpenRouter sends.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from werkzeug.formparser import parse_form_data

from tests.http_server import Reply, Request, Server, serve

KEY = "sk-or-v1-0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Asked:
    """One request as the model sees it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]  # of a form: its fields
    text: str = ""  # all texts of the conversation, or those to embed, joined by lines
    images: tuple[bytes, ...] = ()
    sound: bytes = b""

    @property
    def schema(self) -> str | None:
        """The name of the schema that the answer is to have."""
        wanted = self.body.get("response_format")
        return (wanted.get("json_schema") or {}).get("name") if isinstance(wanted, dict) else None

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


Fault = Callable[[Asked], Reply]


@dataclass
class _Scripted:
    fault: Fault
    when: Callable[[Asked], bool]
    times: int


@dataclass
class ModelServer:
    server: Server
    openrouter: bool
    key: str | None
    reply: Callable[[Asked], Any] = lambda asked: "pong"
    transcribe: Callable[[Asked], dict[str, Any]] = lambda asked: {"text": "hello"}
    usd_per_call: float = 0.0001
    asked: list[Asked] = field(default_factory=list)
    answered: list[Asked] = field(default_factory=list)  # those that got no fault: what has to be paid
    _faults: list[_Scripted] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return self.server.url("/api/v1" if self.openrouter else "/v1")

    def fault(self, fault: Fault, *, when: Callable[[Asked], bool] = lambda asked: True, times: int = 1) -> None:
        """The next `times` requests of that kind meet this fault."""
        with self._lock:
            self._faults.append(_Scripted(fault, when, times))

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def __call__(self, request: Request) -> Reply:
        asked = _read(request)
        with self._lock:
            self.asked.append(asked)
            scripted = next((s for s in self._faults if s.times > 0 and s.when(asked)), None)
            if scripted is not None:
                scripted.times -= 1
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, "No auth credentials found")
        if scripted is not None:
            return scripted.fault(asked)
        with self._lock:
            self.answered.append(asked)
        return self.answer(asked)

    def answer(self, asked: Asked) -> Reply:
        match asked.path.rsplit("/v1", 1)[1]:
            case "/chat/completions":
                said = self.reply(asked)
                text = said if isinstance(said, str) else json.dumps(said)
                if asked.streams:
                    return stream(text, self.usage(asked, text))
                return completion(text, usage=self.usage(asked, text))
            case "/embeddings":
                texts = asked.body["input"]
                data = [{"object": "embedding", "index": i, "embedding": vector(t)} for i, t in enumerate(texts)]
                usage = {"prompt_tokens": len(asked.text.split()), "total_tokens": len(asked.text.split())}
                return _json({"object": "list", "model": "m", "data": data[::-1], "usage": usage | self._cost()})
            case "/audio/transcriptions":
                return _json(self.transcribe(asked))
        return error(404, f"{asked.path} is not here")

    def usage(self, asked: Asked, text: str) -> dict[str, Any]:
        tokens_in, tokens_out = len(asked.text.split()) + 85 * len(asked.images), len(text.split())
        counts = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
        return counts | self._cost()

    def _cost(self) -> dict[str, Any]:
        return {"cost": self.usd_per_call, "is_byok": False} if self.openrouter else {}


@contextmanager
def model_server(*, openrouter: bool = True, key: str | None = KEY) -> Iterator[ModelServer]:
    with serve() as server:
        vendor = ModelServer(server, openrouter, key if openrouter else None)
        server.on("/", vendor)
        yield vendor


def vector(text: str) -> list[float]:
    """A unit-like vector that says which text it belongs to."""
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]]


# ---- answers ----


def completion(text: str | None, *, usage: dict[str, Any] | None = None, **choice: Any) -> Reply:
    message = {"role": "assistant", "content": text, "refusal": None, "reasoning": None}
    choices = [{"index": 0, "finish_reason": "stop", "message": message, "logprobs": None, **choice}]
    document = {"id": "gen-1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
    return _json(document | ({"usage": usage} if usage else {}))


def stream(text: str, usage: dict[str, Any]) -> Reply:
    pieces = [b": OPENROUTER PROCESSING\n\n"]
    pieces += [_chunk(word) for word in _words(text)]
    pieces += [_chunk("", finish_reason="stop"), _event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]
    return Reply(body=pieces, headers={"Content-Type": "text/event-stream"})


def error(status: int, message: str, *, headers: dict[str, str] | None = None, **metadata: Any) -> Reply:
    return _json({"error": {"code": status, "message": message, "metadata": metadata or None}}, status, headers)


# ---- faults ----


def refused(*reasons: str) -> Fault:
    """403 of the moderation; the flagged text is repeated, as OpenRouter does."""
    metadata = {
        "reasons": list(reasons or ("violence",)),
        "provider_name": "OpenAI",
        "model_slug": "openai/gpt-4o-mini",
    }
    return lambda asked: error(403, "Your chosen model requires moderation", flagged_input=asked.text[:100], **metadata)


def limited(*, reset_in_s: float, message: str = "Rate limit exceeded: free-models-per-min") -> Fault:
    """429 with the reset in Unix milliseconds, inside of the body."""

    def fault(asked: Asked) -> Reply:
        reset = str(round((time.time() + reset_in_s) * 1000))
        limits = {"X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset}
        return _json(
            {"error": {"code": 429, "message": message, "metadata": {"headers": limits}}, "user_id": "user_1"}, 429
        )

    return fault


def daily_quota() -> Fault:
    """429 of the free models' quota, without a time: it ends at midnight UTC."""
    return lambda asked: error(429, "Rate limit exceeded: free-models-per-day")


def busy(retry_after: str | None = None, status: int = 429) -> Fault:
    headers = {"Retry-After": retry_after} if retry_after else {}
    return lambda asked: error(
        status, "Provider returned error", headers=headers, raw="slow down", provider_name="Poolside"
    )


def no_credit() -> Fault:
    return lambda asked: error(402, "This request requires more credits, or fewer max_tokens.")


def status(code: int, message: str = "Provider returned error", **metadata: Any) -> Fault:
    return lambda asked: error(code, message, **metadata)


def html(code: int) -> Fault:
    return lambda asked: Reply(code, b"<html>A timeout occurred</html>", {"Content-Type": "text/html"})


def error_in_200(code: int | str, message: str = "Provider disconnected") -> Fault:
    return lambda asked: _json({"error": {"code": code, "message": message}})


def error_in_choice(code: int = 502) -> Fault:
    return lambda asked: completion("", finish_reason="error", error={"code": code, "message": "Upstream error"})


def says(text: str | None, **choice: Any) -> Fault:
    """An answer with this text, whatever was asked."""
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "cost": 0.0001}
    return lambda asked: completion(text, usage=usage, **choice)


def broken_json() -> Fault:
    return says('{"caption": "half of a')


def body(document: Any) -> Fault:
    return lambda asked: _json(document)


def slow(seconds: float) -> Fault:
    """Nothing comes for so long; then an answer that nobody waits for."""
    return lambda asked: Reply(body=[b'{"choices": []}'], pause_s=seconds)


def trickling(pause_s: float) -> Fault:
    """A byte now and then: no single wait is long."""
    return lambda asked: Reply(body=[b" "] * 1000, pause_s=pause_s)


def cut() -> Fault:
    """The connection ends in the middle of the answer."""
    return lambda asked: Reply(body=b'{"choices": [{"mess', length=500, reset=True)


def stream_error(code: int | str = 502) -> Fault:
    """The stream begins well and ends in an error."""
    failed = {"code": code, "message": "Provider disconnected", "metadata": {"error_type": "provider_unavailable"}}
    choices = [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]
    pieces = [_chunk("Half"), _event({"error": failed, "choices": choices})]
    return lambda asked: Reply(body=pieces, headers={"Content-Type": "text/event-stream"})


def stream_cut(*, reset: bool) -> Fault:
    """The stream ends without its end: by a reset, or as if all were well."""
    return lambda asked: Reply(body=[_chunk("Half")], headers={"Content-Type": "text/event-stream"}, reset=reset)


# ---- the wire ----


def _json(document: Any, code: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(code, json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})})


def _event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _chunk(text: str, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return _event({"object": "chat.completion.chunk", "choices": [choice]})


def _words(text: str) -> list[str]:
    return [word + " " for word in text.split(" ")[:-1]] + text.split(" ")[-1:]


def _read(request: Request) -> Asked:
    headers = dict(request.headers)
    if headers.get("content-type", "").startswith("multipart/form-data"):
        environ = {
            "REQUEST_METHOD": "POST",
            "wsgi.input": io.BytesIO(request.body),
            "CONTENT_TYPE": headers["content-type"],
            "CONTENT_LENGTH": str(len(request.body)),
        }
        _, form, files = parse_form_data(environ)
        fields = {name: values if len(values) > 1 else values[0] for name, values in form.lists()}
        return Asked(request.path, headers, fields, sound=files["file"].read())
    document = json.loads(request.body or b"{}")
    texts: list[str] = []
    images: list[bytes] = []
    for message in document.get("messages", ()):
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                url = part["image_url"]["url"]
                assert url.startswith("data:image/"), "only pictures that we hold may go to a vendor"
                images.append(base64.b64decode(url.partition(",")[2]))
    if "input" in document:
        texts += document["input"] if isinstance(document["input"], list) else [document["input"]]
    return Asked(request.path, headers, document, "\n".join(texts), tuple(images))
