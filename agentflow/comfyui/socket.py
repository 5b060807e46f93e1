"""The websocket of a server: quick news of a prompt. Never the truth: it may be deaf, and nothing is replayed.

Events come to the connection whose id was sent along with the prompt. A second connection under the same id gets them until
the first one closes, and then none any more, so each has an id of its own; one that takes a lost one's place hears only of
changes of the queue, which tell when to look.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import ExitStack, suppress
from typing import Any, Final
from uuid import uuid4

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from agentflow import USER_AGENT, log
from agentflow.comfyui.client import Client

logger = log.get(__name__)

logging.getLogger("websockets").setLevel(logging.WARNING)  # it would log each request's head, credentials and all

_OPEN_S: Final = 3.0
_CLOSE_S: Final = 1.0
#: Previews are binary messages; a larger one ends the connection, and polling goes on.
_MOST_BYTES: Final = 16 << 20
_AT_ONCE: Final = 500
_AGAIN_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0)

_ENDS: Final = ("status", "execution_success", "execution_error", "execution_interrupted")

Event = dict[str, Any]


class Socket:
    """Of one render, in its thread. `client_id` is the present connection's; None while there is none."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._connection: ClientConnection | None = None
        self._closing = ExitStack()
        self._has_place = client.sockets.acquire(blocking=False)  # else as many as may be are there: polling does
        self._tries = 0
        self._again_at = 0.0
        self.client_id: str | None = None

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._has_place:
            self._client.sockets.release()

    def open(self) -> None:
        """Connect, where there is no connection and it is not too soon after the last try."""
        if self._connection is not None or not self._has_place or time.monotonic() < self._again_at:
            return
        client_id = uuid4().hex
        server = self._client.server
        try:
            self._connection = self._closing.enter_context(
                connect(
                    server.socket_url(client_id),
                    additional_headers=dict(server.headers),
                    user_agent_header=USER_AGENT,
                    open_timeout=_OPEN_S,
                    close_timeout=_CLOSE_S,
                    max_size=_MOST_BYTES,
                    compression=None,
                    proxy=None,
                )
            )
        except (OSError, WebSocketException, ValueError) as error:
            self._later()
            logger.debug("no websocket to a render server: it is polled", error=type(error).__name__)
            return
        self.client_id = client_id
        self._client.socket_opened(1)

    def events(self, within_s: float) -> list[Event]:
        """What came: waits for the first one at most so long, and takes what is there beside it."""
        self.open()
        end = time.monotonic() + within_s
        found: list[Event] = []
        while self._connection is not None:
            try:
                message = self._connection.recv(timeout=max(0.0, end - time.monotonic()) if not found else 0.0)
            except TimeoutError:
                return found
            except (OSError, WebSocketException):
                self._close()
                self._later()
                break
            if isinstance(message, str) and (event := _parsed(message)) is not None:
                found.append(event)
            if len(found) >= _AT_ONCE or time.monotonic() >= end:  # a flood, or previews alone
                return found
        if not found and (left_s := end - time.monotonic()) > 0:
            time.sleep(left_s)
        return found

    def _later(self) -> None:
        self._again_at = time.monotonic() + _AGAIN_S[min(self._tries, len(_AGAIN_S) - 1)]
        self._tries += 1

    def _close(self) -> None:
        connection, self._connection, self.client_id = self._connection, None, None
        if connection is not None:
            self._client.socket_opened(-1)
            with suppress(OSError, WebSocketException):
                self._closing.close()


def tells_to_look(event: Event) -> bool:
    """Whether something may have ended: of ours once it is in the history, of anybody's when the queue has changed."""
    kind = event.get("type")
    return kind in _ENDS or (kind == "executing" and event["data"].get("node") is None)


def _parsed(message: str) -> Event | None:
    try:
        event = json.loads(message)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("data"), dict) else None
