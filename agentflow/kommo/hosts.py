"""Which addresses are Kommo's. An account's host comes from whoever connects it, and from redirects that anyone can forge."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

DOMAINS: Final = ("kommo.com", "amocrm.ru", "amocrm.com")
_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST: Final = re.compile(rf"(?:{_LABEL}\.)+(?:{'|'.join(re.escape(domain) for domain in DOMAINS)})")
#: `www` serves people: Kommo asks that no program calls it.
_REFUSED: Final = frozenset(f"www.{domain}" for domain in DOMAINS)


class NotKommo(ValueError):
    """The host belongs to somebody else."""


def base_url(named: str, *, allow: Collection[str] = ()) -> str:
    """`example.kommo.com`, with or without https://, as the address to call. Raises NotKommo.

    `allow` (setting FETCH_ALLOW) has `host:port` entries that are called without TLS, such as a test server.
    """
    host = named.strip().lower()
    if "://" in host:
        try:
            parts = urlsplit(host)
        except ValueError:
            raise NotKommo("is not a host") from None
        if parts.path.strip("/") or parts.query or parts.fragment or parts.username:
            raise NotKommo("must be the account's host alone, such as example.kommo.com")
        host = parts.netloc
    if host in allow:
        return f"http://{host}"
    if not _HOST.fullmatch(host) or host in _REFUSED:
        raise NotKommo("must be the account's host at Kommo, such as example.kommo.com")
    return f"https://{host}"
