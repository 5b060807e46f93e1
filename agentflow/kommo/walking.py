"""Reading a list that changes while it is read, so that nothing in it is passed over.

Pages by number would do that: a thing that is changed moves to the end, and what stood behind it moves up, onto a page that was
read already. So the filter by time moves on instead of the page. A walk asks for what was changed from `at` to `until`, which is
in the past when it begins: things only leave this window (by being changed again, for the next walk to find), none come in.

Where more things were changed within one second than fit on a page, that second is read page by page, ordered by id, up to
the last page and then down to the first. On the way down nothing is passed over: a thing's page number only falls while others
leave, by any amount, and ours falls by one each time, from at least the thing's to at most the thing's. Somewhere they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from agentflow.errors import Transient
from agentflow.kommo.client import PAGE, Client, Params
from agentflow.kommo.entities import Stream

_MOST_PAGES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents of a read that began at `read_at`. With them, everything that was changed before `position` has been given."""

    documents: list[Any]
    read_at: datetime
    position: int


def walk(client: Client, stream: Stream, since: int, until: int, clock: Callable[[], datetime]) -> Iterator[Batch]:
    """What was changed (of events: made) from `since` to `until`, both Unix seconds and both included."""
    at, width = since, until - since
    ordered = stream.ordered
    while at <= until:
        to = until if ordered else min(until, at + width)
        read_at = clock()
        page = client.page(stream, _window(stream, at, to))
        if not page.more:
            yield Batch(page.documents, read_at, to + 1)
            at = to + 1
            if len(page.documents) < PAGE // 2:
                width = max(1, 2 * width)
            continue
        if ordered:
            times = [_time_of(stream, each) for each in page.documents]
            if times == sorted(times):
                if times and times[-1] > at:
                    yield Batch(page.documents, read_at, times[-1])
                    at = times[-1]
                    continue
                to = at
            else:
                ordered = False  # the order was promised, and what is later could stand anywhere
        if to > at:
            width = (to - at) // 2
            continue
        yield from _second(client, stream, at, clock)
        at += 1


def whole(client: Client, stream: Stream, clock: Callable[[], datetime]) -> tuple[list[Any], datetime]:
    """All of a short list, and when the read of it began."""
    read_at = clock()
    documents: list[Any] = []
    for number in range(1, _MOST_PAGES):
        page = client.page(stream, number=number)
        documents += page.documents
        if not page.more:
            return documents, read_at
    raise _endless(stream)


def _second(client: Client, stream: Stream, second: int, clock: Callable[[], datetime]) -> Iterator[Batch]:
    # Events know no order but their own, and none of them ever leaves.
    order = [("order[id]", "asc")] if stream.how == "changes" else []
    window = [*_bounds(stream, second, second), *order]
    number = 0
    while True:
        number += 1
        if number > _MOST_PAGES:
            raise _endless(stream)
        read_at = clock()
        page = client.page(stream, window, number=number)
        if not page.more:
            break
        yield Batch(page.documents, read_at, second)
    yield Batch(page.documents, read_at, second if number > 1 else second + 1)
    for back in range(number - 1, 0, -1):
        read_at = clock()
        page = client.page(stream, window, number=back)
        yield Batch(page.documents, read_at, second if back > 1 else second + 1)


def _window(stream: Stream, at: int, to: int) -> Params:
    order = [("order[updated_at]", "asc")] if stream.ordered else []
    return [*_bounds(stream, at, to), *order]


def _bounds(stream: Stream, at: int, to: int) -> Params:
    field = "created_at" if stream.how == "log" else "updated_at"
    return [(f"filter[{field}][from]", str(at)), (f"filter[{field}][to]", str(to))]


def _time_of(stream: Stream, document: Any) -> int:
    time = document.get("updated_at") if isinstance(document, dict) else None
    if type(time) is not int:
        raise Transient(f"Kommo sent one of {stream.name} without the time of its change", code="crm_bad_answer")
    return time


def _endless(stream: Stream) -> Transient:
    return Transient(f"Kommo's list of {stream.name} has no end", code="crm_bad_answer")
