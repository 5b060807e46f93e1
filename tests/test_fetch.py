from __future__ import annotations

import gzip
import ipaddress
import itertools
import logging
import os
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from agentflow.errors import Permanent, Transient
from agentflow.fetch import Fetched, FetchRefused, Guard, check_url, download
from agentflow.fetch.guard import REFUSED_V4, is_public

from .http_server import Reply, Server, serve

PUBLIC = "8.8.8.8"  # never connected to: an answer of the fake resolver


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """A resolver: for each name the answers to give one after the other; the last stays. Other names do not exist."""
    answers: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if host not in answers:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None
            given = answers[host]
            addresses = given.pop(0) if len(given) > 1 else given[0]
            return [found for address in addresses for found in real(address, port, *args, **options)]
        return list(real(host, port, *args, **options))

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


def get(url: str, *, allow: tuple[str, ...] = (), **options: Any) -> tuple[bytes, Fetched]:
    pieces: list[bytes] = []
    given: dict[str, Any] = {"max_bytes": 10_000_000, "timeout_s": 10, "user_agent": "AgentFlow/test", **options}
    fetched = download(url, pieces.append, guard=Guard(allow=allow), **given)
    return b"".join(pieces), fetched


# What comes back


def test_a_file_is_downloaded_and_described(server: Server) -> None:
    data = os.urandom(300_000)
    server.on("/clips/one.mp4", Reply(body=data, headers={"Content-Type": "Video/MP4; charset=x"}))
    reports: list[tuple[int, int | None]] = []

    got, fetched = get(
        server.url("/clips/one.mp4?token=secret#part"),
        allow=(server.netloc,),
        report=lambda size, total: reports.append((size, total)),
    )

    assert got == data
    assert fetched == Fetched(server.url("/clips/one.mp4?token=secret"), 300_000, "video/mp4", "one.mp4")
    assert reports[-1] == (300_000, 300_000)
    [request] = server.requests
    assert request.query == {"token": "secret"}
    assert request.headers["user-agent"] == "AgentFlow/test"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["host"] == server.netloc


def test_a_body_of_unknown_length_is_read_to_its_end(server: Server) -> None:
    server.on("/", Reply(body=[b"a" * 1000] * 5))
    reports: list[tuple[int, int | None]] = []

    got, _ = get(server.url(), allow=(server.netloc,), report=lambda size, total: reports.append((size, total)))

    assert got == b"a" * 5000
    assert reports[-1] == (5000, None)


@pytest.mark.parametrize(
    ("disposition", "path", "name"),
    [
        ('attachment; filename="clip.mp4"', "/x", "clip.mp4"),
        ("attachment; filename*=UTF-8''%C3%BCber.mp4", "/x", "über.mp4"),
        ('attachment; filename="über.mp4"', "/x", "über.mp4"),
        ('attachment; filename="../../etc/passwd"', "/x", "passwd"),
        ('attachment; filename="..\\\\..\\\\boot.ini"', "/x", "boot.ini"),
        ('attachment; filename=".."', "/a/b.mp4", "b.mp4"),
        ("attachment; filename*=nonsense''x", "/a/b.mp4", None),
        ("attachment", "/a/b%2Fc%20d.mp4", "c d.mp4"),
        ("", "/", None),
        ("", "/" + "x" * 300 + ".mp4", "x" * 146 + ".mp4"),
    ],
)
def test_the_name_of_the_file_is_safe(server: Server, disposition: str, path: str, name: str | None) -> None:
    # http.server writes latin-1: this is what UTF-8 on the wire looks like to it.
    raw = disposition.encode().decode("latin-1")
    server.on(path, Reply(headers={"Content-Disposition": raw} if raw else {}))

    _, fetched = get(server.url(path), allow=(server.netloc,))

    assert name is None or fetched.filename == name
    assert fetched.filename is None or not re.search(r"[/\\\0]", fetched.filename)


def test_a_path_with_other_letters_is_sent_encoded(server: Server) -> None:
    server.on("/", Reply(body=b"1"))

    get(server.url("/über/a%2Fb?q=ä&r=%20"), allow=(server.netloc,))

    assert server.requests[0].path == "/%C3%BCber/a%2Fb"
    assert server.requests[0].query == {"q": "ä", "r": " "}


# Where we do not go


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "/x", "//example.com/x", "ftp://example.com/", "file:///etc/passwd", "gopher://example.com/"),
        *("javascript:alert(1)", "http:", "http://", "http:///x", "https:example.com", "http://?x", "http://:80/"),
        *("http://user@example.com/", "http://user:pw@example.com/", "http://@example.com/", "http://a@b@example.com/"),
        *("http://example.com\\@127.0.0.1/", "http://exam ple.com/", "http://example.com/a b", " http://example.com/"),
        *("http://example.com/\n", "http://exam\tple.com/", "http://example.com/\0", "http://example.com/\u2028"),
        *("http://0x7f.1/", "http://0x7f000001/", "http://2130706433/", "http://127.1/", "http://0177.0.0.1/"),
        *(
            "http://127.0.0.01/",
            "http://0/",
            "http://1.2.3/",
            "http://example.0x1/",
            "http://1.2.3.4.5/",
            "http://256.1.1.1/",
        ),
        *("http://localhost/", "http://LOCALHOST/", "http://localhost./", "http://a.localhost/", "http://127.0.0.1./"),
        *(
            "http://example.com./",
            "http://example..com/",
            "http://.example.com/",
            "http://-a.com/",
            "http://a_%62.com/",
        ),
        *(
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:8.8.8.8]/",
            "http://[::ffff:7f00:1]/",
            "http://[fe80::1%25eth0]/",
        ),
        *("http://[::1/", "http://[::1]x/", "http://[v1.x]/", "http://[127.0.0.1]/", "http://::1/", "http://[]/"),
        *("http://１２７.0.0.1/", "http://ⓛocalhost/", "http://bücher.example/", "http://example。com/"),
        *("http://example.com:/", "http://example.com:x/", "http://example.com:0/", "http://example.com:65536/"),
        *("http://example.com:22/", "http://example.com:25/", "http://example.com:-80/", "http://example.com:８０/"),
        *("http://" + "a" * 64 + ".com/", "http://" + "a." * 127 + "com/", "http://example.com/" + "x" * 4096),
    ],
)
def test_an_odd_url_is_refused_without_looking_it_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("looked up"))

    with pytest.raises(FetchRefused) as failure:
        check_url(url, Guard())

    assert failure.value.code == "url_refused"
    with pytest.raises(FetchRefused):
        get(url)


@pytest.mark.parametrize("host", ["bücher.example", "\u212aiosk.example", "１２７.0.0.1"])
def test_a_host_with_other_letters_is_refused_with_advice(host: str) -> None:
    with pytest.raises(FetchRefused, match="xn--"):
        check_url(f"http://{host}/", Guard())


INSIDE = """
    127.0.0.1 127.255.255.254 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1
    100.100.100.200 100.127.255.255 0.0.0.0 0.1.2.3 192.0.0.192 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1
    224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 168.63.129.16 :: ::1 ::7f00:1 fe80::1 fec0::1 fc00::1
    fdaa::3 fd00:ec2::254 ff02::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe
    64:ff9b:1::808:808 2002:7f00:1:: 2002:0808:0808::1 2001::1 100::1 3fff::1 5f00::1
"""
OUTSIDE = """
    8.8.8.8 1.1.1.1 172.15.255.255 172.32.0.1 100.63.255.255 100.128.0.1 169.253.0.1 223.0.0.1 2606:4700::1111
    2001:4860:4860::8888 2a00:1450::1 64:ff9b::808:808
"""


@pytest.mark.parametrize("address", INSIDE.split())
def test_a_name_that_leads_inside_is_refused(names: dict[str, list[list[str]]], address: str) -> None:
    names["media.test"] = [[address]]

    with pytest.raises(FetchRefused, match=r"media\.test") as failure:
        check_url("http://media.test/", Guard())
    assert address not in str(failure.value)
    with pytest.raises(FetchRefused):
        get("http://media.test/")


@pytest.mark.parametrize("address", [address for address in INSIDE.split() if not address.startswith("::ffff:")])
def test_an_inside_address_in_the_url_is_refused(address: str) -> None:
    literal = f"[{address}]" if ":" in address else address

    with pytest.raises(FetchRefused):
        check_url(f"http://{literal}/", Guard())
    with pytest.raises(FetchRefused):
        get(f"http://{literal}/")


@pytest.mark.parametrize("address", OUTSIDE.split())
def test_a_public_address_passes_the_check(names: dict[str, list[list[str]]], address: str) -> None:
    names["media.test"] = [[address]]

    check_url("https://media.test/", Guard())
    check_url(f"https://{f'[{address}]' if ':' in address else address}:8443/", Guard())


def test_a_name_with_one_foot_inside_is_refused_before_any_connection(
    names: dict[str, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names["media.test"] = [[PUBLIC, "10.0.0.1"]]
    monkeypatch.setattr(socket, "create_connection", lambda *args, **options: pytest.fail("connected"))

    with pytest.raises(FetchRefused):
        check_url("http://media.test/", Guard())
    with pytest.raises(FetchRefused):
        get("http://media.test/")


def test_loopback_is_refused_where_a_server_answers(server: Server) -> None:
    server.on("/", Reply(body=b"inside"))

    with pytest.raises(FetchRefused):
        get(server.url())

    assert server.connections == 0


def test_an_ipv6_server_is_refused_unless_it_is_permitted() -> None:
    with serve(host="::1") as server:
        server.on("/", Reply(body=b"six"))

        with pytest.raises(FetchRefused):
            get(server.url())
        assert server.connections == 0
        assert get(f"http://[0:0::1]:{server.port}/", allow=(f"[::1]:{server.port}",))[0] == b"six"
        assert server.requests[0].headers["host"] == f"[::1]:{server.port}"


def test_a_name_that_is_public_when_checked_and_private_when_fetched_is_refused(
    server: Server, names: dict[str, list[list[str]]]
) -> None:
    names["rebind.test"] = [[PUBLIC], ["127.0.0.1"]]
    url = f"http://rebind.test:{server.port}/"

    check_url(url, Guard())
    with pytest.raises(FetchRefused):
        get(url)

    assert server.connections == 0


def test_the_address_that_was_checked_is_the_one_connected_to(names: dict[str, list[list[str]]]) -> None:
    with serve(host="127.0.0.1") as checked:
        checked.on("/", Reply(body=b"checked"))
        names["rebind.test"] = [["127.0.0.1"], ["127.0.0.9"]]

        got, _ = get(f"http://rebind.test:{checked.port}/", allow=(f"rebind.test:{checked.port}",))

        assert got == b"checked"
        assert names["rebind.test"] == [["127.0.0.9"]], "looked up exactly once"
        assert checked.requests[0].headers["host"] == f"rebind.test:{checked.port}"


def test_the_next_address_is_tried_where_the_first_does_not_answer(
    server: Server, names: dict[str, list[list[str]]]
) -> None:
    server.on("/", Reply(body=b"second"))
    names["media.test"] = [["127.0.0.77", "127.0.0.1"]]

    assert get(f"http://media.test:{server.port}/", allow=(f"media.test:{server.port}",))[0] == b"second"


def test_what_is_permitted_is_one_port_of_one_host(server: Server, names: dict[str, list[list[str]]]) -> None:
    names["media.test"] = [["127.0.0.1"]]

    for allow in (f"127.0.0.1:{server.port + 1}", f"media.test:{server.port + 1}", f"other.test:{server.port}"):
        with pytest.raises(FetchRefused):
            get(f"http://media.test:{server.port}/", allow=(allow,))
    with pytest.raises(FetchRefused):
        get(server.url(), allow=(f"media.test:{server.port}",))
    check_url("http://localhost:25/", Guard(allow=["Localhost:25"]))


@pytest.mark.parametrize("entry", ["", "host", "host:", ":80", "host:x", "host:0", "host:65536", "[::x]:80"])
def test_a_wrong_entry_of_the_permitted_is_told(entry: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Guard(allow=[entry])


def test_the_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.on("/", Reply(body=b"direct"))
    with serve() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url())

        assert get(server.url(), allow=(server.netloc,))[0] == b"direct"

        assert proxy.connections == 0


# Redirects


def test_redirects_are_followed_to_the_file(server: Server) -> None:
    server.on("/1", Reply(301, headers={"Location": "/2"}))
    server.on("/2", Reply(302, headers={"Location": server.url("/3?x=1")}))
    server.on("/3", Reply(303, headers={"Location": "4"}))
    server.on("/4", Reply(307, headers={"Location": "//" + server.netloc + "/5"}))
    server.on("/5", Reply(308, headers={"Location": "/ü 6.mp4".encode().decode("latin-1")}))
    server.on("/%C3%BC%206.mp4", Reply(body=b"there"))

    got, fetched = get(server.url("/1"), allow=(server.netloc,))

    assert got == b"there"
    assert fetched.url == server.url("/%C3%BC%206.mp4")
    assert fetched.filename == "ü 6.mp4"


def test_a_sixth_redirect_is_not_followed(server: Server) -> None:
    server.on("/", Reply(302, headers={"Location": "/again"}))

    with pytest.raises(Permanent, match="redirects") as failure:
        get(server.url(), allow=(server.netloc,))

    assert failure.value.code == "url_rejected"
    assert len(server.requests) == 6


def test_a_redirect_inside_is_refused_although_the_first_host_is_permitted(server: Server) -> None:
    with serve() as inside:
        server.on("/", Reply(302, headers={"Location": inside.url("/admin")}))

        with pytest.raises(FetchRefused):
            get(server.url(), allow=(server.netloc,))

        assert inside.connections == 0


@pytest.mark.parametrize(
    "location",
    [
        *("http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "http://localhost/", "http://[::1]/"),
        *("http://2130706433/", "\\\\127.0.0.1\\x", "http://user:pw@example.com/", "http://exam\tple.com/", "http://["),
    ],
)
def test_a_redirect_to_an_odd_place_is_refused(server: Server, location: str) -> None:
    server.on("/", Reply(302, headers={"Location": location}))

    with pytest.raises(FetchRefused):
        get(server.url(), allow=(server.netloc,))


def test_a_redirect_by_a_name_that_leads_inside_is_refused(server: Server, names: dict[str, list[list[str]]]) -> None:
    names["inside.test"] = [["127.0.0.1"]]
    server.on("/", Reply(302, headers={"Location": f"http://inside.test:{server.port}/"}))

    with pytest.raises(FetchRefused, match=r"inside\.test"):
        get(server.url(), allow=(server.netloc,))


def test_a_redirect_to_nowhere_is_permanent(server: Server) -> None:
    server.on("/", Reply(302))

    with pytest.raises(Permanent, match="nowhere"):
        get(server.url(), allow=(server.netloc,))


# Size


def test_a_file_that_says_it_is_too_large_is_not_read(server: Server) -> None:
    server.on("/", Reply(body=[b"x"], length=1001))
    written: list[bytes] = []

    with pytest.raises(Permanent) as failure:
        download(
            server.url(),
            written.append,
            guard=Guard(allow=[server.netloc]),
            max_bytes=1000,
            timeout_s=5,
            user_agent="t",
        )

    assert failure.value.code == "too_large"
    assert written == []


def test_a_file_that_turns_out_too_large_is_cut_off(server: Server) -> None:
    server.on("/", Reply(body=(b"x" * 10_000 for _ in range(1_000_000))))
    written: list[bytes] = []

    with pytest.raises(Permanent) as failure:
        download(
            server.url(),
            written.append,
            guard=Guard(allow=[server.netloc]),
            max_bytes=100_000,
            timeout_s=5,
            user_agent="t",
        )

    assert failure.value.code == "too_large"
    assert sum(map(len, written)) <= 100_000


def test_a_file_of_exactly_the_largest_size_is_taken(server: Server) -> None:
    server.on("/", Reply(body=b"x" * 1000))

    assert len(get(server.url(), allow=(server.netloc,), max_bytes=1000)[0]) == 1000


def test_a_compressed_body_is_refused_and_not_unpacked(server: Server) -> None:
    bomb = gzip.compress(bytes(5_000_000))
    server.on("/", Reply(body=bomb, headers={"Content-Encoding": "gzip"}))

    with pytest.raises(Permanent, match="compressed") as failure:
        get(server.url(), allow=(server.netloc,))

    assert failure.value.code == "url_rejected"


def test_a_gzip_file_stays_a_gzip_file(server: Server) -> None:
    server.on("/a.gz", Reply(body=gzip.compress(b"1"), headers={"Content-Encoding": "identity"}))

    assert gzip.decompress(get(server.url("/a.gz"), allow=(server.netloc,))[0]) == b"1"


# Time


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=(b"x" for _ in range(1000)), pause_s=0.05),
        Reply(raw=(b"HTTP/1.1 200 OK\r\n", *(b"X: y\r\n" for _ in range(1000))), pause_s=0.05),
        Reply(
            raw=(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;", *(b"x" for _ in range(1000))), pause_s=0.05
        ),
        Reply(raw=[b""], pause_s=60),
    ],
    ids=["body", "head", "chunk", "nothing"],
)
def test_a_server_that_trickles_is_left_at_the_deadline(server: Server, reply: Reply) -> None:
    server.on("/", reply)
    began = time.monotonic()

    with pytest.raises(Transient, match=r"longer than 0\.6 s") as failure:
        get(server.url(), allow=(server.netloc,), timeout_s=0.6)

    assert failure.value.code == "url_timeout"
    assert 0.5 < time.monotonic() - began < 1.5


def test_a_server_that_never_ends_is_left_at_the_deadline(server: Server) -> None:
    server.on("/", Reply(body=(b"x" * 65_536 for _ in itertools.count())))

    with pytest.raises(Transient, match="longer"):
        download(
            server.url(),
            lambda piece: time.sleep(0.005),  # so that there is always something to read at once
            guard=Guard(allow=[server.netloc]),
            max_bytes=10**9,
            timeout_s=0.5,
            user_agent="t",
        )


def test_the_deadline_holds_over_all_redirects(server: Server) -> None:
    server.on("/", Reply(raw=[b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n"], pause_s=0.3))

    with pytest.raises(Transient, match="longer"):
        get(server.url(), allow=(server.netloc,), timeout_s=0.7)

    assert len(server.requests) < 5


def test_a_server_that_falls_silent_is_left_at_the_read_timeout(server: Server) -> None:
    server.on("/", Reply(body=[b"x", b"y"], pause_s=2))
    began = time.monotonic()

    with pytest.raises(Transient, match="stopped sending") as failure:
        get(server.url(), allow=(server.netloc,), read_timeout_s=0.3)

    assert failure.value.code == "url_timeout"
    assert time.monotonic() - began < 1.5


def test_a_pause_shorter_than_the_read_timeout_is_waited_for(server: Server) -> None:
    server.on("/", Reply(body=[b"x", b"y"], pause_s=1.2))

    assert get(server.url(), allow=(server.netloc,), read_timeout_s=3)[0] == b"xy"


def test_a_connection_that_is_not_taken_up_ends_at_the_connect_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(address: object, timeout: float, **options: object) -> socket.socket:
        time.sleep(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", never)

    with pytest.raises(Transient, match="connected") as failure:
        get("http://8.8.8.8/", connect_timeout_s=0.1)

    assert failure.value.code == "url_timeout"


def test_a_slow_name_look_up_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*args: object, **options: object) -> list[Any]:
        time.sleep(3)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    began = time.monotonic()

    with pytest.raises(Transient) as failure:
        get("http://slow.test/", timeout_s=0.2)

    assert failure.value.code == "url_timeout"
    assert time.monotonic() - began < 1.5


class Stopped(Exception):
    pass


def test_a_download_can_be_stopped_while_the_server_is_silent(server: Server) -> None:
    server.on("/", Reply(body=[b"x"], pause_s=20))
    began = time.monotonic()

    def stop() -> None:
        if time.monotonic() - began > 0.2:
            raise Stopped

    with pytest.raises(Stopped):
        get(server.url(), allow=(server.netloc,), should_stop=stop)

    assert time.monotonic() - began < 2.5


# What the answer means


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((404, "url_not_found"), (410, "url_not_found"), (401, "url_forbidden"), (403, "url_forbidden")),
        *(
            (400, "url_rejected"),
            (416, "url_rejected"),
            (204, "url_rejected"),
            (206, "url_rejected"),
            (304, "url_rejected"),
        ),
    ],
)
def test_an_answer_that_will_not_change_is_permanent(server: Server, status: int, code: str) -> None:
    server.on("/", Reply(status, length=0))

    with pytest.raises(Permanent) as failure:
        get(server.url("/x?token=secret"), allow=(server.netloc,))

    assert failure.value.code == code
    assert str(status) in str(failure.value)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_an_answer_that_may_change_is_transient(server: Server, status: int) -> None:
    server.on("/", Reply(status))

    with pytest.raises(Transient, match=str(status)) as failure:
        get(server.url(), allow=(server.netloc,))

    assert failure.value.retry_after_s is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(
            ("7", 7),
            ("0", 0),
            ("999999999999999999999", 3600),
            ("-1", None),
            ("soon", None),
            ("٧", None),
            ("1.5", None),
        ),
        *((timedelta(seconds=60), 60), (timedelta(seconds=-60), 0), (timedelta(days=9), 3600)),
        ("Fri, 99 Foo 2026 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_understood_and_bounded(server: Server, value: str | timedelta, seconds: float | None) -> None:
    if isinstance(value, timedelta):
        value = format_datetime(datetime.now(UTC) + value, usegmt=True)
    server.on("/", Reply(429, headers={"Retry-After": value.encode().decode("latin-1")}))

    with pytest.raises(Transient) as failure:
        get(server.url(), allow=(server.netloc,))

    found = failure.value.retry_after_s
    assert found == seconds if found is None or seconds is None else abs(found - seconds) < 5


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=[b"x" * 100], length=200),
        Reply(body=[b"x" * 100], length=200, reset=True),
        Reply(body=[b"x" * 100], reset=True),
        Reply(raw=[b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"]),
        Reply(raw=[]),
        Reply(raw=[b"220 mail.example ESMTP\r\n"]),
    ],
    ids=["short", "short and reset", "reset", "chunk cut", "closed", "no HTTP"],
)
def test_a_connection_that_breaks_off_is_transient(server: Server, reply: Reply) -> None:
    server.on("/", reply)

    with pytest.raises(Transient) as failure:
        get(server.url(), allow=(server.netloc,))

    assert failure.value.code == "url_cut"


def test_a_refused_connection_is_transient() -> None:
    with serve() as gone:
        pass

    with pytest.raises(Transient) as failure:
        get(gone.url(), allow=(gone.netloc,))

    assert failure.value.code == "url_unreachable"


def test_an_unknown_name_is_transient_and_passes_the_check(names: dict[str, list[list[str]]]) -> None:
    with pytest.raises(Transient, match=r"unknown\.test cannot be found") as failure:
        get("http://unknown.test/")

    assert failure.value.code == "url_unreachable"
    check_url("http://unknown.test/", Guard())


def test_an_error_of_the_writer_passes_through(server: Server) -> None:
    server.on("/", Reply(body=b"1"))

    def write(piece: bytes) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        download(server.url(), write, guard=Guard(allow=[server.netloc]), max_bytes=9, timeout_s=5, user_agent="t")


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for media.test, and its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "media.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=media.test", "-addext", "subjectAltName=DNS:media.test"),
            *("-keyout", str(path), "-out", str(path.with_suffix(".crt"))),
        ],
        check=True,
        capture_output=True,
    )
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.fixture
def tls_server(certificate: Path, names: dict[str, list[list[str]]]) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serve(tls=context) as running:
        names["media.test"] = names["other.test"] = [["127.0.0.1"]]
        running.on("/", Reply(body=[b"sa", b"fe"], pause_s=1.2))
        yield running


def test_tls_is_made_with_the_name_and_not_the_address(
    tls_server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))

    got, _ = get(f"https://media.test:{tls_server.port}/", allow=(f"media.test:{tls_server.port}",))

    assert got == b"safe"
    assert tls_server.server_names == ["media.test"]


def test_a_certificate_of_another_name_is_permanent(
    tls_server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))

    with pytest.raises(Permanent, match="certificate") as failure:
        get(f"https://other.test:{tls_server.port}/", allow=(f"other.test:{tls_server.port}",))

    assert failure.value.code == "url_tls"
    assert tls_server.requests == []


def test_a_certificate_that_nobody_signed_is_permanent(tls_server: Server) -> None:
    with pytest.raises(Permanent, match="certificate") as failure:
        get(f"https://media.test:{tls_server.port}/", allow=(f"media.test:{tls_server.port}",))

    assert failure.value.code == "url_tls"


def test_a_server_that_speaks_no_tls_is_permanent(server: Server) -> None:
    server.on("/", Reply(body=b"plain"))

    with pytest.raises(Permanent, match="TLS") as failure:
        get(f"https://{server.netloc}/", allow=(server.netloc,))

    assert failure.value.code == "url_tls"


def test_a_handshake_that_is_never_answered_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"

        with pytest.raises(Transient) as failure:
            get(f"https://{place}/", allow=(place,), timeout_s=0.4)

    assert failure.value.code == "url_timeout"


def test_a_handshake_that_breaks_off_is_transient(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrap_socket(*args: object, **options: object) -> ssl.SSLSocket:
        raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_socket)

    with pytest.raises(Transient) as failure:
        get(f"https://{server.netloc}/", allow=(server.netloc,))

    assert failure.value.code == "url_unreachable"


def test_a_redirect_from_https_to_http_is_refused(
    tls_server: Server, server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
    tls_server.on("/", Reply(302, headers={"Location": server.url("/x?token=secret")}))

    with pytest.raises(FetchRefused, match="https to http"):
        get(f"https://media.test:{tls_server.port}/", allow=(f"media.test:{tls_server.port}", server.netloc))

    assert server.connections == 0


# Secrets


def test_no_message_and_no_log_line_holds_a_query_string(
    server: Server, caplog: pytest.LogCaptureFixture, names: dict[str, list[list[str]]]
) -> None:
    caplog.set_level(logging.DEBUG)
    server.on("/ok", Reply(302, headers={"Location": "/there?signature=SECRET"}))
    server.on("/there", Reply(body=b"1"))
    server.on("/404", Reply(404))
    server.on("/429", Reply(429))
    server.on("/cut", Reply(body=[b"1"], length=2))
    server.on("/inside", Reply(302, headers={"Location": "http://10.0.0.1/?signature=SECRET"}))
    server.on("/odd", Reply(302, headers={"Location": "http://a b/\\?signature=SECRET"}))
    messages: list[str] = []

    get(server.url("/ok?signature=SECRET"), allow=(server.netloc,))
    urls = [
        *(server.url(f"{path}?signature=SECRET") for path in ("/404", "/429", "/cut", "/inside", "/odd")),
        *("http://unknown.test/?signature=SECRET", "ftp://x/?SECRET", "http://a b/?SECRET", "http://u:SECRET@x/"),
        *("http://[/?SECRET", "http://x:SECRET/", "http://10.0.0.1/?SECRET"),
    ]
    for url in urls:
        with pytest.raises((Permanent, Transient)) as failure:
            get(url, allow=(server.netloc,))
        messages.append(str(failure.value))

    assert len(messages) == len(urls)
    assert "SECRET" not in " ".join(messages)
    assert "SECRET" not in caplog.text


def test_what_is_special_is_what_python_calls_special() -> None:
    """Our table against Python's: whatever it holds for private, reserved or multicast, we refuse."""
    for network in REFUSED_V4:
        for address in (network[0], network[-1]):
            assert not is_public(address)
    for number in range(0, 2**32, 65_521):
        address = ipaddress.IPv4Address(number)
        if address.is_private or address.is_reserved or address.is_multicast or address.is_loopback:
            assert not is_public(address), address
