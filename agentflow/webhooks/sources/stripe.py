"""Stripe: https://docs.stripe.com/webhooks#verify-manually

The secret is used as it is written, `whsec_` and all: not as base64, as Standard Webhooks has it.
"""

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

_HEADER: Final = "Stripe-Signature"


def verify(delivery: Delivery, secrets: Sequence[str], _config: Config) -> None:
    parts = [part.partition("=") for part in delivery.header(_HEADER).split(",")]
    timestamps = [value for name, _, value in parts if name.strip() == "t"]
    if len(timestamps) != 1:
        raise Forged("the signature header must have one t=")
    delivery.check_age(timestamps[0])
    given = [value.encode() for name, _, value in parts if name.strip() == "v1"]
    signed = timestamps[0].encode() + b"." + delivery.body
    if not any_matches(given, hex_digests(secrets, signed)):
        raise Forged("no signature matches")


def identify(_delivery: Delivery, content: Any, _config: Config) -> Identity:
    return Identity(text_of(member(content, "id")), text_of(member(content, "type")))


def _no_secret() -> str:
    raise ValueError("is shown by Stripe where the endpoint is added: give it")


SOURCE: Final = Source("stripe", "theirs", verify, identify, _no_secret, at_least(8), hidden=("stripe-signature",))
