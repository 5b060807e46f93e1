"""The ComfyUI servers of a process: one client for each that its settings name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Final

from agentflow.comfyui.client import Client
from agentflow.comfyui.servers import Server
from agentflow.errors import Permanent


class NotConfigured(Permanent):
    """No server of this pool is in the settings of this process."""

    def __init__(self, pool: str) -> None:
        super().__init__(f"not configured: COMFYUI_URL names no server of the pool {pool!r}", code="not_configured")


class Clients:
    """Connects to nothing before it is used."""

    def __init__(self, servers: Iterable[Server]) -> None:
        self.servers: Final = tuple(servers)

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

    def close(self) -> None:
        if "_clients" in self.__dict__:
            for client in self._clients.values():
                client.close()
