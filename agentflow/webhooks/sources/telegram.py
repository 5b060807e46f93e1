"""Telegram bots: https://core.telegram.org/bots/api#setwebhook (`secret_token`). Nothing is signed: the secret comes along."""

from __future__ import annotations

import re
import secrets as random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from agentflow.webhooks.sources.delivery import Delivery, Forged, Identity, Source, any_matches, member, text_of

if TYPE_CHECKING:
    from agentflow.webhooks.config import Config

_HEADER: Final = "X-Telegram-Bot-Api-Secret-Token"
_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{8,256}")


def verify(delivery: Delivery, secrets: Sequence[str], _config: Config) -> None:
    if not any_matches([delivery.header(_HEADER).encode()], [secret.encode() for secret in secrets]):
        raise Forged("the secret token does not match")


def identify(_delivery: Delivery, content: Any, _config: Config) -> Identity:
    """Of an update's keys one is not its id: that names what it is. Redeliveries keep the id."""
    kinds = [name for name in content if name != "update_id"] if isinstance(content, dict) else []
    return Identity(text_of(member(content, "update_id")), text_of(kinds[0]) if kinds else None)


def check_secret(secret: str) -> None:
    if not _SECRET.fullmatch(secret):
        raise ValueError("has 8 to 256 letters, digits, _ and -")


SOURCE: Final = Source(
    "telegram",
    "ours",
    verify,
    identify,
    lambda: random.token_urlsafe(32),
    check_secret,
    hidden=(_HEADER.lower(),),
)
