"""Supabase Storage on this machine, for the tests: buckets, objects, TUS uploads, signed URLs, and its two kinds of errors.

As its documentation and source say: old errors are a 400 with the meant status in the body, new keys are no JWTs and are
refused as such, a browser's User-Agent is refused with a secret key, pieces of an upload are 6 MB but for the last.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

from tests.http_server import Reply, Request, Server, serve

SECRET = "sb_secret_0123456789abcdefghijkl_mnopqrst"
LEGACY = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl"
PIECE = 6 << 20
MODIFIED = "2026-01-02T03:04:05.000Z"


@dataclass
class Upload:
    key: str
    length: int
    content_type: str
    data: bytearray = field(default_factory=bytearray)


@dataclass
class SupabaseServer:
    server: Server
    key: str
    old_errors: bool = True
    limit: int | None = None  # bytes of a file
    buckets: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)  # bucket/key
    uploads: dict[str, Upload] = field(default_factory=dict)
    largest_body: int = 0
    fault: Callable[[Request], Reply | None] = lambda request: None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def url(self) -> str:
        return self.server.url("").rstrip("/")

    def __call__(self, request: Request) -> Reply:
        self.largest_body = max(self.largest_body, len(request.body))
        if (reply := self.fault(request)) is not None:
            return reply
        path = request.path.removeprefix("/storage/v1")
        if "token" in request.query and request.method == "GET":
            return self._signed(request, path)
        if (refusal := self._refused(request)) is not None:
            return refusal
        with self.lock:
            return self._answer(request, path)

    def _refused(self, request: Request) -> Reply | None:
        if request.headers.get("apikey") != self.key:
            return self.error(401, "InvalidJWT", "Unauthorized", "No API key found in request")
        bearer = request.headers.get("authorization")
        if self.key.startswith("sb_") and bearer is not None:
            return self.error(401, "InvalidJWT", "Unauthorized", "Invalid Compact JWS")
        if self.key.startswith("eyJ") and bearer != f"Bearer {self.key}":
            return self.error(400, "InvalidRequest", "Error", "headers must have required property 'authorization'")
        if "Mozilla" in request.headers.get("user-agent", "") or "user-agent" not in request.headers:
            return self.error(401, "AccessDenied", "Unauthorized", "Forbidden use of secret API key in browser")
        return None

    def _answer(self, request: Request, path: str) -> Reply:
        kind, _, rest = path.lstrip("/").partition("/")
        rest = unquote(rest)
        if kind == "bucket":
            return self._bucket(request)
        if kind == "upload":
            return self._upload(request, rest.removeprefix("resumable").lstrip("/"))
        verb, _, below = rest.partition("/")
        match request.method, verb:
            case "POST", "list":
                return self._list(below, json.loads(request.body))
            case "POST", "sign":
                return self._sign(below)
            case "GET", "info":
                return self._info(below)
            case "DELETE", _:
                return self._delete(rest, json.loads(request.body)["prefixes"])
            case "POST", _:
                return self._store(rest, request)
            case "GET", _:
                return self._read(rest, request)
        return self.error(404, "NotFound", "Not Found", f"Route {request.method}:{path} not found")

    def _bucket(self, request: Request) -> Reply:
        wanted = json.loads(request.body)
        if wanted["id"] in self.buckets:
            return self.error(409, "BucketAlreadyExists", "Duplicate", "The resource already exists")
        self.buckets[wanted["id"]] = wanted
        return _json({"name": wanted["id"]})

    def _missing_bucket(self, path: str) -> Reply | None:
        if path.partition("/")[0] in self.buckets:
            return None
        return self.error(404, "NoSuchBucket", "Bucket not found", "Bucket not found")

    def _missing(self) -> Reply:
        return self.error(404, "NoSuchKey", "not_found", "Object not found")

    def _too_large(self, size: int) -> Reply | None:
        if self.limit is None or size <= self.limit:
            return None
        return self.error(413, "EntityTooLarge", "Payload too large", "The object exceeded the maximum allowed size")

    def _store(self, path: str, request: Request) -> Reply:
        if refusal := self._missing_bucket(path) or self._too_large(len(request.body)):
            return refusal
        if path in self.objects and request.headers.get("x-upsert") != "true":
            return self.error(409, "KeyAlreadyExists", "Duplicate", "The resource already exists")
        self.objects[path] = request.body, request.headers.get("content-type", "text/plain;charset=UTF-8")
        return _json({"Key": path, "Id": str(uuid4())})

    def _read(self, path: str, request: Request) -> Reply:
        if refusal := self._missing_bucket(path):
            return refusal
        if path not in self.objects:
            return self._missing()
        data, content_type = self.objects[path]
        headers = {"Content-Type": content_type, "ETag": _etag(data), "Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}
        wanted = request.headers.get("range", "")
        if not wanted:
            return Reply(200, data, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data) - 1) + 1, len(data))
        return Reply(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _info(self, path: str) -> Reply:
        if refusal := self._missing_bucket(path):
            return refusal
        if path not in self.objects:
            return self._missing()
        data, content_type = self.objects[path]
        facts = {"id": str(uuid4()), "name": path.partition("/")[2], "size": len(data), "content_type": content_type}
        return _json(facts | {"etag": _etag(data), "last_modified": MODIFIED, "created_at": MODIFIED, "metadata": {}})

    def _delete(self, bucket: str, keys: list[str]) -> Reply:
        if refusal := self._missing_bucket(bucket):
            return refusal
        if len(keys) > 1000:
            return self.error(400, "InvalidRequest", "Error", "body/prefixes must NOT have more than 1000 items")
        return _json([{"name": key} for key in keys if self.objects.pop(f"{bucket}/{key}", None)])

    def _list(self, bucket: str, wanted: dict[str, Any]) -> Reply:
        if refusal := self._missing_bucket(bucket):
            return refusal
        folder = f"{bucket}/{wanted['prefix']}".rstrip("/") + "/"
        found: dict[str, dict[str, Any]] = {}
        for path, (data, content_type) in self.objects.items():
            if not path.startswith(folder):
                continue
            name, _, below = path.removeprefix(folder).partition("/")
            metadata = {"eTag": _etag(data), "size": len(data), "mimetype": content_type, "lastModified": MODIFIED}
            known = {"id": str(uuid4()), "updated_at": MODIFIED, "metadata": metadata}
            found[name] = {"name": name, **({"id": None, "updated_at": None, "metadata": None} if below else known)}
        page = [found[name] for name in sorted(found)]
        return _json(page[wanted["offset"] : wanted["offset"] + wanted["limit"]])

    def _sign(self, path: str) -> Reply:
        if path not in self.objects:
            return self._missing()
        return _json({"signedURL": f"/object/sign/{path}?token={_token(path)}"})

    def _signed(self, request: Request, path: str) -> Reply:
        key = unquote(path.removeprefix("/object/sign/"))
        if request.query["token"] != _token(key) or key not in self.objects:
            return self.error(400, "InvalidJWT", "InvalidJWT", "jwt expired")
        return Reply(200, self.objects[key][0], {"X-Download": request.query.get("download", "")})

    # ---- TUS ----

    def _upload(self, request: Request, name: str) -> Reply:
        if request.headers.get("tus-resumable") != "1.0.0":
            return Reply(412, b"Tus-Resumable Required")
        if request.method == "POST" and not name:
            return self._begin(request)
        upload = self.uploads.get(name)
        if upload is None:
            return Reply(404, b"The file for this url was not found")
        if request.method == "HEAD":
            return Reply(200, headers={"Upload-Offset": str(len(upload.data)), "Upload-Length": str(upload.length)})
        if int(request.headers["upload-offset"]) != len(upload.data):
            return Reply(409, b"Upload-Offset conflict")
        rest = upload.length - len(upload.data)
        if len(request.body) not in (PIECE, rest) or len(request.body) > rest:
            return Reply(400, b"a piece of a wrong size")
        upload.data += request.body
        if len(upload.data) == upload.length:
            self.objects[upload.key] = bytes(upload.data), upload.content_type
        return Reply(204, headers={"Upload-Offset": str(len(upload.data)), "Tus-Resumable": "1.0.0"})

    def _begin(self, request: Request) -> Reply:
        pairs = (pair.split(" ") for pair in request.headers["upload-metadata"].split(","))
        facts = {name: base64.b64decode(value).decode() for name, value in pairs}
        key = f"{facts['bucketName']}/{facts['objectName']}"
        length = int(request.headers["upload-length"])
        if refusal := self._missing_bucket(key) or self._too_large(length):
            return refusal
        if key in self.objects and request.headers.get("x-upsert") != "true":
            return self.error(409, "KeyAlreadyExists", "Duplicate", "The resource already exists")
        name = base64.urlsafe_b64encode(f"{key}/{uuid4()}".encode()).decode().rstrip("=")
        self.uploads[name] = Upload(key, length, facts["contentType"])
        # Behind a proxy it names itself by another host.
        return Reply(201, headers={"Location": f"https://elsewhere.example/storage/v1/upload/resumable/{name}"})

    def error(self, status: int, code: str, name: str, message: str) -> Reply:
        body = {"statusCode": str(status), "error": name, "message": message}
        return _json(body if self.old_errors else body | {"code": code}, 400 if self.old_errors else status)


@contextmanager
def supabase_server(*, key: str = SECRET, old_errors: bool = True) -> Iterator[SupabaseServer]:
    with serve() as server:
        supabase = SupabaseServer(server, key, old_errors)
        server.on("/storage/v1/", supabase)
        yield supabase


def _json(document: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(document).encode(), {"Content-Type": "application/json"})


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _token(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()
