"""Which addresses are public, and so may be gone to."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from agentflow.errors import Permanent

# https://www.iana.org/assignments/iana-ipv4-special-registry, whole and not by Python's `is_global`, whose meaning
# has changed within 3.11; and Azure's 168.63.129.16, a metadata service on a public address.
REFUSED_V4 = [
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
    )
]
# IPv6 the other way round: only the allocated unicast block, less what is special in it
# (https://www.iana.org/assignments/iana-ipv6-special-registry): protocol assignments with Teredo, documentation, 6to4.
# Mapped and compatible IPv4, unique-local, link- and site-local and multicast lie outside.
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6 = [
    ipaddress.IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
]
# NAT64 (RFC 6052) is how hosts without IPv4 reach it: allowed where the IPv4 address inside is.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class FetchRefused(Permanent):
    """We do not go there, whatever would answer."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="url_refused")


class Guard:
    """Which addresses a user's URL may lead to: public ones, and what the operator permits by `host:port`."""

    def __init__(self, *, allow: Collection[str] = ()) -> None:
        """Raises `ValueError` for an entry of `allow` (setting FETCH_ALLOW) that is not `host:port`."""
        self._allow = {_allowed(entry) for entry in allow}

    def permits(self, host: str, port: int) -> bool:
        return (host, port) in self._allow

    def check_address(self, host: str, port: int, address: str) -> None:
        """Raises `FetchRefused` where `host` leads to an `address` that is not public."""
        if not self.permits(host, port) and not is_public(ipaddress.ip_address(address)):
            # The address is not named: it would tell a stranger about our network.
            raise FetchRefused(f"{host} is not a public address")


def _allowed(entry: str) -> tuple[str, int]:
    host, _, port = entry.strip().lower().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = ipaddress.IPv6Address(host[1:-1]).compressed
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{entry!r} is not host:port")
    return host, int(port)


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in REFUSED_V4)
    if address.scope_id is not None:
        return False
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    return address in _UNICAST_V6 and not any(address in network for network in _REFUSED_V6)
