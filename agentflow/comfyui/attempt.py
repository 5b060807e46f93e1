"""What an attempt at a render has in its hands: the rows of its prompt, its place in the line, and servers that may be away."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from agentflow import log
from agentflow.comfyui import graphs, pool, prompts, sightings
from agentflow.comfyui.client import Client, Unexpected
from agentflow.comfyui.prompts import Render
from agentflow.comfyui.requests import Prepared
from agentflow.comfyui.sightings import Sighting
from agentflow.connections import NoAnswer
from agentflow.errors import Wait
from agentflow.jobs import keys, records
from agentflow.worker.running import JobContext, Stopped

logger = log.get(__name__)

T = TypeVar("T")

#: A server may be away so long before its renders are parked; less, where it has not answered this attempt yet.
PATIENCE_S: Final = 10.0
LITTLE_PATIENCE_S: Final = 2.0
_AWAY_AGAIN_S: Final = 10.0

_LIVE: Final[tuple[prompts.State, ...]] = ("taken", "sending", "sent", "done")


class BeginAnew(Exception):
    """The prompt is gone for good, and nothing came of it."""


class Attempt:
    """`has_key`: it stands in its pool's line, with a slot. `at_server`: the prompt that may run there now."""

    def __init__(self, context: JobContext, prepared: Prepared, pool_name: str) -> None:
        self.context: Final = context
        self.job: Final = context.job
        self.prepared: Final = prepared
        self._pool: Final = pool_name
        self.system: Final = context.system
        self.settings: Final = context.system.settings
        self.has_key = context.job.concurrency_key is not None
        self.at_server: tuple[Render, Client] | None = None
        self._has_answered = False

    # ---- rows ----

    def move(self, render: Render, state: prompts.State, *, come_from: prompts.State, **facts: Any) -> Render:
        """Raises Stopped where somebody else has the prompt by now."""
        with self.system.database.connection() as conn:
            if not prompts.move(conn, render, state, come_from=[come_from], **facts):
                raise Stopped("lost")
        return dataclasses.replace(render, state=state)

    def end(self, render: Render, state: prompts.State, problem: str | None = None) -> None:
        with self.system.database.connection() as conn:
            prompts.move(conn, render, state, come_from=_LIVE, problem=problem)

    def leave_line(self) -> None:
        """The GPU is free: the next render may begin while this one's files are fetched."""
        if self.has_key:
            with self.system.database.connection() as conn:
                rings = records.rings_for(conn, keys.leave(conn, self.job))
            self.system.publisher.ring(rings)
            self.has_key = False

    # ---- servers ----

    def look(self, render: Render, client: Client, *, with_queue: bool = True) -> Sighting:
        def ask() -> Sighting:
            if with_queue:
                return sightings.look(client, render.prompt_id, self.context.check)
            return Sighting(client.history(render.prompt_id, self.context.check))

        return self.patiently(render, client, ask)

    def nodes(self, client: Client) -> dict[str, Any] | None:
        """What the server said of the classes of nodes in the graph."""
        classes = graphs.classes_of(self.prepared.graph)
        with self.system.database.connection() as conn:
            return self.system.comfyui.nodes(conn, client.server.name, classes)

    def patiently(self, render: Render, client: Client, ask: Callable[[], T]) -> T:
        """Ask again while the server is away, for some seconds. Raises Wait; BeginAnew when it was away for too long."""
        patience_s = PATIENCE_S if self._has_answered else LITTLE_PATIENCE_S
        away_since: float | None = None
        while True:
            try:
                answer = ask()
            except (NoAnswer, Unexpected) as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > patience_s:
                    raise self.away(client, error, render) from error
                self.context.sleep(self.settings.comfyui_poll_interval)
            else:
                self._has_answered = True
                return answer

    def away(self, client: Client, error: BaseException, render: Render | None = None) -> Exception:
        """Its server is away: the job waits, and its prompt with it, but not for ever."""
        unseen_s = self.sick(client, "unreachable")
        timeout_s = self.settings.comfyui_timeout
        if render is not None and min(render.age_s, unseen_s) > timeout_s:
            self.end(render, "given_up", str(error))
            return BeginAnew()
        delay_s = min(_AWAY_AGAIN_S, self.settings.worker_gpu_lock_timeout)
        return Wait(delay_s, "comfyui_unreachable", message=str(error))

    def sick(self, client: Client, problem: pool.Problem) -> float:
        """Have the server left alone for a while. Returns for how long it has answered nobody, in seconds."""
        name = client.server.name
        with self.system.database.connection() as conn:
            if pool.sick(conn, name, problem):
                logger.warning("a render server is left alone for a while", server=name, problem=problem)
            rings = records.rings_for(conn, pool.count(conn, self._pool, self.settings.worker_gpu_lock_timeout))
            known = next((s for s in pool.servers(conn) if s.name == name), None)
        self.system.publisher.ring(rings)
        return math.inf if known is None or known.unseen_s is None else known.unseen_s
