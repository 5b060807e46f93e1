"""The protocol of OpenAI as OpenRouter, vLLM, llama.cpp and Ollama speak it: JSON out of questions, answers out of JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from agentflow.errors import Permanent, Transient
from agentflow.models.content import Completion, Message, Segment, Transcription, Word


def of_message(message: Message) -> dict[str, Any]:
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = [{"type": "text", "text": message.text}]
    for image in message.images:
        url = f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": message.role, "content": parts}


def completion(document: dict[str, Any], model: str) -> Completion:
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


def vectors(document: dict[str, Any], wanted: int) -> list[list[float]]:
    try:
        data = document["data"]
        if all(each.get("index") is not None for each in data):
            data = sorted(data, key=lambda each: int(each["index"]))
        found = [[float(number) for number in each["embedding"]] for each in data]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Transient("the model server's embeddings cannot be read", code="model_bad_answer") from None
    if len(found) != wanted:
        raise Transient(f"{len(found)} embeddings came for {wanted} texts", code="model_bad_answer")
    return found


def transcription(document: dict[str, Any]) -> Transcription:
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


def events(pieces: Iterable[bytes]) -> Iterator[str]:
    """The data of server-sent events. Comments (OpenRouter sends some to keep the line alive) are passed over."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode(errors="replace")


def spent(document: Mapping[str, Any]) -> dict[str, float]:
    """What an answer cost, as far as it says so."""
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    named = {
        "tokens_in": usage.get("prompt_tokens", usage.get("input_tokens")),
        "tokens_out": usage.get("completion_tokens", usage.get("output_tokens")),
        "audio_s": usage.get("seconds"),
        "usd": usage.get("cost"),
    }
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    }
