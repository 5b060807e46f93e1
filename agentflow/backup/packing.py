"""Parts of a backup: gzip, with the SHA-256 of what is stored."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator

from agentflow.backup.errors import Damaged
from agentflow.storage import Writer

#: Rows come one by one; a store takes pieces.
_PIECE_BYTES = 1 << 20
#: The quickest. Text of rows shrinks to a third by it; the best level gains a tenth more, and takes three times as long.
_LEVEL = 1
_GZIP = 31


class Packer:
    """Compresses into a writer of a store. After `finish`, which ends the stream, `sha256` and `size` (bytes) are the part's."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        self._digest = hashlib.sha256()
        self._waiting = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self._put(self._deflate.compress(data))

    def finish(self) -> None:
        self._put(self._deflate.flush(), last=True)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def size(self) -> int:
        return self._writer.size

    def _put(self, data: bytes, *, last: bool = False) -> None:
        self._waiting += data
        if len(self._waiting) >= _PIECE_BYTES or last:
            self._digest.update(self._waiting)
            self._writer.write(self._waiting)
            self._waiting = bytearray()


def unpacked(pieces: Iterable[bytes], sha256: str, name: str) -> Iterator[bytes]:
    """What was packed. Raises Damaged, at the latest after the last piece: whoever takes pieces must be able to take it back."""
    digest, inflate = hashlib.sha256(), zlib.decompressobj(_GZIP)
    try:
        for piece in pieces:
            digest.update(piece)
            if data := inflate.decompress(piece):
                yield data
    except zlib.error:
        raise Damaged(f"{name} of the backup is damaged: it cannot be unpacked") from None
    if digest.hexdigest() != sha256 or not inflate.eof:
        raise Damaged(f"{name} of the backup is damaged: it is not what was written")


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Without their ends."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest
