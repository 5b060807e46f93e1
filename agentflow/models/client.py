"""Questions to models: chat with pictures, answers of a given shape, embeddings, transcription."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable
from urllib.parse import urlsplit

from agentflow import log
from agentflow.calls import Service
from agentflow.connections import Connections, Head
from agentflow.errors import JobError, Transient, Wait
from agentflow.models import endpoints, failures, structured, wire
from agentflow.models.answers import key_of
from agentflow.models.content import Completion, Message, Transcription
from agentflow.models.endpoints import Endpoint, Kind
from agentflow.models.structured import Shape, WrongShape
from agentflow.settings import Settings

logger = log.get(__name__)

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
        return endpoints.choose(self._settings, kind)

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
            vectors += wire.vectors(document, len(batch))
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
        return wire.transcription(document)

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
        question: dict[str, Any] = {
            "model": model or endpoint.model,
            "messages": [wire.of_message(m) for m in messages],
        }
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
        return wire.completion(document, question["model"])

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
            caller.spent(model_calls=1, **wire.spent(document))
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
                for event in wire.events(head.pieces):
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
                    caller.spent(model_calls=1, **wire.spent({"usage": usage}))
        if not ended and finish_reason is None:
            raise Transient("the model server broke off its answer", code="model_cut")
        return {"choices": [{"message": {"content": text}, "finish_reason": finish_reason}]}

    @contextmanager
    def _answer(self, caller: Caller, endpoint: Endpoint, path: str, asked: str, **content: Any) -> Iterator[Head]:
        """Send, once there is a place for it, and give an answer that is no error."""
        if isinstance(caller, Placed):
            caller.permit(endpoints.service(self._settings, endpoint), key_of(path, asked).hex()[:16])
        with self._connections.send(
            "POST",
            endpoint.base_url + path,
            total_s=self._settings.llm_timeout,
            check=caller.check,
            headers=endpoints.headers(self._settings, endpoint),
            **content,
        ) as head:
            if head.status >= 300:
                error = failures.of_answer(head.status, head.headers, head.read(), asked=asked)
                raise self._noted(caller, endpoint, error)
            if isinstance(caller, Placed) and (for_s := failures.exhausted_s(head.headers)):
                caller.exhausted(endpoints.service(self._settings, endpoint), for_s)
            yield head

    def _noted(self, caller: Caller, endpoint: Endpoint, error: JobError) -> JobError:
        if error.code == failures.LIMIT and isinstance(caller, Placed):
            caller.refused(
                endpoints.service(self._settings, endpoint), error.seconds if isinstance(error, Wait) else None
            )
        if error.code in failures.OF_THE_ACCOUNT:  # somebody has to do something, and no job's retry will
            logger.error(
                "a model server refuses the account", code=error.code, server=urlsplit(endpoint.base_url).hostname
            )
        return error
