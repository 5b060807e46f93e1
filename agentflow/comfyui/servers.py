"""The servers that COMFYUI_URL names: `http://host:8188, https://user:password@other/comfy?pool=video&slots=2`."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

DEFAULT_POOL: Final = "default"
POOL: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,49}")
MOST_SLOTS: Final = 16


@dataclass(frozen=True, slots=True)
class Server:
    """`name` is its address without credentials; `slots` are the renders that it is given at once."""

    name: str
    pool: str = DEFAULT_POOL
    slots: int = 1
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def socket_url(self, client_id: str) -> str:
        return f"{self.name.replace('http', 'ws', 1)}/ws?clientId={client_id}"


def parse(text: str) -> tuple[Server, ...]:
    """Raises ValueError with what is wrong; it repeats no credentials."""
    servers = tuple(_server(part.strip()) for part in text.split(",") if part.strip())
    names = [server.name for server in servers]
    if len(set(names)) < len(names):
        raise ValueError(f"names a server twice: {next(name for name in names if names.count(name) > 1)}")
    return servers


def _server(text: str) -> Server:
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        raise ValueError("is not a list of URLs; each looks like http://host:8188") from None
    if url.scheme not in ("http", "https") or not host:
        raise ValueError("is a list of URLs that begin with http:// or https://")
    options = dict(parse_qsl(url.query, keep_blank_values=True))
    pool, slots = options.pop("pool", DEFAULT_POOL), options.pop("slots", "1")
    if options or url.fragment:
        raise ValueError("takes the options ?pool=NAME and &slots=NUMBER, and no others")
    if not POOL.fullmatch(pool):
        raise ValueError("pool= is a short name of small letters, digits, - and _")
    if not slots.isdecimal() or not 1 <= int(slots) <= MOST_SLOTS:
        raise ValueError(f"slots= is a number from 1 to {MOST_SLOTS}")
    where = f"[{host}]" if ":" in host else host
    name = f"{url.scheme}://{where}{f':{port}' if port else ''}{url.path.rstrip('/')}"
    headers: tuple[tuple[str, str], ...] = ()
    if url.username is not None:
        pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
        headers = (("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}"),)
    return Server(name, pool, int(slots), headers)
