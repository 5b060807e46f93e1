"""Any sender that signs the body with an HMAC: which header, algorithm, encoding and prefix is up to the endpoint."""

from __future__ import annotations

import hmac
import secrets as random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from agentflow.webhooks import places
from agentflow.webhooks.sources.delivery import (
    Delivery,
    Forged,
    Identity,
    Source,
    any_matches,
    at_least,
    decoded,
    text_of,
)

if TYPE_CHECKING:
    from agentflow.webhooks.config import Config


def verify(delivery: Delivery, secrets: Sequence[str], config: Config) -> None:
    scheme = config.hmac
    given = delivery.header(scheme.header)
    if not given.startswith(scheme.prefix):
        raise Forged(f"the signature does not begin with {scheme.prefix}")
    signed = delivery.body
    if scheme.timestamp_header is not None:
        timestamp = delivery.header(scheme.timestamp_header)
        delivery.check_age(timestamp)
        signed = timestamp.encode() + scheme.separator.encode() + signed
    try:
        text = given.removeprefix(scheme.prefix)
        signature = bytes.fromhex(text) if scheme.encoding == "hex" else decoded(text)
    except ValueError:
        raise Forged(f"the signature is not {scheme.encoding}") from None
    if not any_matches([signature], [hmac.digest(secret.encode(), signed, scheme.algorithm) for secret in secrets]):
        raise Forged("the signature does not match")


def identify(delivery: Delivery, content: Any, config: Config) -> Identity:
    def found(place: str | None) -> str | None:
        return text_of(places.read(place, content, delivery.headers)) if place is not None else None

    return Identity(found(config.delivery_id), found(config.type))


SOURCE: Final = Source("generic", "ours", verify, identify, lambda: random.token_urlsafe(32), at_least(8))
