"""Download of a URL that a user gave us, without becoming the user's way into our network (SSRF).

Built on httpcore2, the engine of httpx2, and not on its client: only there may the network backend be ours. Names are
resolved once, inside the connect, and the address that passed the check is the one connected to; and every wait of the
connection, for name, connect, handshake, head and body, counts against one deadline. The client would also log each URL
with its query, follow the environment's proxies and decode bodies.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpcore2

from agentflow.errors import Permanent, Transient

MAX_REDIRECTS = 5
MAX_URL_CHARS = 4096
MAX_RETRY_AFTER_S = 3600.0
POST_ANSWER_BYTES = 2048
MAX_ADDRESSES = 4  # of one name, tried one after the other
CHECK_TIMEOUT_S = 5.0
# How long a cancelled download may go on waiting for the network.
STOP_CHECK_S = 1.0

# At DEBUG httpcore2 logs the headers of answers, and a Location holds a query string.
logging.getLogger("httpcore2").setLevel(logging.INFO)

# https://www.iana.org/assignments/iana-ipv4-special-registry, whole and not by Python's `is_global`, whose meaning
# has changed within 3.11; and Azure's 168.63.129.16, a metadata service on a public address.
_REFUSED_V4 = [
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

_NETLOC = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:%]+)(:[0-9]{1,5})?")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)
_MEDIA_TYPE = re.compile(r"[a-z0-9!#$&^_.+-]+/[a-z0-9!#$&^_.+-]+")


class FetchRefused(Permanent):
    """We do not go there, whatever would answer."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="url_refused")


@dataclass(frozen=True)
class Fetched:
    url: str  # after redirects; may hold a secret in its query, like the one given
    size: int
    content_type: str | None  # `video/mp4`, without parameters
    filename: str | None  # as named by the server or the URL, safe as a name but not unique


@dataclass(frozen=True)
class Posted:
    """An answer to a POST: its status, the seconds that it asked to be left alone for, and the beginning of its body."""

    status: int
    retry_after_s: float | None
    body: bytes

    def text(self, most: int) -> str:
        """The body as text that can be stored."""
        return self.body.decode(errors="replace").replace("\x00", "\ufffd")[:most]


class Guard:
    """Which addresses a user's URL may lead to: public ones, and what the operator permits by `host:port`."""

    def __init__(self, *, allow: Collection[str] = ()) -> None:
        """Raises `ValueError` for an entry of `allow` (setting FETCH_ALLOW) that is not `host:port`."""
        self._allow = {_allowed(entry) for entry in allow}

    def permits(self, host: str, port: int) -> bool:
        return (host, port) in self._allow

    def check_address(self, host: str, port: int, address: str) -> None:
        """Raises `FetchRefused` where `host` leads to an `address` that is not public."""
        if not self.permits(host, port) and not _is_public(ipaddress.ip_address(address)):
            # The address is not named: it would tell a stranger about our network.
            raise FetchRefused(f"{host} is not a public address")


def check_url(url: str, guard: Guard) -> None:
    """Raises `FetchRefused` for what `download` would refuse at once. For the web layer; `download` checks again.

    A name that cannot be resolved now passes: the job tries again later, and says so.
    """
    place = _parse(url, guard)
    try:
        addresses = _resolve(place.host, place.port, CHECK_TIMEOUT_S)
    except OSError:
        return
    for address in addresses:
        guard.check_address(place.host, place.port, address)


def download(
    url: str,
    write: Callable[[bytes], object],
    *,
    guard: Guard,
    max_bytes: int,
    timeout_s: float,
    connect_timeout_s: float = 10,
    read_timeout_s: float = 30,
    user_agent: str,
    report: Callable[[int, int | None], None] | None = None,
    should_stop: Callable[[], None] | None = None,
) -> Fetched:
    """GET `url` and give its body to `write` piece by piece; returns what it was.

    `report` gets bytes so far and the total where it is known; `should_stop` is called at least every second while the
    answer is read, and ends the download by raising. After an error `write` may have got a part of the body.
    Raises `FetchRefused`; `Permanent` with code url_not_found, url_forbidden, url_rejected, url_tls or too_large;
    `Transient` with code url_timeout, url_unreachable, url_cut or url_busy.
    """
    deadline = _Deadline(timeout_s, should_stop or (lambda: None))
    timeouts = {"connect": connect_timeout_s, "read": read_timeout_s, "write": read_timeout_s, "pool": None}
    place = _parse(url, guard)
    for _ in range(MAX_REDIRECTS + 1):
        backend = _GuardedBackend(guard, deadline, place.netloc)
        with (
            _errors(place, deadline),
            httpcore2.ConnectionPool(network_backend=backend, max_keepalive_connections=0) as pool,
            pool.stream(
                "GET", place.address, headers=_question(place, user_agent), extensions={"timeout": timeouts}
            ) as response,
        ):
            answer = _headers(response.headers)
            if response.status not in (301, 302, 303, 307, 308):
                size, total = 0, _accepted(place, response.status, answer, max_bytes)
                for piece in response.iter_stream():
                    size += len(piece)
                    if size > max_bytes:
                        raise _too_large(place, max_bytes)
                    write(piece)
                    if report is not None:
                        report(size, total)
                return Fetched(place.url, size, _content_type(answer), _filename(answer, place.url))
            place = _redirected(place, answer, guard)
    raise Permanent(f"{place.netloc} redirects more than {MAX_REDIRECTS} times", code="url_rejected")


def post(
    url: str,
    body: bytes,
    *,
    guard: Guard,
    timeout_s: float,
    user_agent: str,
    headers: Mapping[str, str],
    connect_timeout_s: float = 10,
    should_stop: Callable[[], None] | None = None,
) -> Posted:
    """POST `body` to a user's `url`; of the answer at most POST_ANSWER_BYTES are read, redirects are not followed.

    `should_stop` is called before each wait, and between the connect and the sending; it stops the call by raising.

    Raises `FetchRefused`; `Permanent` with code url_tls; `Transient` with code url_timeout, url_unreachable or url_cut.
    """
    deadline = _Deadline(timeout_s, should_stop or (lambda: None))
    timeouts = {"connect": connect_timeout_s, "read": timeout_s, "write": timeout_s, "pool": None}
    place = _parse(url, guard)
    backend = _GuardedBackend(guard, deadline, place.netloc)
    question = [*_question(place, user_agent), ("Content-Length", str(len(body))), *headers.items()]
    with (
        _errors(place, deadline),
        httpcore2.ConnectionPool(network_backend=backend, max_keepalive_connections=0) as pool,
        pool.stream(
            "POST", place.address, headers=question, content=body, extensions={"timeout": timeouts}
        ) as response,
    ):
        answer = _headers(response.headers)
        return Posted(int(response.status), _retry_after(answer.get("retry-after")), _beginning(response))


def _beginning(response: Any) -> bytes:
    """What comes of the body, for the log: a receiver that trickles it, or cuts it, has answered all the same."""
    body = b""
    try:
        for piece in response.iter_stream():
            body += piece
            if len(body) >= POST_ANSWER_BYTES:
                break
    except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
        return body[:POST_ANSWER_BYTES]
    return body[:POST_ANSWER_BYTES]


def _question(place: _Place, user_agent: str) -> list[tuple[str, str]]:
    return [
        ("Host", place.netloc),
        ("User-Agent", user_agent),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]


# The URL


@dataclass(frozen=True)
class _Place:
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


def _parse(url: str, guard: Guard) -> _Place:
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
    return _Place(parts.scheme, host, port, target)


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


def _redirected(place: _Place, answer: dict[str, str], guard: Guard) -> _Place:
    location = answer.get("location")
    if not location:
        raise Permanent(f"{place.netloc} redirects to nowhere", code="url_rejected")
    location = location.replace(" ", "%20")
    if not location.isprintable():  # urljoin would hide from _parse what is to be refused
        raise FetchRefused(f"{place.netloc} redirects to a URL that cannot be understood")
    try:
        absolute = urljoin(place.url, location)
    except ValueError:
        raise FetchRefused(f"{place.netloc} redirects to a URL that cannot be understood") from None
    there = _parse(absolute, guard)
    if place.scheme == "https" and there.scheme != "https":
        raise FetchRefused(f"{place.netloc} redirects from https to http")
    return there


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _allowed(entry: str) -> tuple[str, int]:
    host, _, port = entry.strip().lower().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = ipaddress.IPv6Address(host[1:-1]).compressed
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{entry!r} is not host:port")
    return host, int(port)


# The connection


class _Deadline:
    def __init__(self, timeout_s: float, should_stop: Callable[[], None]) -> None:
        self.timeout_s = timeout_s
        self.should_stop = should_stop
        self._ends = time.monotonic() + timeout_s

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._ends

    def cut(self, timeout: float | None) -> float:
        """`timeout` or what is left, whichever is shorter. Raises httpcore2's error when nothing is left."""
        self.should_stop()
        left = self._ends - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("deadline")
        return left if timeout is None else min(timeout, left)


class _GuardedBackend(httpcore2.NetworkBackend):
    """Connects to an address that it has checked itself; whoever answers the next look-up of that name has no say."""

    def __init__(self, guard: Guard, deadline: _Deadline, netloc: str) -> None:
        self._guard = guard
        self._deadline = deadline
        self._netloc = netloc
        self._backend = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        try:
            addresses = _resolve(host, port, self._deadline.cut(timeout))
        except TimeoutError as err:
            raise httpcore2.ConnectTimeout("name look-up") from err
        except OSError as err:
            raise Transient(f"the host name of {self._netloc} cannot be found", code="url_unreachable") from err
        # All before the first connect: a name with one foot inside is not one that we go to.
        for address in addresses:
            self._guard.check_address(host, port, address)
        error: Exception | None = None
        for address in addresses[:MAX_ADDRESSES]:
            try:
                stream = self._backend.connect_tcp(
                    address, port, timeout=self._deadline.cut(timeout), socket_options=socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as err:
                error = err
            else:
                return _Stream(stream, self._deadline, self._netloc)
        raise error or httpcore2.ConnectError("no address")


class _Stream(httpcore2.NetworkStream):
    """A connection whose every wait counts against the deadline and can be stopped."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: _Deadline, netloc: str) -> None:
        self._stream = stream
        self._deadline = deadline
        self._netloc = netloc

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        ends = time.monotonic() + (math.inf if timeout is None else timeout)
        while True:
            wait = max(0.001, min(STOP_CHECK_S, ends - time.monotonic()))
            try:
                return self._stream.read(max_bytes, self._deadline.cut(wait))
            except httpcore2.ReadTimeout:
                if self._deadline.is_over or time.monotonic() >= ends:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.cut(timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        try:
            secure = self._stream.start_tls(ssl_context, server_hostname, self._deadline.cut(timeout))
        except httpcore2.ConnectError as err:
            cause = err.__cause__  # looked at here, because the pool takes it away
            if isinstance(cause, ssl.SSLCertVerificationError):
                why = f"its certificate is not valid ({cause.verify_message})"
            elif isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
                why = cause.reason or "refused"
            else:
                raise  # the connection broke, which may pass
            raise Permanent(f"no TLS connection with {self._netloc}: {why}", code="url_tls") from err
        return _Stream(secure, self._deadline, self._netloc)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _resolve(host: str, port: int, timeout: float) -> list[str]:
    """The addresses of `host` in the order to try them. Raises `OSError`, of which `TimeoutError` is one.

    getaddrinfo has no time limit of its own (usual resolvers: up to 30 s), so it runs in a thread that may be left.
    """
    found: list[str] = []
    error: list[OSError] = []

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(answer[4][0]) for answer in answers))
        except UnicodeError as err:  # a label that the idna codec does not take
            error.append(OSError(str(err)))
        except OSError as err:
            error.append(err)

    thread = threading.Thread(target=look_up, name="fetch-resolve", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError
    if error:
        raise error[0]
    return found


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_V4)
    if address.scope_id is not None:
        return False
    if address in _NAT64:
        return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    return address in _UNICAST_V6 and not any(address in network for network in _REFUSED_V6)


# The answer


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): _text(value) for name, value in raw}


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _accepted(place: _Place, status: int, answer: dict[str, str], max_bytes: int) -> int | None:
    """The size of the file that follows, where it is told. Raises what the answer means when no usable file follows."""
    if status not in (200, 203):
        raise _refusal(place, status, answer)
    if answer.get("content-encoding", "").lower() not in ("", "identity"):
        raise Permanent(f"{place.netloc} sends the file only compressed", code="url_rejected")
    total = int(answer["content-length"]) if "content-length" in answer else None
    if total is not None and total > max_bytes:
        raise _too_large(place, max_bytes)
    return total


def _refusal(place: _Place, status: int, answer: dict[str, str]) -> Permanent | Transient:
    if status in (408, 425, 429) or status >= 500:
        return Transient(
            f"{place.netloc} answered {status}", code="url_busy", retry_after_s=_retry_after(answer.get("retry-after"))
        )
    if status in (404, 410):
        return Permanent(f"there is no such file at {place.netloc} ({status})", code="url_not_found")
    if status in (401, 403):
        return Permanent(f"{place.netloc} does not let us have the file ({status})", code="url_forbidden")
    return Permanent(f"{place.netloc} answered {status} instead of the file", code="url_rejected")


def _retry_after(value: str | None) -> float | None:
    """Seconds or a date (RFC 9110, 10.2.3); None for what is neither."""
    if not value:
        return None
    if value.isdecimal() and value.isascii():
        return min(float(value[:12]), MAX_RETRY_AFTER_S)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _content_type(answer: dict[str, str]) -> str | None:
    kind = answer.get("content-type", "").partition(";")[0].strip().lower()
    return kind if _MEDIA_TYPE.fullmatch(kind) else None


def _filename(answer: dict[str, str], url: str) -> str | None:
    header = Message()
    # The header may hold anything: the parser of the standard library takes it all, and knows RFC 5987's filename*.
    header["Content-Disposition"] = "".join(c for c in answer.get("content-disposition", "") if c.isprintable())
    try:
        named = header.get_filename()
    except (ValueError, LookupError):  # an encoding that is none
        named = None
    for name in (named, unquote(urlsplit(url).path)):
        last = re.split(r"[/\\]", name or "")[-1]
        safe = "".join(c for c in last if c.isprintable()).strip(". ")
        if safe:
            return safe.encode()[-150:].decode(errors="ignore").strip(". ")  # the end, for the sake of the suffix
    return None


def _too_large(place: _Place, max_bytes: int) -> Permanent:
    return Permanent(f"the file at {place.netloc} is larger than {max_bytes} bytes", code="too_large")


@contextmanager
def _errors(place: _Place, deadline: _Deadline) -> Iterator[None]:
    """What the connection raises, in the words of a job."""
    try:
        yield
    except httpcore2.TimeoutException as err:
        if deadline.is_over:
            text = f"the download from {place.netloc} took longer than {deadline.timeout_s:g} s"
        elif isinstance(err, httpcore2.ConnectTimeout):
            text = f"{place.netloc} could not be connected to in time"
        else:
            text = f"{place.netloc} stopped sending"
        raise Transient(text, code="url_timeout") from err
    except httpcore2.ConnectError as err:
        raise Transient(f"{place.netloc} cannot be reached", code="url_unreachable") from err
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as err:
        raise Transient(f"the connection to {place.netloc} broke off", code="url_cut") from err
