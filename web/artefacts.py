"""Stored files by signed link: no key is asked for, the link is the permission."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Final
from urllib.parse import quote

from flask import Response, request
from pydantic import Field
from werkzeug.datastructures import Range

from agentflow.links import LinkExpired, LinkInvalid
from agentflow.storage import NotStored, StorageError, Stored
from web.api import Call, Media, Query, Routes
from web.problems import Refused, logger

routes = Routes("artefacts")

CHUNK_BYTES: Final = 256 << 10
_PUBLIC_S: Final = 60
#: What a browser may show by itself. HTML and SVG can carry scripts, which would run with our address as theirs.
_SHOWN: Final = (
    "image/png",
    "image/jpeg",
    "image/webp",
    "image/gif",
    "video/",
    "audio/",
    "text/plain",
    "application/json",
)


class LinkQuery(Query):
    expires: Annotated[str, Field(max_length=20)] = ""
    signature: Annotated[str, Field(max_length=100)] = ""
    filename: Annotated[str, Field(max_length=255)] | None = Field(
        None, description="Save under this name (signed, too)"
    )


class RangeHeaders(Query):
    range: Annotated[str, Field(max_length=200)] | None = Field(None, alias="Range", description="One range of bytes")
    if_range: Annotated[str, Field(max_length=200)] | None = Field(None, alias="If-Range")


@routes.get(
    "/artefacts/<path:key>",
    {
        200: Media("*/*", "The file"),
        206: Media("*/*", "The part that was asked for"),
        302: Media("*/*", "The file is at `Location`, at its store"),
    },
    query=LinkQuery,
    headers=RangeHeaders,
    problems=(403, 404, 416, 422),
    open=True,
)
def download(call: Call, key: str, query: LinkQuery, headers: RangeHeaders) -> Response:
    """A stored file, by a link from a job's result."""
    try:
        call.system.links.verify(key, query.expires, query.signature, filename=query.filename)
        stored = call.system.storage.stat(key)
    except LinkExpired:
        raise Refused(403, "this link has expired; ask for the result again to get a new one") from None
    except LinkInvalid:
        raise Refused(403, "this link is not valid") from None
    if stored is None:
        raise Refused(404, "this file is not kept any more")

    # Not through this process, where the store can do it: its own signed URL, for the one download.
    try:
        there = call.system.storage.public_url(key, _PUBLIC_S, filename=query.filename)
    except NotStored:
        raise Refused(404, "this file is not kept any more") from None
    if there is not None:
        return Response(status=302, headers={"Location": there, "Cache-Control": "no-store"})
    part = _range(headers, stored)
    start, end = part or (0, stored.size)
    answer = Response(status=206 if part else 200)
    if part:
        answer.headers["Content-Range"] = f"bytes {start}-{end - 1}/{stored.size}"
    if request.method != "HEAD":
        try:
            answer.response = _pieces(call.system.storage.read(key, start=start, end=end, chunk_bytes=CHUNK_BYTES), key)
        except NotStored:
            raise Refused(404, "this file is not kept any more") from None
    name = query.filename or PurePosixPath(key).name
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    shown = kind.startswith(_SHOWN)
    disposition = "inline" if shown and query.filename is None else "attachment"
    answer.headers.update(
        {
            "Content-Type": kind if shown else "application/octet-stream",
            "Content-Length": str(end - start),
            "Content-Disposition": f"{disposition}; filename*=UTF-8''{quote(name)}",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, max-age=300",
        }
    )
    if stored.etag:
        answer.headers["ETag"] = _quoted(stored.etag)
    return answer


def _range(headers: RangeHeaders, stored: Stored) -> tuple[int, int] | None:
    """From where to before where; None is the whole. No range of bytes, or several, is passed over (RFC 9110, 14.2)."""
    wanted = request.range
    if not isinstance(wanted, Range) or wanted.units != "bytes" or len(wanted.ranges) != 1:
        return None
    if headers.if_range is not None and headers.if_range != _quoted(stored.etag or ""):
        return None
    found = wanted.range_for_length(stored.size)
    if found is None:
        raise Refused(416, f"the file has {stored.size} bytes", headers={"Content-Range": f"bytes */{stored.size}"})
    return found


def _quoted(etag: str) -> str:
    return etag if etag.startswith(('"', "W/")) else f'"{etag}"'


def _pieces(pieces: Iterator[bytes], key: str) -> Iterator[bytes]:
    try:
        yield from pieces
    except StorageError as error:
        # The head is out: all that can be said is that the connection ends too early.
        logger.error("a file could not be read to its end", key=key, error=str(error))
        raise
