"""Short-lived links to stored files, for callers who hold no key: a browser, a message, another service.

The standard library's HMAC, not itsdangerous: its tokens carry what they sign, and here the key stands in the path.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from base64 import urlsafe_b64encode
from urllib.parse import quote, urlencode

from agentflow.storage import Storage

PATH = "/artefacts/"
LIFETIME_S = 900

# Signed along, so that a signature made for another purpose or by an older rule is none here.
_VERSION = "agentflow-artefact-1"
_EXPIRES = re.compile(r"[1-9][0-9]{0,11}")


class LinkInvalid(Exception):
    """The link was not made by us, or was changed."""


class LinkExpired(Exception):
    """The link was made by us and its time is over: the caller may ask for a new one."""


class Links:
    """`secret` is the same in every process that serves the links; changing it ends all of them."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < 16:
            raise ValueError("a secret of fewer than 16 bytes can be guessed")
        self._secret = secret

    def sign(
        self, key: str, *, lifetime_s: int = LIFETIME_S, filename: str | None = None, now: float | None = None
    ) -> str:
        """The path and query of a link to `key`; with `filename` the browser saves it under that name."""
        Storage.check_key(key)
        expires = str(int(time.time() if now is None else now) + lifetime_s)
        query = {"expires": expires, "signature": self._signature(key, expires, filename)}
        if filename is not None:
            query["filename"] = filename
        return f"{PATH}{quote(key)}?{urlencode(query)}"

    def verify(
        self, key: str, expires: str, signature: str, *, filename: str | None = None, now: float | None = None
    ) -> None:
        """Raises `LinkInvalid` or, only for a link that is ours, `LinkExpired`. `key` as decoded from the path."""
        try:
            Storage.check_key(key)
            expected = self._signature(key, expires, filename)
            genuine = hmac.compare_digest(expected.encode(), signature.encode())
        except ValueError:  # no key, or text that has no UTF-8 form
            genuine = False
        if not genuine or not _EXPIRES.fullmatch(expires):
            raise LinkInvalid("this link is not valid")
        if (time.time() if now is None else now) >= int(expires):
            raise LinkExpired("this link has expired")

    def signature_of(self, purpose: str, text: str) -> str:
        """For other texts that come back to us through strangers; `purpose` keeps them apart."""
        message = f"agentflow-{purpose}-1:{text}".encode()
        return urlsafe_b64encode(hmac.digest(self._secret, message, hashlib.sha256)).rstrip(b"=").decode()

    def is_signature_of(self, purpose: str, text: str, signature: str) -> bool:
        return hmac.compare_digest(self.signature_of(purpose, text).encode(), signature.encode(errors="surrogatepass"))

    def _signature(self, key: str, expires: str, filename: str | None) -> str:
        # Each part with its length: no two different triples make the same message.
        parts = [_VERSION, expires, key, *([] if filename is None else [filename])]
        message = b"".join(b"%d:%b" % (len(part), part) for part in (each.encode() for each in parts))
        digest = hmac.digest(self._secret, message, hashlib.sha256)
        return urlsafe_b64encode(digest).rstrip(b"=").decode()
