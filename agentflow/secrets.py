"""Credentials at rest: encrypted with AES-256-GCM under ENCRYPTION_KEY, each with the id of the key that it is under.

Without ENCRYPTION_KEY they are kept as they are, and say so; setting the key later encrypts what is written from then on.
While ENCRYPTION_KEY_OLD is set, too, what is still under that key can be read; `agentflow rotate-key` (agentflow/resealing.py)
brings everything under the new one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from uuid import UUID

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

#: For each purpose a key of its own is derived, so that what signs links does not encrypt as well.
_PURPOSE: Final = b"agentflow-seal-1"
_NONCE_BYTES: Final = 12


class Unreadable(Exception):
    """A stored credential cannot be read: ENCRYPTION_KEY is missing or another one, or the row was changed."""


class Sealer:
    """`context` (what the value is, and whose) is authenticated along: a value moved to another row cannot be opened."""

    def __init__(self, key: bytes | None, older: Sequence[bytes] = ()) -> None:
        """`key` seals; what is under one of the `older` can be read."""
        self._key = _derived(key) if key is not None else None
        self._keys = {_id_of(each): each for each in (*map(_derived, older), *([self._key] if self._key else []))}

    @property
    def key_id(self) -> str | None:
        """Eight hex digits that tell keys apart and give nothing away."""
        return _id_of(self._key) if self._key is not None else None

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Of all keys whose values can be read."""
        return tuple(self._keys)

    def is_current(self, sealed: str) -> bool:
        """Whether it is under the key that seals now."""
        return self._key is not None and sealed.startswith(f"v1.{self.key_id}.")

    def seal(self, plain: str, *, context: str) -> str:
        if self._key is None:
            return "plain." + base64.urlsafe_b64encode(plain.encode()).decode()
        nonce = os.urandom(_NONCE_BYTES)
        sealed = _cipher(self._key).encrypt(nonce, plain.encode(), context.encode())
        return f"v1.{self.key_id}." + base64.urlsafe_b64encode(nonce + sealed).decode()

    def open(self, sealed: str, *, context: str) -> str:
        """Raises Unreadable."""
        try:
            if sealed.startswith("plain."):
                return base64.urlsafe_b64decode(sealed.removeprefix("plain.")).decode()
            version, key_id, text = sealed.split(".")
            if version != "v1":
                raise Unreadable("it was written by a newer version")
            if (key := self._keys.get(key_id)) is None:
                raise Unreadable(
                    f"it is encrypted under the key {key_id}; ENCRYPTION_KEY is {self.key_id or 'not set'}"
                )
            data = base64.urlsafe_b64decode(text)
        except (ValueError, binascii.Error):
            raise Unreadable("what is stored is no sealed value") from None
        from cryptography.exceptions import InvalidTag

        try:
            plain = _cipher(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], context.encode())
        except InvalidTag:
            raise Unreadable("what is stored was changed, or belongs to another row") from None
        return plain.decode()


def context_of(purpose: str, organization_id: int, row_id: UUID) -> str:
    """What a sealed value is bound to: columns that `agentflow rotate-key` knows have this form."""
    return f"{purpose}:{organization_id}:{row_id}"


def _derived(key: bytes) -> bytes:
    return hmac.digest(key, _PURPOSE, hashlib.sha256)


def _id_of(derived: bytes) -> str:
    return hashlib.sha256(b"id:" + derived).hexdigest()[:8]


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # some MB: only where something is sealed

    return AESGCM(key)
