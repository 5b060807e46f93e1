"""A URL's spelling: one that parsers could disagree about is refused."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

import httpcore2

from agentflow.errors import Permanent
from agentflow.fetch.guard import FetchRefused, Guard

MAX_URL_CHARS = 4096

_NETLOC = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:%]+)(:[0-9]{1,5})?")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """A URL that passed the check of its spelling, and its parts as they will be used."""

    scheme: str
    host: str  # lower case, without brackets
    port: int
    target: str  # path and query, as sent

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(self.scheme) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.target}"

    @property
    def address(self) -> httpcore2.URL:
        return httpcore2.URL(
            scheme=self.scheme.encode(), host=self.host.encode(), port=self.port, target=self.target.encode()
        )


def parse(url: str, guard: Guard) -> Place:
    if len(url) > MAX_URL_CHARS:
        raise FetchRefused(f"the URL is longer than {MAX_URL_CHARS} characters")
    # Parsers disagree about what these mean, and Python's own drops some of them without a word.
    if not url.isprintable() or " " in url or "\\" in url:
        raise FetchRefused("the URL contains spaces, backslashes or control characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise FetchRefused("the URL cannot be understood") from None
    if parts.scheme not in ("http", "https"):
        raise FetchRefused("only http:// and https:// URLs are fetched")
    if "@" in parts.netloc:
        raise FetchRefused("a URL with a user name or password is not fetched")
    if not parts.netloc.isascii():  # and not `host`, which has been lowered: U+212A becomes a plain k
        raise FetchRefused("the host in the URL must be written in ASCII (xn--… for names with other letters)")
    if not _NETLOC.fullmatch(parts.netloc):
        raise FetchRefused("the host in the URL is not a valid name")
    host = _one_spelling(host, literal=parts.netloc.startswith("["))
    port = _default_port(parts.scheme) if port is None else port
    if host.rpartition(".")[2] == "localhost" and not guard.permits(host, port):
        raise FetchRefused(f"{host} is not a public address")
    # Below 1024 live mail, shells and file services that can be made to take a request line for a command.
    if port not in (80, 443) and port < 1024 and not guard.permits(host, port):
        raise FetchRefused(f"port {port} is not fetched from")
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._[]") + (
        "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]{}|^`\"<>") if parts.query else ""
    )
    return Place(parts.scheme, host, port, target)


def _one_spelling(host: str, *, literal: bool) -> str:
    """Return `host` if it cannot mean another host to the resolver, the server or a reader; else refuse it."""
    if literal:
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError:
            raise FetchRefused("the IPv6 address in the URL cannot be understood") from None
        if address.ipv4_mapped is not None:
            raise FetchRefused("an IPv6 address in the URL must not stand for an IPv4 address")
        return address.compressed
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise FetchRefused("the host in the URL is not a valid name")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            ipaddress.IPv4Address(host)  # takes four decimal numbers, and nothing else that resolvers take
        except ValueError:
            raise FetchRefused("an IPv4 address in the URL must be four decimal numbers") from None
    return host


def redirected(place: Place, answer: dict[str, str], guard: Guard) -> Place:
    location = answer.get("location")
    if not location:
        raise Permanent(f"{place.netloc} redirects to nowhere", code="url_rejected")
    location = location.replace(" ", "%20")
    if not location.isprintable():  # urljoin would hide from parse what is to be refused
        raise FetchRefused(f"{place.netloc} redirects to a URL that cannot be understood")
    try:
        absolute = urljoin(place.url, location)
    except ValueError:
        raise FetchRefused(f"{place.netloc} redirects to a URL that cannot be understood") from None
    there = parse(absolute, guard)
    if place.scheme == "https" and there.scheme != "https":
        raise FetchRefused(f"{place.netloc} redirects from https to http")
    return there


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80
