"""What one ComfyUI server is asked over HTTP. Works with 0.3.64 and with 0.33 and newer.

Sent to a worker thread that runs one prompt after the other; `/history` and `/queue` change together under one lock. What each
route may answer, and what it does not say, stands beside it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

from agentflow import metrics
from agentflow.comfyui.servers import Server
from agentflow.connections import Connections, Head
from agentflow.errors import Permanent, Transient

#: Of a process to a server: those for questions and files, and the websockets beside them.
HTTP_CONNECTIONS: Final = 3
SOCKETS: Final = 2
#: Servers stall for 0.2 to 0.4 s while nodes run, and for seconds while one holds the interpreter.
_ANSWER_S: Final = 10.0
_SUBMIT_S: Final = 30.0
_NODES_S: Final = 60.0
_TRANSFER_S: Final = 900.0
#: Of the connections one is for files, so that a long one does not look like a server that is away.
_TRANSFERS: Final = 1
_WAIT_S: Final = 0.2
_QUOTED: Final = 300
#: Python writes limits of nodes so that have none.
_NO_JSON: Final = re.compile(rb"\b(NaN|Infinity)\b")

Check = Callable[[], None]


class Refused(Permanent):
    """The server will not run this graph; the text has the errors of its nodes."""


class Unexpected(Transient):
    """An answer that no server in order gives. `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, code="comfyui_forbidden" if status in (401, 403) else "comfyui_bad_answer")
        self.status = status


class FileGone(Exception):
    """`/history` names a file that is not there: deleted since a prompt, whose answer was taken from the cache, made it."""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt in the queue; `job_id` is what AgentFlow wrote beside it."""

    prompt_id: str
    job_id: str | None


@dataclass(frozen=True, slots=True)
class Queue:
    running: tuple[Item, ...]
    pending: tuple[Item, ...]

    def position(self, prompt_id: UUID) -> int | None:
        """0: it runs; from 1 on: it waits; None: it is not here."""
        for place, item in enumerate((*self.running, *self.pending)):
            if item.prompt_id == str(prompt_id):
                return 0 if place < len(self.running) else place - len(self.running) + 1
        return None


class Client:
    """One per server and process, shared by its threads. Every method takes `check`, which is called at least each second and
    raises when the caller has to end; and raises `NoAnswer` and `Unexpected`, both with codes that begin with comfyui_."""

    def __init__(self, server: Server) -> None:
        self.server: Final = server
        self._connections = Connections("The render server", "comfyui", most=HTTP_CONNECTIONS)
        self._transfers = threading.BoundedSemaphore(_TRANSFERS)
        self.sockets: Final = threading.BoundedSemaphore(SOCKETS)
        self._sockets_open = 0
        self._lock = threading.Lock()
        metrics.comfyui_connections(server.name, lambda: self.open)

    @property
    def open(self) -> int:
        """Connections that stand now."""
        return self._connections.open + self._sockets_open

    def socket_opened(self, change: int) -> None:
        """Said by who opens and closes websockets: 1 and -1."""
        with self._lock:
            self._sockets_open += change

    def close(self) -> None:
        self._connections.close()

    # ---- what it is ----

    def stats(self, check: Check) -> dict[str, Any]:
        """`system` and `devices` of /system_stats; bytes."""
        answer = self._json("GET", "/system_stats", check)
        if not isinstance(answer, dict) or not isinstance(answer.get("system"), dict):
            raise Unexpected("The server does not answer as ComfyUI does", 200)
        return answer

    def remaining(self, check: Check) -> int:
        """How many prompts wait or run, anybody's."""
        answer = self._json("GET", "/prompt", check)
        try:
            return int(answer["exec_info"]["queue_remaining"])
        except (KeyError, TypeError, ValueError):
            raise Unexpected("The server does not say how long its queue is", 200) from None

    def nodes(self, check: Check) -> str:
        """/object_info as JSON text: megabytes, which Postgres reads."""
        with self._asked("GET", "/object_info", check, total_s=_NODES_S) as head:
            text = head.read()
        if head.status != 200 or not text.startswith(b"{"):
            raise _unexpected(head.status, text)
        if not _NO_JSON.search(text):
            return text.decode(errors="replace")
        try:
            return json.dumps(json.loads(text, parse_constant=lambda _: None))
        except ValueError:
            raise _unexpected(head.status, text) from None

    # ---- prompts ----

    def submit(
        self, prompt_id: UUID, graph: Mapping[str, Any], *, client_id: str, job_id: UUID, check: Check
    ) -> dict[str, Any]:
        """Queue a graph; returns `node_errors`: not empty, where it runs without some of its outputs.

        Raises Refused. Whatever else it raises leaves open whether the prompt is queued: only `NoAnswer` that is not `sent`
        says that it is not. A second one with the same id would run as well. Never with a `number`: two alike end the thread
        that runs prompts.
        """
        body = {
            "prompt": graph,
            "prompt_id": str(prompt_id),
            "client_id": client_id,
            "extra_data": {"agentflow": {"job_id": str(job_id)}},
        }
        with self._asked("POST", "/prompt", check, total_s=_SUBMIT_S, json=body) as head:
            text = head.read()
        answer = _parsed(text)
        if head.status == 400 and isinstance(answer, dict):
            raise Refused(f"The render server refuses the graph: {said_of(answer)}", code="render_refused")
        if head.status == 413:
            raise Refused("The graph is larger than the render server takes", code="render_refused")
        if head.status != 200 or not isinstance(answer, dict):
            raise _unexpected(head.status, text)
        errors = answer.get("node_errors")
        return errors if isinstance(errors, dict) else {}

    def history(self, prompt_id: UUID, check: Check) -> dict[str, Any] | None:
        """What is known of a prompt that has ended. None for one that waits or runs, and as well for one it never heard of."""
        answer = self._json("GET", f"/history/{prompt_id}", check)
        entry = answer.get(str(prompt_id)) if isinstance(answer, dict) else None
        return entry if isinstance(entry, dict) else None

    def queue(self, check: Check) -> Queue:
        answer = self._json("GET", "/queue", check)
        try:
            running, pending = answer["queue_running"], answer["queue_pending"]
            return Queue(
                tuple(_item(each) for each in running),
                tuple(_item(each) for each in sorted(pending, key=lambda each: each[0])),
            )
        except (KeyError, TypeError, IndexError):
            raise Unexpected("The server does not say what is in its queue", 200) from None

    def dequeue(self, prompt_id: UUID, check: Check) -> None:
        """Of one that waits; others are left alone. Says nothing of whether there was one."""
        with self._asked("POST", "/queue", check, json={"delete": [str(prompt_id)]}) as head:
            _expect_200(head)

    def interrupt(self, prompt_id: UUID, check: Check) -> None:
        """Of this prompt while it runs (without an id it would hit anybody's). A long node ends before it hears of it."""
        with self._asked("POST", "/interrupt", check, json={"prompt_id": str(prompt_id)}) as head:
            _expect_200(head)

    def free(self, check: Check) -> None:
        """Have it forget its models and what it has computed, when it comes to that."""
        with self._asked("POST", "/free", check, json={"unload_models": True, "free_memory": True}) as head:
            _expect_200(head)

    # ---- files ----

    def upload(self, path: Path, name: str, media_type: str, check: Check) -> str:
        """Put an image among its input files; returns what a node is to be given. The same bytes keep their name."""
        with self._transfer(check), path.open("rb") as file:
            content = {"files": {"image": (name, file, media_type)}, "data": {"subfolder": "agentflow"}}
            with self._asked("POST", "/upload/image", check, total_s=_TRANSFER_S, **content) as head:
                text = head.read()
        if head.status == 413:
            raise Permanent("An image is larger than the render server takes", code="render_image_too_large")
        answer = _parsed(text)
        if head.status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
            raise _unexpected(head.status, text)
        return "/".join(filter(None, [str(answer.get("subfolder") or ""), answer["name"]]))

    def view(self, item: Mapping[str, str], path: Path, most_bytes: int, check: Check) -> int:
        """Download an output into `path`; returns its size in bytes. Raises FileGone; Permanent when it is too large."""
        query = urlencode({name: item.get(name, "") for name in ("filename", "subfolder", "type")})
        size = 0
        with self._transfer(check), self._asked("GET", f"/view?{query}", check, total_s=_TRANSFER_S) as head:
            if head.status == 404:
                raise FileGone
            _expect_200(head)
            with path.open("wb") as file:
                for piece in head.pieces:
                    size += file.write(piece)
                    if size > most_bytes:
                        raise Permanent(f"An output is larger than {most_bytes} bytes", code="render_output_too_large")
        return size

    # ---- one question ----

    def _json(self, method: str, path: str, check: Check, *, total_s: float = _ANSWER_S) -> Any:
        with self._asked(method, path, check, total_s=total_s) as head:
            text = head.read()
        answer = _parsed(text)
        if head.status != 200 or answer is None:
            raise _unexpected(head.status, text)
        return answer

    @contextmanager
    def _asked(
        self, method: str, path: str, check: Check, *, total_s: float = _ANSWER_S, **content: Any
    ) -> Iterator[Head]:
        url, headers = f"{self.server.name}{path}", dict(self.server.headers)
        with self._connections.send(method, url, total_s=total_s, check=check, headers=headers, **content) as head:
            yield head

    @contextmanager
    def _transfer(self, check: Check) -> Iterator[None]:
        while not self._transfers.acquire(timeout=_WAIT_S):
            check()
        try:
            yield
        finally:
            self._transfers.release()


def said_of(answer: Mapping[str, Any]) -> str:
    """What a refusal says: of its nodes first, since `details` is often empty."""
    said = []
    errors = answer.get("node_errors")
    for node, of_node in errors.items() if isinstance(errors, dict) else ():
        for each in of_node.get("errors") or () if isinstance(of_node, dict) else ():
            details = f" ({each['details']})" if each.get("details") else ""
            said.append(f"node {node} {of_node.get('class_type', '')}: {each.get('message')}{details}")
    error = answer.get("error")
    if not said and isinstance(error, dict):
        said.append(": ".join(str(error[name]) for name in ("message", "details") if error.get(name)))
    return "; ".join(said)[:2000] or "it does not say why"


def _item(entry: list[Any]) -> Item:
    extra = entry[3] if len(entry) > 3 and isinstance(entry[3], dict) else {}
    ours = extra.get("agentflow")
    return Item(str(entry[1]), ours.get("job_id") if isinstance(ours, dict) else None)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _expect_200(head: Head) -> None:
    if head.status != 200:
        raise _unexpected(head.status, head.read())


def _unexpected(status: int, text: bytes) -> Unexpected:
    if status in (401, 403):
        return Unexpected("The render server refuses our credentials, or those of a proxy before it", status)
    quoted = text[:_QUOTED].decode(errors="replace").strip()
    return Unexpected(f"The render server answered {status}: {quoted}", status)
