"""GET and POST of a user's URL, and whether one would be gone to at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import httpcore2

from agentflow.deadline import Deadline
from agentflow.errors import Permanent
from agentflow.fetch import answers
from agentflow.fetch.answers import Fetched, Posted
from agentflow.fetch.connection import GuardedBackend, errors, resolve
from agentflow.fetch.guard import Guard
from agentflow.fetch.urls import Place, parse, redirected

MAX_REDIRECTS = 5
CHECK_TIMEOUT_S = 5.0


def check_url(url: str, guard: Guard) -> None:
    """Raises `FetchRefused` for what `download` would refuse at once. For the web layer; `download` checks again.

    A name that cannot be resolved now passes: the job tries again later, and says so.
    """
    place = parse(url, guard)
    try:
        addresses = resolve(place.host, place.port, CHECK_TIMEOUT_S)
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
    deadline = Deadline(timeout_s, should_stop or (lambda: None))
    timeouts = {"connect": connect_timeout_s, "read": read_timeout_s, "write": read_timeout_s, "pool": None}
    place = parse(url, guard)
    for _ in range(MAX_REDIRECTS + 1):
        backend = GuardedBackend(guard, deadline, place.netloc)
        with (
            errors(place, deadline),
            httpcore2.ConnectionPool(network_backend=backend, max_keepalive_connections=0) as pool,
            pool.stream(
                "GET", place.address, headers=_question(place, user_agent), extensions={"timeout": timeouts}
            ) as response,
        ):
            answer = answers.headers(response.headers)
            if response.status not in (301, 302, 303, 307, 308):
                size, total = 0, answers.accepted(place, response.status, answer, max_bytes)
                for piece in response.iter_stream():
                    size += len(piece)
                    if size > max_bytes:
                        raise answers.too_large(place, max_bytes)
                    write(piece)
                    if report is not None:
                        report(size, total)
                return Fetched(place.url, size, answers.content_type(answer), answers.filename(answer, place.url))
            place = redirected(place, answer, guard)
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
    deadline = Deadline(timeout_s, should_stop or (lambda: None))
    timeouts = {"connect": connect_timeout_s, "read": timeout_s, "write": timeout_s, "pool": None}
    place = parse(url, guard)
    backend = GuardedBackend(guard, deadline, place.netloc)
    question = [*_question(place, user_agent), ("Content-Length", str(len(body))), *headers.items()]
    with (
        errors(place, deadline),
        httpcore2.ConnectionPool(network_backend=backend, max_keepalive_connections=0) as pool,
        pool.stream(
            "POST", place.address, headers=question, content=body, extensions={"timeout": timeouts}
        ) as response,
    ):
        answer = answers.headers(response.headers)
        return Posted(int(response.status), answers.retry_after(answer.get("retry-after")), answers.beginning(response))


def _question(place: Place, user_agent: str) -> list[tuple[str, str]]:
    return [
        ("Host", place.netloc),
        ("User-Agent", user_agent),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
