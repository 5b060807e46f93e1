"""Slack: https://docs.slack.dev/authentication/verifying-requests-from-slack"""

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

_VERSION: Final = "v0"


def verify(delivery: Delivery, secrets: Sequence[str], _config: Config) -> None:
    timestamp = delivery.header("X-Slack-Request-Timestamp")
    delivery.check_age(timestamp)
    version, _, signature = delivery.header("X-Slack-Signature").partition("=")
    signed = f"{_VERSION}:{timestamp}:".encode() + delivery.body
    if version != _VERSION or not any_matches([signature.encode()], hex_digests(secrets, signed)):
        raise Forged("the signature does not match")


def identify(_delivery: Delivery, content: Any, _config: Config) -> Identity:
    """Retries keep the `event_id`. Commands and buttons, which come as forms, have a `trigger_id` of their own."""
    delivery_id = text_of(member(content, "event_id")) or text_of(member(content, "trigger_id"))
    kind = member(content, "event", "type") or member(content, "command") or member(content, "type")
    return Identity(delivery_id, text_of(kind))


def challenge(content: Any) -> str | None:
    """What Slack wants to have echoed when an address is entered there; None: it is an event."""
    return text_of(member(content, "challenge")) if member(content, "type") == "url_verification" else None


def _no_secret() -> str:
    raise ValueError("is the app's Signing Secret (Basic Information): give it")


SOURCE: Final = Source("slack", "theirs", verify, identify, _no_secret, at_least(8), hidden=("x-slack-signature",))
