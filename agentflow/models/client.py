"""Questions to models: chat with pictures, answers of a given shape, embeddings, transcription."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

from agentflow import log
from agentflow.calls import Service, fingerprint
from agentflow.connections import Connections, Head
from agentflow.errors import JobError, Permanent, Transient, Wait
from agentflow.limits import Window
from agentflow.models import failures, structured
from agentflow.models.answers import key_of
from agentflow.models.structured import Shape, WrongShape
from agentflow.settings import Settings

logger = log.get(__name__)

Kind = Literal["chat", "vision", "embeddings", "transcription"]
#: OpenAI takes 2048 texts in a request, others fewer; a batch fails as a whole.
EMBEDDINGS_AT_ONCE: Final = 100
_QUOTED_ANSWER_CHARS: Final = 4000


class Caller(Protocol):
    """Who asks, and pays: the context of a job."""

    def check(self) -> None:
        """Raises when the caller has to end; called at least every second while an answer is waited for."""

    def spent(self, **measures: float) -> None:
        """Told of each answer's cost as soon as it is known, also when the answer is then of no use: `model_calls`,
        `tokens_in`, `tokens_out`, `audio_s`, `usd`. What the server does not report is left out."""


@runtime_checkable
class Placed(Caller, Protocol):
    """Who asks among many, and can be parked: the context of a job. Whoever cannot (a request, a benchmark) is not held back."""

    def permit(self, service: Service, about: str = "") -> None:
        """Called before each question is sent. Raises `Wait` over a limit or a budget."""

    def refused(self, service: Service, retry_after_s: float | None = None) -> None:
        """Told of a 429."""

    def exhausted(self, service: Service, for_s: float) -> None:
        """Told of an answer that names itself the last one for so long."""


class NotConfigured(Permanent):
    """No server for this kind of question is set."""

    def __init__(self, wanted: str) -> None:
        super().__init__(f"not configured: set {wanted}", code="not_configured")


@dataclass(frozen=True)
class Endpoint:
    """A server and its model for one kind of question. Only OpenRouter gets what only OpenRouter knows."""

    base_url: str
    key: str | None
    model: str
    openrouter: bool

    @property
    def provider(self) -> str:
        """What limits name it by: `openrouter`, or the server's host and port."""
        return "openrouter" if self.openrouter else urlsplit(self.base_url).netloc.rpartition("@")[2].lower()


@dataclass(frozen=True)
class Image:
    """A picture's own bytes; `media_type` is image/png, image/jpeg, image/webp or image/gif."""

    data: bytes
    media_type: str


@dataclass(frozen=True)
class Message:
    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Completion:
    """`finish_reason` is stop, or length where the answer was cut off at `max_tokens`."""

    text: str
    finish_reason: str | None
    model: str


@dataclass(frozen=True)
class Word:
    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Segment:
    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Transcription:
    """Times count from the start of the sound. Servers that know no times of words, or none at all, leave these empty."""

    text: str
    language: str | None
    segments: tuple[Segment, ...]
    words: tuple[Word, ...]


class Models:
    """One per process, shared by its threads. Connects to nothing before the first question.

    Every method raises `NotConfigured`; `Permanent` with the code model_key, model_no_credit, model_forbidden,
    model_refused, model_unknown, model_too_large or model_bad_request; `Transient` with model_timeout,
    model_unreachable, model_cut, model_failed, model_empty, model_bad_answer or model_limit; `Wait` with the reason
    model_limit (a time was named, or a daily quota is used up) or model_loading.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def _connections(self) -> Connections:
        return Connections("the model server", "model")

    def endpoint(self, kind: Kind) -> Endpoint:
        """Raises NotConfigured."""
        settings = self._settings
        own_url, own_key, model = {
            "chat": (settings.llm_base_url, settings.llm_api_key, settings.llm_model),
            "vision": (settings.llm_base_url, settings.llm_api_key, settings.vision_model or settings.llm_model),
            "embeddings": (settings.embeddings_base_url, settings.embeddings_api_key, settings.embeddings_model),
            "transcription": (
                settings.transcription_base_url,
                settings.transcription_api_key,
                settings.transcription_model,
            ),
        }[kind]
        if own_url is None and settings.openrouter_api_key is not None:
            secret = settings.openrouter_api_key.get_secret_value()
            model = model or _OPENROUTER_MODELS[kind]
            return Endpoint(settings.openrouter_base_url.rstrip("/"), secret, model, openrouter=True)
        if own_url is None:  # one server for everything
            own_url, own_key = settings.llm_base_url, settings.llm_api_key
        if own_url is None:
            raise NotConfigured("OPENROUTER_API_KEY or LLM_BASE_URL")
        if model is None:
            raise NotConfigured(f"{kind.upper()}_MODEL to one that LLM_BASE_URL has, or OPENROUTER_API_KEY")
        return Endpoint(own_url.rstrip("/"), own_key.get_secret_value() if own_key else None, model, openrouter=False)

    def chat(
        self,
        caller: Caller,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Completion:
        """Ask; pictures go to VISION_MODEL. With `on_text` the answer is streamed, and each piece handed over as it comes."""
        return self._chat(caller, messages, model, max_tokens, temperature, on_text, shape=None)

    def structured(
        self,
        caller: Caller,
        messages: Sequence[Message],
        shape: type[Shape],
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> Shape:
        """Ask for JSON of a pydantic model's shape. An answer that does not fit goes back once, with what is wrong.

        Raises `Transient` with the code model_bad_answer when the second does not fit either.
        """
        messages = [*messages]
        for is_last in (False, True):
            completion = self._chat(caller, messages, model, max_tokens, temperature, None, shape)
            try:
                return structured.read(completion.text, shape)
            except WrongShape as error:
                wrong = str(error)
                if completion.finish_reason == "length":
                    wrong = "it was cut off; say less"
            if not is_last:
                logger.info("a model's answer goes back to be repaired", model=completion.model, shape=shape.__name__)
                messages += [
                    Message("assistant", completion.text[:_QUOTED_ANSWER_CHARS]),
                    Message("user", f"That answer cannot be used: {wrong}. Answer again, with the JSON object alone."),
                ]
        raise Transient("the model's answer is not of the shape that was asked for", code="model_bad_answer")

    def embed(self, caller: Caller, texts: Sequence[str], *, model: str | None = None) -> list[list[float]]:
        """One vector for each text, in their order, all of one length."""
        endpoint = self.endpoint("embeddings")
        vectors: list[list[float]] = []
        for first in range(0, len(texts), EMBEDDINGS_AT_ONCE):
            batch = list(texts[first : first + EMBEDDINGS_AT_ONCE])
            question = {"model": model or endpoint.model, "input": batch, "encoding_format": "float"}
            asked = "\n".join(batch)
            document = self._ask(caller, endpoint, "/embeddings", asked, json=question)
            vectors += _vectors(document, len(batch))
        if len({len(vector) for vector in vectors}) > 1:
            raise Transient("the model's embeddings differ in length", code="model_bad_answer")
        return vectors

    def transcribe(self, caller: Caller, sound: Path, *, language: str | None = None) -> Transcription:
        """What is said in a sound file of at most a few minutes (WAV or FLAC, 16 kHz mono, is understood everywhere)."""
        endpoint = self.endpoint("transcription")
        form = {
            "model": endpoint.model,
            "response_format": "verbose_json",
            "timestamp_granularities[]": ["word", "segment"],
            **({"language": language} if language else {}),
        }
        with sound.open("rb") as file:
            files = {"file": (f"sound{sound.suffix}", file, f"audio/{sound.suffix.removeprefix('.')}")}
            document = self._ask(caller, endpoint, "/audio/transcriptions", sound.name, data=form, files=files)
        return _transcription(document)

    def close(self) -> None:
        if "_connections" in self.__dict__:
            self._connections.close()

    # ---- one question ----

    def _chat(
        self,
        caller: Caller,
        messages: Sequence[Message],
        model: str | None,
        max_tokens: int | None,
        temperature: float | None,
        on_text: Callable[[str], None] | None,
        shape: type[Shape] | None,
    ) -> Completion:
        endpoint = self.endpoint("vision" if any(message.images for message in messages) else "chat")
        question: dict[str, Any] = {"model": model or endpoint.model, "messages": [_message(m) for m in messages]}
        if max_tokens is not None:
            question["max_tokens"] = max_tokens
        if temperature is not None:
            question["temperature"] = temperature
        if shape is not None:
            question |= self._response_format(endpoint, shape)
        asked = "\n".join(message.text for message in messages)
        if on_text is None:
            document = self._ask(caller, endpoint, "/chat/completions", asked, json=question)
        else:
            question |= {"stream": True, "stream_options": {"include_usage": True}}
            document = self._stream(caller, endpoint, "/chat/completions", asked, question, on_text)
        return _completion(document, question["model"])

    def _response_format(self, endpoint: Endpoint, shape: type[Shape]) -> dict[str, Any]:
        match self._settings.llm_structured_output:
            case "json_schema":
                schema = {"name": shape.__name__.lower(), "strict": True, "schema": structured.portable_schema(shape)}
                wanted: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": schema}}
                # Without it, a provider that knows no schemas ignores this one.
                return wanted | ({"provider": {"require_parameters": True}} if endpoint.openrouter else {})
            case "json_object":
                return {"response_format": {"type": "json_object"}}
            case _:
                return {}

    def _ask(self, caller: Caller, endpoint: Endpoint, path: str, asked: str, **content: Any) -> dict[str, Any]:
        """The JSON of an answer that is no error."""
        with self._answer(caller, endpoint, path, asked, **content) as head:
            body = head.read()
        try:
            document = json.loads(body)
        except ValueError:
            raise Transient("the model server's answer is not JSON", code="model_bad_answer") from None
        if isinstance(document, dict):
            _tell(caller, document)
        if error := failures.of_document(document, asked=asked):
            raise self._noted(caller, endpoint, error)
        return dict(document)

    def _stream(
        self,
        caller: Caller,
        endpoint: Endpoint,
        path: str,
        asked: str,
        question: dict[str, Any],
        on_text: Callable[[str], None],
    ) -> dict[str, Any]:
        """The whole of a streamed answer, put together as one that was not."""
        text, finish_reason, ended = "", None, False
        usage: dict[str, Any] = {}
        with self._answer(caller, endpoint, path, asked, json=question) as head:
            try:
                for event in _events(head.pieces):
                    if event == "[DONE]":
                        ended = True
                        break
                    try:
                        chunk = json.loads(event)
                    except ValueError:
                        raise Transient("the model's stream is not JSON", code="model_bad_answer") from None
                    usage = (chunk.get("usage") or usage) if isinstance(chunk, dict) else usage
                    if error := failures.of_document(chunk, asked=asked):
                        raise self._noted(caller, endpoint, error)
                    for choice in (chunk.get("choices") or [])[:1]:
                        finish_reason = choice.get("finish_reason") or finish_reason
                        if piece := (choice.get("delta") or {}).get("content"):
                            text += piece
                            on_text(piece)
            finally:
                if usage:
                    _tell(caller, {"usage": usage})
        if not ended and finish_reason is None:
            raise Transient("the model server broke off its answer", code="model_cut")
        return {"choices": [{"message": {"content": text}, "finish_reason": finish_reason}]}

    @contextmanager
    def _answer(self, caller: Caller, endpoint: Endpoint, path: str, asked: str, **content: Any) -> Iterator[Head]:
        """Send, once there is a place for it, and give an answer that is no error."""
        if isinstance(caller, Placed):
            caller.permit(self._service(endpoint), key_of(path, asked).hex()[:16])
        with self._connections.send(
            "POST",
            endpoint.base_url + path,
            total_s=self._settings.llm_timeout,
            check=caller.check,
            headers=self._headers(endpoint),
            **content,
        ) as head:
            if head.status >= 300:
                error = failures.of_answer(head.status, head.headers, head.read(), asked=asked)
                raise self._noted(caller, endpoint, error)
            if isinstance(caller, Placed) and (for_s := failures.exhausted_s(head.headers)):
                caller.exhausted(self._service(endpoint), for_s)
            yield head

    def _service(self, endpoint: Endpoint) -> Service:
        settings = self._settings
        windows: tuple[Window, ...] = ()
        if endpoint.openrouter:
            windows = (
                Window(settings.openrouter_rate_per_minute, 60),
                Window(settings.openrouter_rate_per_hour, 3600),
                Window(settings.openrouter_rate_per_day, 86_400),
            )
        return Service(endpoint.provider, fingerprint(endpoint.base_url, endpoint.key), windows)

    def _headers(self, endpoint: Endpoint) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        if endpoint.openrouter:
            headers["X-OpenRouter-Title"] = self._settings.openrouter_title
            if self._settings.openrouter_referer:
                headers["HTTP-Referer"] = self._settings.openrouter_referer
        return headers

    def _noted(self, caller: Caller, endpoint: Endpoint, error: JobError) -> JobError:
        if error.code == failures.LIMIT and isinstance(caller, Placed):
            caller.refused(self._service(endpoint), error.seconds if isinstance(error, Wait) else None)
        if error.code in failures.OF_THE_ACCOUNT:  # somebody has to do something, and no job's retry will
            logger.error(
                "a model server refuses the account", code=error.code, server=urlsplit(endpoint.base_url).hostname
            )
        return error


#: What OpenRouter is asked where no model is named.
_OPENROUTER_MODELS: Final[dict[Kind, str]] = {
    "chat": "openai/gpt-4o-mini",
    "vision": "openai/gpt-4o-mini",
    "embeddings": "openai/text-embedding-3-small",
    "transcription": "openai/whisper-1",
}


def _message(message: Message) -> dict[str, Any]:
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = [{"type": "text", "text": message.text}]
    for image in message.images:
        url = f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": message.role, "content": parts}


def _completion(document: dict[str, Any], model: str) -> Completion:
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Transient("the model server's answer has no choices", code="model_bad_answer")
    choice = choices[0]
    message = choice.get("message") or {}
    text, reason = message.get("content") or "", choice.get("finish_reason")
    if reason == "content_filter" or (message.get("refusal") and not text):
        raise Permanent("the model refused this", code="model_refused")
    if not text.strip():
        raise Transient("the model said nothing", code="model_empty")
    return Completion(text, reason, document.get("model") or model)


def _vectors(document: dict[str, Any], wanted: int) -> list[list[float]]:
    try:
        data = document["data"]
        if all(each.get("index") is not None for each in data):
            data = sorted(data, key=lambda each: int(each["index"]))
        vectors = [[float(number) for number in each["embedding"]] for each in data]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Transient("the model server's embeddings cannot be read", code="model_bad_answer") from None
    if len(vectors) != wanted:
        raise Transient(f"{len(vectors)} embeddings came for {wanted} texts", code="model_bad_answer")
    return vectors


def _transcription(document: dict[str, Any]) -> Transcription:
    try:
        language = document.get("language")
        return Transcription(
            text=str(document["text"]).strip(),
            language=str(language) if language else None,
            segments=tuple(
                Segment(str(s["text"]).strip(), float(s["start"]), float(s["end"]))
                for s in document.get("segments") or ()
            ),
            words=tuple(
                Word(str(w.get("word", w.get("text", ""))).strip(), float(w["start"]), float(w["end"]))
                for w in document.get("words") or ()
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Transient("the model server's transcript cannot be read", code="model_bad_answer") from None


def _events(pieces: Iterable[bytes]) -> Iterator[str]:
    """The data of server-sent events. Comments (OpenRouter sends some to keep the line alive) are passed over."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode(errors="replace")


def _tell(caller: Caller, document: Mapping[str, Any]) -> None:
    """What an answer cost, as far as it says so."""
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    named = {
        "tokens_in": usage.get("prompt_tokens", usage.get("input_tokens")),
        "tokens_out": usage.get("completion_tokens", usage.get("output_tokens")),
        "audio_s": usage.get("seconds"),
        "usd": usage.get("cost"),
    }
    known = {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    }
    caller.spent(model_calls=1, **known)
