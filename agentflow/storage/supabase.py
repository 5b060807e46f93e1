"""Files in Supabase Storage, over its REST API: https://supabase.com/docs/guides/storage and the server's own source.

Small files go in one request. Larger ones go by the TUS protocol in pieces of 6 MB, as the server wants them; it has to know
their size beforehand, so a file that is written piece by piece is kept on this machine's disk until it is whole.
"""

from __future__ import annotations

import base64
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import IO, Any, Final
from urllib.parse import quote, urlsplit

import httpx2

from agentflow import USER_AGENT
from agentflow.storage.contract import NotStored, Storage, StorageError, Stored, TooLarge, Writer

#: Exactly this, but for the last piece: https://supabase.com/docs/guides/storage/uploads/resumable-uploads
PIECE_BYTES: Final = 6 << 20
CONNECT_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 60.0
RETRIES: Final = 4
_FIRST_PAUSE_S: Final = 0.5
_LISTED: Final = 100
_DELETED: Final = 1000
_CONNECTIONS: Final = 32
_NO_TYPE: Final = "application/octet-stream"


class SupabaseStorage(Storage):
    """A bucket of a project, made at the first write. `key` is a secret key (`sb_secret_…`) or the old service_role JWT."""

    def __init__(self, url: str, key: str, bucket: str) -> None:
        self._base = f"{url.rstrip('/')}/storage/v1"
        self._bucket = bucket
        # A new key is no JWT and is refused as a bearer token; one that looks like a browser's is refused, too.
        headers = {"apikey": key, "User-Agent": USER_AGENT}
        if key.startswith("eyJ"):
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=_CONNECTIONS),
            follow_redirects=False,
        )

    def put_bytes(self, key: str, data: bytes, *, content_type: str | None = None) -> int:
        self.check_key(key)
        if len(data) > PIECE_BYTES:
            with self.writer(key, content_type=content_type) as writer:
                writer.write(data)
            return len(data)
        headers = {"x-upsert": "true", "content-type": content_type or _NO_TYPE, "cache-control": "no-cache"}
        self._write(key, lambda: self._call("POST", self._object(key), content=data, headers=headers))
        return len(data)

    @contextmanager
    def writer(self, key: str, *, content_type: str | None = None) -> Iterator[Writer]:
        self.check_key(key)
        with tempfile.TemporaryFile(prefix="agentflow-upload-") as file:
            writer = _Writer(file, key)
            yield writer
            file.seek(0)
            if writer.size <= PIECE_BYTES:
                self.put_bytes(key, file.read(), content_type=content_type)
            else:
                self._write(key, lambda: self._upload(key, file, writer.size, content_type or _NO_TYPE))

    def stat(self, key: str) -> Stored | None:
        self.check_key(key)
        try:
            with self._errors(key):
                facts = self._call("GET", f"/object/info/{self._path(key)}")
        except NotStored:
            return None
        metadata = facts.get("metadata") or {}
        return Stored(
            key=key,
            size=int(facts["size"] if facts.get("size") is not None else metadata["size"]),
            modified=_time(facts.get("last_modified") or facts.get("updated_at") or facts.get("created_at")),
            etag=facts.get("etag") or metadata.get("eTag"),
        )

    def read(self, key: str, *, start: int = 0, end: int | None = None, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
        self.check_key(key)
        if start < 0 or (end is not None and end < start):
            raise ValueError("a range must not be negative")
        headers = {}
        if start or end is not None:
            stored = self.stat(key)
            if stored is None:
                raise NotStored(f"nothing is stored under {key!r}")
            stop = stored.size if end is None else min(end, stored.size)
            if start >= stop:
                return iter(())
            headers["Range"] = f"bytes={start}-{stop - 1}"
        with self._errors(key):
            response = self._open("GET", self._object(key), headers=headers)
        return _Body(response, key, chunk_bytes, wants_range=bool(headers))

    def public_url(self, key: str, seconds: int, *, filename: str | None = None) -> str | None:
        self.check_key(key)
        if not self._base.startswith("https://"):  # of a network of its own
            return None
        return self.signed_url(key, seconds, filename=filename)

    def signed_url(self, key: str, seconds: int, *, filename: str | None = None) -> str:
        """A URL for the file that needs no key, good for so long."""
        self.check_key(key)
        with self._errors(key):
            signed = self._call("POST", f"/object/sign/{self._path(key)}", json={"expiresIn": seconds})["signedURL"]
        return self._base + str(signed) + (f"&download={quote(filename, safe='')}" if filename else "")

    def delete(self, key: str) -> None:
        self.check_key(key)
        with suppress(NotStored), self._errors(key):
            self._delete([key])

    def delete_prefix(self, prefix: str) -> int:
        self.check_key(prefix.removesuffix("/"))
        deleted = 0
        while keys := [stored.key for stored, _ in zip(self.list(prefix), range(_DELETED), strict=False)]:
            with self._errors(prefix):
                self._delete(keys)
            deleted += len(keys)
        return deleted

    def _delete(self, keys: list[str]) -> None:
        self._call("DELETE", f"/object/{quote(self._bucket)}", json={"prefixes": keys})

    def _page(self, folder: str, offset: int) -> list[dict[str, Any]]:
        order = {"column": "name", "order": "asc"}
        question = {"prefix": folder, "limit": _LISTED, "offset": offset, "sortBy": order}
        try:
            with self._errors(folder):
                found: list[dict[str, Any]] = self._call("POST", f"/object/list/{quote(self._bucket)}", json=question)
        except NotStored:  # the bucket itself
            return []
        return found

    def list(self, prefix: str = "") -> Iterator[Stored]:
        folder = prefix.removesuffix("/")
        if prefix:
            self.check_key(folder)
        folders = [folder]
        while folders:
            folder = folders.pop()
            offset = 0
            while page := self._page(folder, offset):
                offset += len(page)
                for each in page:
                    key = f"{folder}/{each['name']}" if folder else each["name"]
                    if each.get("id") is None:
                        folders.append(key)
                    elif each["name"] != ".emptyFolderPlaceholder":  # the dashboard's, for a folder without files
                        metadata = each.get("metadata") or {}
                        modified = _time(metadata.get("lastModified") or each.get("updated_at"))
                        yield Stored(key, int(metadata.get("size") or 0), modified, metadata.get("eTag"))
                if len(page) < _LISTED:
                    break

    # ---- uploads ----

    def _write(self, key: str, write: Callable[[], object]) -> None:
        """Write; where the bucket is missing, make it and write again."""
        with self._errors(key):
            try:
                write()
            except _Refused as refused:
                if refused.code != "NoSuchBucket":
                    raise
                self._make_bucket()
                write()

    def _make_bucket(self) -> None:
        try:
            self._call("POST", "/bucket", json={"id": self._bucket, "name": self._bucket, "public": False})
        except _Refused as refused:
            if refused.status != 409:  # somebody else was quicker
                raise

    def _upload(self, key: str, file: IO[bytes], size: int, content_type: str) -> None:
        """https://tus.io/protocols/resumable-upload; after a failure it goes on from where the server is."""
        facts = {"bucketName": self._bucket, "objectName": key, "contentType": content_type, "cacheControl": "0"}
        metadata = ",".join(f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in facts.items())
        tus = {"Tus-Resumable": "1.0.0", "x-upsert": "true"}
        created = self._open(
            "POST",
            "/upload/resumable",
            headers={**tus, "Upload-Length": str(size), "Upload-Metadata": metadata},
            content=b"",
        )
        created.close()
        # Of the address only the name: our key goes to no other host than ours, whatever the answer says.
        name = urlsplit(created.headers.get("location", "")).path.rstrip("/").rpartition("/")[2]
        if not name:
            raise StorageError(f"storage failed at {key!r}: the upload has no address")
        path, sent, failures, is_certain = f"/upload/resumable/{name}", 0, 0, True
        while sent < size:
            file.seek(sent)
            headers = {**tus, "Upload-Offset": str(sent), "content-type": "application/offset+octet-stream"}
            try:
                answer = self._once("PATCH", path, headers=headers, content=file.read(PIECE_BYTES))
                answer.close()
                sent, failures, is_certain = _offset(answer, sent), 0, True
            except (_Refused, httpx2.TransportError) as error:
                failures += 1
                # 409: the server is elsewhere than we think; 423: it has not noticed yet that our last try is over.
                if failures > RETRIES or (
                    isinstance(error, _Refused) and not error.may_pass and error.status not in (409, 423)
                ):
                    raise
                _pause(failures)
                answer = self._open("HEAD", path, headers=tus)
                answer.close()
                sent, is_certain = _offset(answer, sent), False
        if not is_certain and ((stored := self.stat(key)) is None or stored.size != size):
            raise StorageError(f"storage failed at {key!r}: the upload was not completed")

    # ---- requests ----

    def _path(self, key: str) -> str:
        return f"{quote(self._bucket)}/{'/'.join(quote(part, safe='') for part in key.split('/'))}"

    def _object(self, key: str) -> str:
        return f"/object/{self._path(key)}"

    def _call(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of an answer. Tried again while it may help."""
        response = self._open(method, path, **options)
        try:
            return json.loads(response.read())
        except ValueError:
            raise StorageError("the storage server's answer is not JSON") from None
        finally:
            response.close()

    def _open(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """An answer whose body is still to be read. Tried again while it may help."""
        for failures in range(1, RETRIES + 2):
            try:
                return self._once(method, path, **options)
            except (_Refused, httpx2.TransportError) as error:
                if failures > RETRIES or (isinstance(error, _Refused) and not error.may_pass):
                    raise
                _pause(failures)
        raise AssertionError("not reached")

    def _once(self, method: str, path: str, **options: Any) -> httpx2.Response:
        request = self._client.build_request(method, self._base + path, **options)
        response = self._client.send(request, stream=True)
        if response.status_code >= 300:
            try:
                raise _Refused(response.status_code, response.read())
            finally:
                response.close()
        return response

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except _Refused as refused:
            if refused.status == 404:
                raise NotStored(f"nothing is stored under {key!r}") from refused
            if refused.status == 413:
                raise TooLarge(f"storage failed at {key!r}: {refused}") from refused
            raise StorageError(f"storage failed at {key!r}: {refused}") from refused
        except httpx2.TransportError as error:
            raise StorageError(f"storage failed at {key!r}: {str(error) or type(error).__name__}") from error


class _Refused(Exception):
    """An error of the server. Old answers say 400 and put the status that they mean into the body, as text."""

    def __init__(self, http_status: int, body: bytes) -> None:
        try:
            said = json.loads(body)
        except ValueError:
            said = {}
        said = said if isinstance(said, dict) else {}
        stated = str(said.get("statusCode", ""))
        words = f"{said.get('error', '')} {said.get('message', '')}"
        code = str(said.get("code") or "")
        if code.isdecimal() or not code:
            missing = "bucket not found" in words.lower()
            code = "NoSuchBucket" if missing else "KeyAlreadyExists" if said.get("error") == "Duplicate" else ""
        super().__init__(" ".join(str(said.get("message") or f"status {http_status}").split())[:200])
        self.code = code
        self.status = _STATUSES.get(code) or (int(stated) if stated.isdecimal() else http_status)

    @property
    def may_pass(self) -> bool:
        return self.status in (408, 425, 429) or self.status >= 500


#: https://supabase.com/docs/guides/storage/debugging/error-codes
_STATUSES: Final = {
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "KeyAlreadyExists": 409,
    "BucketAlreadyExists": 409,
    "EntityTooLarge": 413,
    "InvalidJWT": 401,
    "AccessDenied": 403,
    "SlowDown": 503,
    "InternalError": 500,
    "DatabaseTimeout": 544,
    "ResourceLocked": 423,
}


class _Writer(Writer):
    def __init__(self, file: IO[bytes], key: str) -> None:
        self.size = 0
        self._file = file
        self._key = key

    def write(self, data: bytes | bytearray | memoryview) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            raise StorageError(
                f"storage failed at {self._key!r}: no room to keep the upload: {error.strerror}"
            ) from error
        self.size += len(data)
        return len(data)


class _Body(Iterator[bytes]):
    """The pieces of a download; its connection is given back at the end, or when nobody wants the rest."""

    def __init__(self, response: httpx2.Response, key: str, chunk_bytes: int, *, wants_range: bool) -> None:
        self._response = response
        self._key = key
        if wants_range and response.status_code != 206:
            response.close()
            raise StorageError(f"reading {key!r}: the storage server does not know ranges")
        length = response.headers.get("content-length")
        self._expected = int(length) if length is not None else None
        self._pieces = response.iter_bytes(chunk_bytes)

    def __next__(self) -> bytes:
        try:
            piece = next(self._pieces)
        except StopIteration:
            self._response.close()
            if self._expected:
                raise StorageError(f"reading {self._key!r} ended {self._expected} bytes early") from None
            raise
        except httpx2.TransportError as error:
            self._response.close()
            raise StorageError(f"reading {self._key!r} broke off: {str(error) or type(error).__name__}") from error
        if self._expected is not None:
            self._expected -= len(piece)
        return piece

    def __del__(self) -> None:
        self._response.close()


def _offset(answer: httpx2.Response, before: int) -> int:
    """How much the server has."""
    try:
        offset = int(answer.headers["upload-offset"])
    except (KeyError, ValueError):
        raise StorageError("the storage server does not say how much it has") from None
    if offset < 0:
        raise StorageError(f"the storage server has lost what it had ({before} bytes)")
    return offset


def _pause(failures: int) -> None:
    time.sleep(_FIRST_PAUSE_S * 2 ** (failures - 1) * random.uniform(0.75, 1.25))


def _time(text: str | None) -> datetime:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        try:
            moment = parsedate_to_datetime(text or "")
        except ValueError:
            return datetime.fromtimestamp(0, UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
