"""Looks after the servers, in each worker process that renders: which are well, how long the lines for them are, and what is
left on them that nobody waits for.

Each server is looked at by one process at a time, every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final
from uuid import UUID

import psycopg

from agentflow import log
from agentflow.comfyui import pool, prompts, sightings, times
from agentflow.comfyui.client import Client
from agentflow.comfyui.clients import Clients
from agentflow.comfyui.prompts import Render
from agentflow.database import BoundedConnection, Connection, Database
from agentflow.errors import Transient
from agentflow.worker.loops import Loop

logger = log.get(__name__)

_PAUSE_S: Final = 1.0
_LIST_EVERY_S: Final = 60.0
_FORGET_EVERY_S: Final = 3600.0
#: For one prompt that nobody waits for; what is still there then is met at the next look.
_STOP_S: Final = 3.0


class Keeper(Loop):
    """One step looks at the servers that are due."""

    def __init__(
        self,
        database: Database,
        clients: Clients,
        *,
        look_again_s: float,
        ring: Callable[[Connection, list[UUID]], None],
    ) -> None:
        super().__init__("gpus", database)
        self._clients = clients
        self._look_again_s = look_again_s
        self._ring = ring
        self._pool_of = {server.name: server.pool for server in clients.servers}
        self._listed_at = self._forgot_at = float("-inf")

    def step(self, conn: BoundedConnection) -> float:
        if time.monotonic() - self._listed_at > _LIST_EVERY_S:
            pool.list_servers(conn, self._clients.servers)
            self._count(conn, *self._pool_of.values())
            self._listed_at = time.monotonic()
        if time.monotonic() - self._forgot_at > _FORGET_EVERY_S:
            times.forget(conn)
            pool.forget(conn)
            self._forgot_at = time.monotonic()
        for name, wants_nodes in pool.due(conn, list(self._pool_of)):
            client = self._clients.of(name)
            if client is not None and not self.stopping:
                self._look(conn, client, wants_nodes)
        return _PAUSE_S

    def _look(self, conn: Connection, client: Client, wants_nodes: bool) -> None:
        name = client.server.name
        try:
            stats = client.stats(self._check)
            nodes = client.nodes(self._check) if wants_nodes else None
            came = pool.seen(conn, name, stats, client.remaining(self._check), nodes)
            for render in prompts.abandoned(conn, name):
                self._bury(conn, client, render)
        except (Transient, psycopg.DataError) as error:  # what it says of its nodes may be no JSON
            if pool.sick(conn, name, "unreachable"):
                logger.warning("a render server is away", server=name, error=str(error))
                self._count(conn, client.server.pool)
            return
        if came:
            logger.info("a render server is well", server=name)
            self._count(conn, client.server.pool)

    def _bury(self, conn: Connection, client: Client, render: Render) -> None:
        """A prompt whose job has ended, or was begun anew elsewhere: it is stopped, and its slot is free when it has."""
        was_sent = render.state != "taken"
        if was_sent and sightings.stop(client, render.prompt_id, _STOP_S, self._check) is None:
            return  # it is met at the next look
        if prompts.move(conn, render, "cancelled", come_from=[render.state]):
            logger.info("a prompt that nobody waits for was removed", prompt_id=str(render.prompt_id))
            self._count(conn, client.server.pool)

    def _count(self, conn: Connection, *pools: str) -> None:
        for each in sorted(set(pools)):
            self._ring(conn, pool.count(conn, each, self._look_again_s))

    def _check(self) -> None:
        if self.stopping:
            raise Transient("the process is stopping")
