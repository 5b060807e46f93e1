"""The address that a request came from, through proxies that are believed and others that are not."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from flask import Request

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_WITH_PORT = re.compile(r"\[(?P<v6>[0-9a-fA-F:.]+)\](?::\d+)?|(?P<v4>[0-9.]+):\d+")


class Proxies:
    """Setting TRUSTED_PROXIES: one number, or addresses and networks."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self._hops = int(trusted[0]) if len(trusted) == 1 and trusted[0].isdecimal() else None
        self._networks = (
            [] if self._hops is not None else [ipaddress.ip_network(each, strict=False) for each in trusted]
        )

    def client_of(self, request: Request) -> str:
        """The address nearest to us that is none of our proxies': what stands left of it anybody could have written.

        An IPv6 address as its /64, which is what one customer of a provider has.
        """
        chain = [part.strip() for part in request.headers.get("X-Forwarded-For", "").split(",")]
        chain = [*(part for part in chain if part), request.remote_addr or ""]
        found: Address | None = None
        for hop, text in enumerate(reversed(chain)):
            if hop == 0 and not text and (self._hops or self._networks):
                continue  # a proxy on this machine, through a socket that has no address
            address = _address(text)
            if address is None:
                break  # whatever wrote this is the last that can be told
            found = address
            if not self._trusts(address, hop):
                break
        if found is None:
            return "unknown"
        if isinstance(found, ipaddress.IPv6Address):
            return str(ipaddress.ip_network((found, 64), strict=False))
        return str(found)

    def _trusts(self, address: Address, hop: int) -> bool:
        if self._hops is not None:
            return hop < self._hops
        return any(address in network for network in self._networks)


def _address(text: str) -> Address | None:
    if match := _WITH_PORT.fullmatch(text):
        text = match.group("v6") or match.group("v4")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
