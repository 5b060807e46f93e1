"""Uploads that go straight into storage, piece by piece: no temporary copy, a few pieces in memory."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from flask import request
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData, Preamble

from agentflow.storage import Storage, StorageError
from web.problems import Refused, invalid

PIECE_BYTES: Final = 256 << 10
FIELD: Final = "file"
#: Boundaries and headers of a form around the file itself.
FORM_BYTES: Final = 64 << 10
_MAX_PARTS: Final = 10
#: Of one text in a form, beside the file.
_MAX_FIELD_BYTES: Final = 8 << 10
#: Enough to see what a file is.
_HEAD_BYTES: Final = 64
#: RFC 2046, 5.1.1
_BOUNDARY: Final = re.compile(r"[ -~]{1,70}")


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that is whole in storage under `key`; `fields` are the texts that came in the same form."""

    key: str
    filename: str | None
    content_type: str | None
    size_bytes: int
    fields: dict[str, str] = field(default_factory=dict)


def store_raw(
    storage: Storage, filename: str | None, content_type: str, max_bytes: int, key_of: Callable[[str | None], str]
) -> Stored:
    """The whole body as the file. Whatever goes wrong, a caller who hangs up included, nothing is left."""
    name, key = _clean(filename), key_of(_clean(filename))
    with storage.writer(key, content_type=content_type) as writer:
        for piece in pieces(max_bytes):
            writer.write(piece)
        if not writer.size:
            raise Refused(400, "the body is missing: the video is expected")
    return Stored(key, name, content_type, writer.size)


def store_form(
    storage: Storage, max_bytes: int, key_of: Callable[[str | None], str], *, fields: Collection[str] = ()
) -> Stored:
    """The part `file` of a multipart/form-data body (RFC 7578); of other parts the form may have these texts, each once."""
    parts = _Parts(_boundary(), max_bytes, fields)
    first = parts.next_file()
    if first is None:
        raise invalid(FIELD, "is missing")
    name = _clean(first.filename)
    content_type = first.headers.get("Content-Type", "application/octet-stream").partition(";")[0].strip()[:100]
    key = key_of(name)
    with storage.writer(key, content_type=content_type) as writer:
        for piece in parts.data():
            writer.write(piece)
        if not writer.size:
            raise invalid(FIELD, "is empty")
        if parts.next_file() is not None:  # also reads to the end: a form that was cut off is none
            raise invalid(FIELD, "is given more than once")
    return Stored(key, name, content_type, writer.size, parts.fields)


@dataclass(frozen=True, slots=True)
class Form:
    """Files that are whole in storage, by the names of their parts, and the texts that came with them."""

    files: dict[str, StoredPart]
    fields: dict[str, str]


@dataclass(frozen=True, slots=True)
class StoredPart:
    key: str
    sha256: str


def store_files(
    storage: Storage,
    max_bytes: int,
    place_of: Callable[[str, bytes], tuple[str, str]],
    *,
    most: int,
    fields: Collection[str],
    field_bytes: int,
) -> Form:
    """Up to `most` files of a form, each of `max_bytes`, with these texts. `place_of` sees a part's name and how it begins,
    answers its key and its media type, and may refuse it. Whatever goes wrong, nothing is left."""
    limit = most * max_bytes + len(fields) * field_bytes
    parts = _Parts(_boundary(), limit, fields, files=None, field_bytes=field_bytes)
    stored: dict[str, StoredPart] = {}
    try:
        while (file := parts.next_file()) is not None:
            name = str(file.name)
            if name in stored:
                raise invalid(name[:100], "is given more than once")
            if len(stored) >= most:
                raise invalid(name[:100], f"is one file too many: a form may have {most}")
            stored[name] = _store_part(storage, parts, name, max_bytes, place_of)
    except BaseException:
        drop(storage, [each.key for each in stored.values()])
        raise
    return Form(stored, parts.fields)


def _store_part(
    storage: Storage,
    parts: _Parts,
    name: str,
    max_bytes: int,
    place_of: Callable[[str, bytes], tuple[str, str]],
) -> StoredPart:
    data = parts.data()
    head = b""
    while len(head) < _HEAD_BYTES and (piece := next(data, None)) is not None:
        head += piece
    if not head:
        raise invalid(name[:100], "is empty")
    digest = hashlib.sha256()
    key, content_type = place_of(name, head)
    with storage.writer(key, content_type=content_type) as writer:
        for piece in itertools.chain((head,), data):
            digest.update(piece)
            writer.write(piece)
            if writer.size > max_bytes:
                raise Refused(413, f"the file {name[:100]!r} is larger than {max_bytes} bytes; nothing was kept")
    return StoredPart(key, digest.hexdigest())


def drop(storage: Storage, keys: Collection[str]) -> None:
    """Remove files that nothing names after all. What the store refuses is left to its clean-up."""
    for key in keys:
        with suppress(StorageError):
            storage.delete(key)


def _boundary() -> bytes:
    boundary = parse_options_header(request.content_type)[1].get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise Refused(400, "multipart/form-data without a boundary")
    return boundary.encode()


class _Parts:
    """A form's parts, read as they come. werkzeug's own parser would write the file to a temporary one first.

    `files` are the names that files may have; None: any.
    """

    def __init__(
        self,
        boundary: bytes,
        max_bytes: int,
        fields: Collection[str],
        *,
        files: Collection[str] | None = (FIELD,),
        field_bytes: int = _MAX_FIELD_BYTES,
    ) -> None:
        self._decoder = MultipartDecoder(boundary, max_parts=_MAX_PARTS)
        self._pieces = pieces(max_bytes + FORM_BYTES)
        self._known = fields
        self._files = files
        self._field_bytes = field_bytes
        self.fields: dict[str, str] = {}

    def next_file(self) -> File | None:
        """The next file, after the texts that stand before it; None at the end of the form."""
        while True:
            event = self._event()
            if isinstance(event, Epilogue):
                return None
            if isinstance(event, Field) and event.name in self._known:
                self._read_field(event.name)
            elif isinstance(event, File) and (self._files is None or event.name in self._files):
                return event
            elif isinstance(event, Field | File):
                raise invalid(str(event.name)[:100], f"is not known here: the form has {self._parts_said()}")

    def _parts_said(self) -> str:
        known = "".join(f", {name!r}" for name in self._known)
        if self._files is None:
            return f"files{known}"
        return f"the file {FIELD!r}{known}" if known else f"one part, the file {FIELD!r}"

    def _read_field(self, name: str) -> None:
        if name in self.fields:
            raise invalid(name, "is given more than once")
        value = b""
        for piece in self.data():
            value += piece
            if len(value) > self._field_bytes:
                raise invalid(name, f"is longer than {self._field_bytes} bytes")
        try:
            self.fields[name] = value.decode()
        except UnicodeDecodeError:
            raise invalid(name, "is not UTF-8") from None

    def data(self) -> Iterator[bytes]:
        more = True
        while more:
            event = self._event()
            if not isinstance(event, Data):
                raise Refused(400, "the form cannot be read")
            yield event.data
            more = event.more_data

    def _event(self) -> Preamble | Field | File | Data | Epilogue:
        try:
            while isinstance(event := self._decoder.next_event(), NeedData):
                self._decoder.receive_data(next(self._pieces, None))
                # Data is handed on at once; what gathers is a header without an end.
                if len(self._decoder.buffer) > PIECE_BYTES + FORM_BYTES:
                    raise Refused(400, "the form cannot be read: a part's header has no end")
        except (ValueError, AttributeError, LookupError) as error:
            # Too few lines, no name, no UTF-8: the decoder trusts its input a little.
            raise Refused(400, f"the form cannot be read: {error}") from None
        return event  # type: ignore[return-value]  # the other events


def pieces(max_bytes: int) -> Iterator[bytes]:
    """The body. Raises Refused: 413 past the limit, 400 where it ended before its length, 408 where nothing came."""
    expected = request.content_length
    if expected is not None and expected > max_bytes:
        raise _too_large(max_bytes)
    size = 0
    while True:
        try:
            piece = request.stream.read(PIECE_BYTES)
        except (TimeoutError, BlockingIOError):
            raise Refused(408, "nothing came for too long; nothing was kept", headers={"Connection": "close"}) from None
        if not piece:
            break
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        yield piece
    # gunicorn ends a body that was cut off like one that is whole.
    if expected is not None and size < expected:
        raise Refused(400, "the body ended before its Content-Length; nothing was kept")


def _too_large(max_bytes: int) -> Refused:
    return Refused(413, f"the body is larger than {max_bytes} bytes; nothing was kept")


def _clean(filename: str | None) -> str | None:
    """The last part of a name, as a browser or a person may show it."""
    last = re.split(r"[/\\]", filename or "")[-1]
    kept = "".join(c for c in last if c.isprintable()).strip()
    return kept.encode(errors="ignore")[-200:].decode(errors="ignore") or None
