"""GitHub: https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries"""

from __future__ import annotations

import secrets as random
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
    text_of,
)

if TYPE_CHECKING:
    from agentflow.webhooks.config import Config

_HEADER: Final = "X-Hub-Signature-256"


def verify(delivery: Delivery, secrets: Sequence[str], _config: Config) -> None:
    scheme, _, signature = delivery.header(_HEADER).partition("=")
    if scheme != "sha256" or not any_matches([signature.encode()], hex_digests(secrets, delivery.body)):
        raise Forged("the signature does not match")


def identify(delivery: Delivery, _content: Any, _config: Config) -> Identity:
    """A redelivery keeps the id."""
    return Identity(text_of(delivery.headers.get("x-github-delivery")), text_of(delivery.headers.get("x-github-event")))


SOURCE: Final = Source(
    "github",
    "ours",
    verify,
    identify,
    lambda: random.token_urlsafe(32),
    at_least(8),
    hidden=("x-hub-signature", "x-hub-signature-256"),
)
