"""Standard Webhooks (https://www.standardwebhooks.com), and Svix, which calls its headers `svix-…`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from agentflow import signing
from agentflow.webhooks.sources.delivery import (
    Delivery,
    Forged,
    Identity,
    Source,
    any_matches,
    base64_digests,
    decoded,
    member,
    text_of,
)

if TYPE_CHECKING:
    from agentflow.webhooks.config import Config

_PREFIX: Final = "whsec_"
_LEAST_KEY_BYTES: Final = 16


def verify(delivery: Delivery, secrets: Sequence[str], _config: Config) -> None:
    prefix = _header_prefix(delivery)
    message_id, timestamp = delivery.header(f"{prefix}-id"), delivery.header(f"{prefix}-timestamp")
    delivery.check_age(timestamp)
    # `v1a` and whatever comes are other schemes.
    given = [
        signature.encode()
        for version, _, signature in (each.partition(",") for each in delivery.header(f"{prefix}-signature").split(" "))
        if version == "v1"
    ]
    signed = f"{message_id}.{timestamp}.".encode() + delivery.body
    if not any_matches(given, base64_digests([_key(secret) for secret in secrets], signed)):
        raise Forged("no signature matches")


def identify(delivery: Delivery, content: Any, _config: Config) -> Identity:
    message_id = delivery.headers.get(f"{_header_prefix(delivery)}-id")
    return Identity(text_of(message_id), text_of(member(content, "type")))


def check_secret(secret: str) -> None:
    if len(_key(secret)) < _LEAST_KEY_BYTES:
        raise ValueError(f"must hold at least {_LEAST_KEY_BYTES} bytes")


def _header_prefix(delivery: Delivery) -> str:
    return "svix" if "webhook-id" not in delivery.headers and "svix-id" in delivery.headers else "webhook"


def _key(secret: str) -> bytes:
    if not secret.startswith(_PREFIX):
        raise ValueError(f"begins with {_PREFIX}, then base64")
    return decoded(secret.removeprefix(_PREFIX))


SOURCE: Final = Source(
    "standard",
    "ours",
    verify,
    identify,
    signing.make_secret,
    check_secret,
    hidden=("webhook-signature", "svix-signature"),
)
