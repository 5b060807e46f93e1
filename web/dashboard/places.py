"""Where a passage stands in its document, in words, and the picture to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from web.api import Call
from web.dashboard.words import say
from web.jobs import with_links

#: Of a long passage so much is shown before its first word that is marked.
_BEFORE: Final = 160


def in_words(place: Mapping[str, Any]) -> str:
    """`Prices › Europe, page 3`, `transcript, 1:05 to 1:20`."""
    return ", ".join(_parts(place))


def _parts(place: Mapping[str, Any]) -> Iterator[str]:
    if part := str(place.get("part") or ""):
        yield {
            "summary": say("summary"),
            "transcript": say("transcript"),
            "captions": say("what is seen"),
            "screen_text": say("text on the screen"),
        }.get(part, say("subtitles") if part.startswith("subtitles") else part)
    if heading := place.get("heading"):
        yield " › ".join(map(str, heading)) if isinstance(heading, list) else str(heading)
    for name, said in (
        ("page", say("page {n}", n=place.get("page"))),
        ("slide", say("slide {n}", n=place.get("slide"))),
        ("sheet", say("sheet {n}", n=place.get("sheet"))),
        ("line", say("line {n}", n=place.get("line"))),
    ):
        if place.get(name) is not None:
            yield said
    if (row := place.get("row")) is not None:
        last = place.get("row_end", row)
        yield say("row {n}", n=row) if last == row else say("rows {n} to {m}", n=row, m=last)
    if place.get("start_s") is not None:
        begin, end = timecode(place["start_s"]), timecode(place.get("end_s", place["start_s"]))
        yield begin if begin == end else say("{a} to {b}", a=begin, b=end)


def timecode(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def picture(call: Call, organization_id: int, place: Mapping[str, Any]) -> str | None:
    """A link to what a video shows there."""
    found: str | None = with_links(call, {"key": place.get("thumbnail")}, organization_id).get("url")
    return found


def pieces(text: str, marked: Sequence[tuple[int, int]], most: int) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether it is marked; of a long one a stretch of `most` characters, from its first mark on."""
    begin = max(0, marked[0][0] - _BEFORE) if marked and len(text) > most else 0
    end = min(len(text), begin + most)
    found, at = [("…", False)] if begin else [], begin
    for first, last in marked:
        if at <= first < last <= end:
            found += [(text[at:first], False), (text[first:last], True)]
            at = last
    found += [(text[at:end], False)] + ([("…", False)] if end < len(text) else [])
    return [piece for piece in found if piece[0]]
