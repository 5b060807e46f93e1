"""One file from one storage into another, with its SHA-256."""

from __future__ import annotations

import hashlib

from agentflow.backup.errors import Damaged
from agentflow.storage import Storage

#: Up to here a file is held in memory and stored in one request; larger ones go through in pieces.
_WHOLE_BYTES = 4 << 20
#: A bucket takes its time for each file, whatever its size; so many at once, so that memory stays below 100 MB.
AT_ONCE = 4


def copy(
    source: Storage,
    key: str,
    target: Storage,
    to: str,
    *,
    size: int,
    sha256: str | None = None,
    content_type: str | None = None,
) -> tuple[int, str]:
    """Copy what stands under `key`; returns its size in bytes and SHA-256. `size` is about what is expected.

    Raises Damaged, and stores nothing, when it is not what `sha256` says; StorageError, NotStored.
    """
    digest = hashlib.sha256()
    pieces = source.read(key)
    if size <= _WHOLE_BYTES:
        data = b"".join(pieces)
        digest.update(data)
        _check(digest.hexdigest(), sha256, key)
        target.put_bytes(to, data, content_type=content_type)
        return len(data), digest.hexdigest()
    with target.writer(to, content_type=content_type) as writer:
        for piece in pieces:
            digest.update(piece)
            writer.write(piece)
        _check(digest.hexdigest(), sha256, key)
    return writer.size, digest.hexdigest()


def sha256_of(storage: Storage, key: str) -> str:
    """Of what stands under `key`. Raises NotStored, StorageError."""
    digest = hashlib.sha256()
    for piece in storage.read(key):
        digest.update(piece)
    return digest.hexdigest()


def _check(found: str, wanted: str | None, key: str) -> None:
    if wanted is not None and found != wanted:
        raise Damaged(f"{key} of the backup is damaged: its content is not what was written")
