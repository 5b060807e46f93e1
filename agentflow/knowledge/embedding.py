"""Vectors of texts: by an OpenAI-compatible server, by OpenRouter, or by the local model.

A text that a server refuses (too long, moderation, nonsense that makes it fail) must not keep the others of its batch from
their vectors: the batch is halved until it stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from agentflow.errors import Permanent
from agentflow.knowledge import encoder
from agentflow.knowledge.embedding_models import MOST_DIMENSIONS, EmbeddingModel, Provider
from agentflow.knowledge.encoder import Encoder
from agentflow.models import Models, NotConfigured
from agentflow.models.client import EMBEDDINGS_AT_ONCE, Caller
from agentflow.settings import Settings

#: A request's least common limit; a batch above it is no faster either.
TOKENS_AT_ONCE: Final = 8000
TEXTS_AT_ONCE: Final = EMBEDDINGS_AT_ONCE
#: The server's word on these texts, not on the account or the model.
_OF_THE_TEXT: Final = frozenset({"model_too_large", "model_bad_request", "model_refused"})
_PROBE: Final = "What is this about?"
_QUESTION_S: Final = 8.0


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a text has no vector."""

    code: str
    message: str


class Unpaid:
    """Who asks for a single vector, outside of any job: not told what it cost."""

    def check(self) -> None:
        pass

    def spent(self, **measures: float) -> None:
        pass


#: As pgvector reads it, of length 1.
Vector = str


class Embeddings:
    """Of a process; connects to nothing and starts nothing before the first text.

    Methods raise NotConfigured where the model's provider is not set (any more), `Permanent` with the code
    model_dimensions where the server has another model under that name, and what `Models.embed` does.
    """

    def __init__(self, settings: Settings, *, nice: int = 0) -> None:
        self._settings = settings
        self._encoder = Encoder(nice=nice)
        self._models: dict[tuple[Provider, str, float], Models] = {}
        self._sane: set[tuple[Provider, str]] = set()  # what has answered with a vector

    def configured(self) -> tuple[Provider, str]:
        """What the settings name: the provider and its model. Raises NotConfigured."""
        settings = self._settings
        if settings.embeddings_model is None:
            return "local", encoder.NAME
        if settings.embeddings_base_url is not None:
            return "server", settings.embeddings_model
        if settings.openrouter_api_key is not None:
            return "openrouter", settings.embeddings_model
        if settings.llm_base_url is not None:
            return "server", settings.embeddings_model
        raise NotConfigured("EMBEDDINGS_BASE_URL or OPENROUTER_API_KEY, one of which has EMBEDDINGS_MODEL")

    def prefixes(self, provider: Provider) -> tuple[str, str]:
        """What the settings put before a passage and before a question."""
        if provider == "local":
            return "", ""
        return self._settings.embeddings_passage_prefix or "", self._settings.embeddings_query_prefix or ""

    def dimensions(self, caller: Caller, provider: Provider, name: str) -> int:
        """How long the model's vectors are, by asking it. Raises Permanent where no index takes so many."""
        if provider == "local":
            if name != encoder.NAME:
                raise NotConfigured(f"no other local model than {encoder.NAME}: there is one alone")
            return encoder.DIMENSIONS
        (vector,) = self._of(provider, name).embed(caller, [_PROBE], model=name)
        if len(vector) > MOST_DIMENSIONS:
            raise Permanent(
                f"{name} makes vectors of {len(vector)} numbers; at most {MOST_DIMENSIONS} can be searched",
                code="model_dimensions",
            )
        return len(vector)

    def question(self, caller: Caller, model: EmbeddingModel, text: str) -> Vector | Refused:
        """Gives up early: somebody waits for the answer."""
        return self._made(caller, model, [_prefixed(model.query_prefix, text)], _QUESTION_S)[0]

    def passages(self, caller: Caller, model: EmbeddingModel, texts: Sequence[str]) -> list[Vector | Refused]:
        """For each text its vector, or why there is none. Give at most TEXTS_AT_ONCE with TOKENS_AT_ONCE in all."""
        return self._made(caller, model, [_prefixed(model.passage_prefix, text) for text in texts], math.inf)

    @property
    def encoder_pid(self) -> int | None:
        return self._encoder.pid

    def rest(self) -> None:
        """Give back the memory of the local model while nobody uses it."""
        self._encoder.rest()

    def close(self) -> None:
        self._encoder.close()
        for models in self._models.values():
            models.close()

    def _of(self, provider: Provider, name: str, timeout_s: float = math.inf) -> Models:
        """The client for a provider: the other's settings taken away, which would win or fill in."""
        if (provider, name, timeout_s) not in self._models:
            other = {"openrouter": ("embeddings_base_url", "llm_base_url")}.get(provider, ("openrouter_api_key",))
            settings = self._settings.model_copy(
                update={
                    **dict.fromkeys(other),
                    "embeddings_model": name,
                    "llm_timeout": min(self._settings.llm_timeout, timeout_s),
                }
            )
            self._models[provider, name, timeout_s] = Models(settings)
        return self._models[provider, name, timeout_s]

    def _made(
        self, caller: Caller, model: EmbeddingModel, texts: list[str], timeout_s: float
    ) -> list[Vector | Refused]:
        if model.provider == "local":
            return list(self._encoder.vectors(texts, caller.check))
        return self._isolating(caller, model, texts, self._of(model.provider, model.name, timeout_s))

    def _isolating(
        self, caller: Caller, model: EmbeddingModel, texts: list[str], client: Models
    ) -> list[Vector | Refused]:
        try:
            found = self._asked(caller, model, texts, client)
        except Permanent as error:
            if error.code not in _OF_THE_TEXT:
                raise
            if len(texts) == 1:
                self._see_that_it_answers(caller, model, client)
                return [Refused(error.code, str(error))]
            middle = len(texts) // 2
            return [
                *self._isolating(caller, model, texts[:middle], client),
                *self._isolating(caller, model, texts[middle:], client),
            ]
        if len(texts) > 1:  # some servers answer with NaN for all of a batch in which one text is odd
            return [
                v or self._isolating(caller, model, [text], client)[0] for v, text in zip(found, texts, strict=True)
            ]
        if found[0] is None:
            self._see_that_it_answers(caller, model, client)
            return [Refused("model_bad_answer", "the model's vector of this text is not made of numbers")]
        return [found[0]]

    def _asked(self, caller: Caller, model: EmbeddingModel, texts: list[str], client: Models) -> list[Vector | None]:
        """None for what is no direction: NaN, infinity, or all zero."""
        rows = client.embed(caller, texts, model=model.name)
        if rows and len(rows[0]) != model.dimensions:
            raise Permanent(
                f"{model.title} answers with {len(rows[0])} numbers where it had {model.dimensions}: it is another model"
                " now; give it another name and switch to it",
                code="model_dimensions",
            )
        found = [_unit(row) for row in rows]
        if any(vector is not None for vector in found):
            self._sane.add((model.provider, model.name))
        return found

    def _see_that_it_answers(self, caller: Caller, model: EmbeddingModel, client: Models) -> None:
        """A server that refuses whatever it is asked must not have every text marked as refused. Raises its refusal."""
        if (model.provider, model.name) in self._sane:
            return
        if self._asked(caller, model, [_PROBE], client) == [None]:
            raise Permanent(f"{model.title} makes no vectors of numbers, of any text", code="model_bad_answer")


def _prefixed(prefix: str, text: str) -> str:
    return f"{prefix} {text}" if prefix else text


def _unit(row: Sequence[float]) -> Vector | None:
    length = math.hypot(*row)
    if not math.isfinite(length) or length == 0.0:
        return None
    return encoder.as_text([number / length for number in row])
