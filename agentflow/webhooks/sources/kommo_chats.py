"""Kommo's Chats API (https://developers.kommo.com/docs/receiving-chat-webhooks): HMAC-SHA1 with the channel's secret."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from agentflow.webhooks.sources.delivery import (
    Delivery,
    Forged,
    Identity,
    Source,
    any_matches,
    at_least,
    hex_digests,
    member,
    text_of,
)

if TYPE_CHECKING:
    from agentflow.webhooks.config import Config


def verify(delivery: Delivery, secrets: Sequence[str], _config: Config) -> None:
    given = delivery.header("X-Signature").encode()
    if not any_matches([given], hex_digests(secrets, delivery.body, "sha1")):
        raise Forged("the signature does not match")


def identify(_delivery: Delivery, content: Any, _config: Config) -> Identity:
    message_id = text_of(member(content, "message", "message", "id")) or text_of(member(content, "message", "id"))
    kinds = [name for name in content if name not in ("account_id", "time")] if isinstance(content, dict) else []
    return Identity(message_id, text_of(kinds[0]) if kinds else None)


def _no_secret() -> str:
    raise ValueError("is the channel's secret, which Kommo gives out with the channel: give it")


SOURCE: Final = Source("kommo_chats", "theirs", verify, identify, _no_secret, at_least(8), hidden=("x-signature",))
