"""Which server is asked what kind of question, and by which model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

from agentflow.calls import Service, fingerprint
from agentflow.errors import Permanent
from agentflow.limits import Window
from agentflow.settings import Settings

Kind = Literal["chat", "vision", "embeddings", "transcription"]

#: What OpenRouter is asked where no model is named.
_OPENROUTER_MODELS: Final[dict[Kind, str]] = {
    "chat": "openai/gpt-4o-mini",
    "vision": "openai/gpt-4o-mini",
    "embeddings": "openai/text-embedding-3-small",
    "transcription": "openai/whisper-1",
}


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


def choose(settings: Settings, kind: Kind) -> Endpoint:
    """Who is asked such a question. Raises NotConfigured."""
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


def service(settings: Settings, endpoint: Endpoint) -> Service:
    """What its limits are counted by."""
    windows: tuple[Window, ...] = ()
    if endpoint.openrouter:
        windows = (
            Window(settings.openrouter_rate_per_minute, 60),
            Window(settings.openrouter_rate_per_hour, 3600),
            Window(settings.openrouter_rate_per_day, 86_400),
        )
    return Service(endpoint.provider, fingerprint(endpoint.base_url, endpoint.key), windows)


def headers(settings: Settings, endpoint: Endpoint) -> dict[str, str]:
    sent = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    if endpoint.openrouter:
        sent["X-OpenRouter-Title"] = settings.openrouter_title
        if settings.openrouter_referer:
            sent["HTTP-Referer"] = settings.openrouter_referer
    return sent
