"""The HTTP API as the command line needs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode, urljoin, urlsplit

import httpx2 as httpx

from agentflow import USER_AGENT
from agentflow.cli.errors import USAGE, Failure
from agentflow.settings import Settings
from agentflow.system import admin_key

_PIECE_BYTES: Final = 1 << 20
_TIMEOUT: Final = httpx.Timeout(connect=10.0, read=60.0, write=60.0, pool=10.0)


def operator_key(read: Settings) -> str:
    """Raises Failure where none is known."""
    if read.admin_api_key is not None:
        return read.admin_api_key.get_secret_value()
    if not (read.agentflow_home / "admin.key").exists():
        raise Failure("its key is needed: set ADMIN_API_KEY to the operator's key of that AgentFlow", USAGE)
    return admin_key(read.agentflow_home)


class Client:
    """Every method raises Failure with a sentence for people."""

    def __init__(self, base: str, key: str) -> None:
        if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).hostname:
            raise Failure(f"{base!r} is not the URL of an AgentFlow, such as http://127.0.0.1:8000")
        self.base = base.rstrip("/")
        # A proxy of the environment is none of this machine's own addresses' business.
        local = urlsplit(base).hostname in ("127.0.0.1", "::1", "localhost")
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}", "User-Agent": USER_AGENT},
            timeout=_TIMEOUT,
            trust_env=not local,
            follow_redirects=False,
        )

    def close(self) -> None:
        self._http.close()

    def upload(self, path: Path, sent: Callable[[int], None]) -> str:
        """Send a file as the body; returns the video's id. `sent` is called with the bytes sent so far."""
        total = path.stat().st_size

        def pieces() -> Iterator[bytes]:
            done = 0
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece
                    done += len(piece)
                    sent(done)

        query = urlencode({"filename": path.name[-255:]})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(total)}
        answer = self._ask("POST", f"/api/videos?{query}", content=pieces(), headers=headers)
        return str(answer["video_id"])

    def analyze(self, request: dict[str, str]) -> str:
        """Returns the task's id, which is the job's."""
        return str(self._ask("POST", "/api/videos/analyze", json=request)["task_id"])

    def status(self, task: str) -> dict[str, Any]:
        return self._ask("GET", f"/api/videos/task/{quote(task)}/status")

    def get(self, path: str) -> dict[str, Any]:
        return self._ask("GET", path)

    def post(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        return self._ask("POST", path, json=document)

    def text(self, path: str, token: str | None = None) -> str:
        """What is no JSON. `token`: instead of the key."""
        answer = self._answer("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return answer.text

    def cancel(self, job: str) -> None:
        self._ask("POST", f"/api/jobs/{quote(job)}/cancel")

    def download(self, link: str, path: Path) -> None:
        """A link of a result, into a file that is whole or not there."""
        new = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            # The store may have it at an address of its own; the key is not sent to another host.
            with self._http.stream("GET", urljoin(self.base + "/", link), follow_redirects=True) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise _refused(answer, link)
                with new.open("wb") as file:
                    for piece in answer.iter_bytes(_PIECE_BYTES):
                        file.write(piece)
            new.replace(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        finally:
            new.unlink(missing_ok=True)

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        answer = self._answer(method, path, **more)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Failure(f"{self.base} answers, but not as an AgentFlow does: is the URL right?")
        return found

    def _answer(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, self.base + path, **more)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.status_code >= 300:
            raise _refused(answer, path)
        return answer

    def _unreachable(self, error: Exception) -> Failure:
        return Failure(f"{self.base} does not answer ({error or type(error).__name__})")


def _refused(answer: httpx.Response, path: str) -> Failure:
    if answer.status_code == 401:
        return Failure("the key was refused: set ADMIN_API_KEY to the operator's key of that AgentFlow")
    try:
        said = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        said = f"{path.partition('?')[0]} answered {answer.status_code} {answer.reason_phrase}"
    return Failure(str(said))
