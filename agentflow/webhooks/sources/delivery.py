"""A delivery as it came, what a source makes of it, and what the signature schemes share."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from agentflow.webhooks.config import Config

#: How far a sender's clock, and the way, may be off: what a caught delivery is good for. Both ways, for every scheme.
TOLERANCE_S: Final = 300


class Forged(Exception):
    """A delivery whose signature is missing or wrong. The message may be shown: it repeats nothing of the secret."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """`headers` by lower-case name; one that came twice has both values, joined by a comma, and so verifies nowhere."""

    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    now_s: float

    def header(self, name: str) -> str:
        """Raises Forged where it is missing."""
        value = self.headers.get(name.lower())
        if not value:
            raise Forged(f"the header {name} is missing")
        return value

    def check_age(self, timestamp: str) -> None:
        """Raises Forged for what is no Unix time in whole seconds, or too far from now."""
        if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
            raise Forged("the timestamp is not a number of seconds")
        if abs(self.now_s - int(timestamp)) > TOLERANCE_S:
            raise Forged(f"the timestamp is more than {TOLERANCE_S} s away from now")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a sender calls a delivery (None: nothing that tells it from others), and its kind of event."""

    delivery_id: str | None = None
    type: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """How one kind of sender is told from a forger. `verify` raises Forged; it is never called without a secret.

    `secret`: `none`: there is no signature, the URL's token is all; `ours`: made here unless one is given; `theirs`: the vendor
    shows it. `check_secret` raises ValueError for what cannot be a secret of this kind. `hidden` are the headers that hold
    signatures or secrets.
    """

    name: str
    secret: Literal["none", "ours", "theirs"]
    verify: Callable[[Delivery, Sequence[str], Config], None]
    identify: Callable[[Delivery, Any, Config], Identity]
    make_secret: Callable[[], str]
    check_secret: Callable[[str], None]
    hidden: tuple[str, ...] = ()


def any_matches(given: Sequence[bytes], expected: Sequence[bytes]) -> bool:
    """In constant time for what has the same length. Every pair is looked at, whichever matches."""
    found = False
    for mine in expected:
        for theirs in given:
            found |= hmac.compare_digest(theirs, mine)
    return found


def hex_digests(secrets: Sequence[str], signed: bytes, algorithm: str = "sha256") -> list[bytes]:
    return [hmac.digest(secret.encode(), signed, algorithm).hex().encode() for secret in secrets]


def base64_digests(keys: Sequence[bytes], signed: bytes) -> list[bytes]:
    return [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)) for key in keys]


def decoded(text: str) -> bytes:
    """Base64 with or without its padding. Raises ValueError."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError("is not base64") from error


def text_of(value: Any) -> str | None:
    """An id or a type out of a sender's JSON: a text or a whole number, of bounded length; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = str(value) if isinstance(value, str) or abs(value) < 1 << 64 else ""
    return text if 0 < len(text) <= 300 else None


def member(value: Any, *path: str) -> Any:
    """What lies at a path of objects; None where there is nothing."""
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def at_least(characters: int) -> Callable[[str], None]:
    """For secrets whose form is up to whoever makes them."""

    def check(secret: str) -> None:
        if len(secret) < characters:
            raise ValueError(f"must have at least {characters} characters")
        if not secret.isprintable():
            raise ValueError("must not hold control characters")

    return check
