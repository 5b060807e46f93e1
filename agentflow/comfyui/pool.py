"""The servers that renders may go to."""

from __future__ import annotations

from typing import Any

from agentflow.system import System


def known_nodes(system: System, pool: str) -> dict[str, Any] | None:
    """What a server of the pool said last of its nodes (`GET /object_info`). None: none was asked so far."""
    return None
