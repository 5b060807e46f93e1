"""The ComfyUI servers of a process: one client for each that its settings name."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any, Final

from agentflow.comfyui import pool
from agentflow.comfyui.client import Client
from agentflow.comfyui.servers import Server
from agentflow.database import Connection
from agentflow.errors import Permanent


class NotConfigured(Permanent):
    """No server of this pool is in the settings of this process."""

    def __init__(self, pool: str) -> None:
        super().__init__(f"not configured: COMFYUI_URL names no server of the pool {pool!r}", code="not_configured")


class Clients:
    """Connects to nothing before it is used."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self.servers: Final = tuple(servers)
        self._nodes: dict[str, tuple[float, dict[str, Any]]] = {}

    @cached_property
    def _clients(self) -> dict[str, Client]:
        return {server.name: Client(server) for server in self.servers}

    def of(self, name: str) -> Client | None:
        """None: the settings do not name it (any more)."""
        return self._clients.get(name)

    def names(self, pool: str) -> list[str]:
        """Raises NotConfigured."""
        names = [server.name for server in self.servers if server.pool == pool]
        if not names:
            raise NotConfigured(pool)
        return names

    def nodes(self, conn: Connection, name: str, classes: Collection[str]) -> dict[str, Any] | None:
        """What a server said of these classes of nodes, some minutes ago at most. None: it was not asked yet."""
        read_at, known = self._nodes.get(name, (0.0, {}))
        if time.monotonic() - read_at > pool.NODES_EVERY_S:
            read_at, known = time.monotonic(), {}
        if missing := [each for each in classes if each not in known]:
            found = pool.nodes_of(conn, name, missing)
            if found is None:
                return None
            known = {**known, **{each: found.get(each) for each in missing}}
            self._nodes[name] = read_at, known
        return {each: known[each] for each in classes if known[each] is not None}

    def close(self) -> None:
        if "_clients" in self.__dict__:
            for client in self._clients.values():
                client.close()
