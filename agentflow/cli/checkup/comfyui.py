"""Render servers: version, memory and load of each."""

from __future__ import annotations

from typing import Any, Final

import psycopg

from agentflow.cli.checkup.report import Remark, Wrong
from agentflow.comfyui import pool
from agentflow.comfyui.client import Client
from agentflow.comfyui.pool import Known
from agentflow.errors import Transient
from agentflow.system import System

_GB: Final = 1e9


def servers(system: System) -> str | Remark:
    known = _known(system)
    lines, away, sick = [], 0, 0
    for server in system.settings.comfyui_servers:
        client = system.comfyui.of(server.name)
        assert client is not None  # noqa: S101 - made of the same list
        row = known.get(server.name)
        try:
            facts = _facts(client)
        except Transient as error:
            away += 1
            facts = str(error)
        if row is not None and row.problem is not None:
            sick += 1
            facts += f"; left alone by the workers, {row.problem}"
        taken = f"{row.renders if row else 0} of {server.slots} slot{'s' * (server.slots != 1)} taken"
        lines.append(f"{server.name} ({server.pool}): {facts}; {taken}")
    found = f"\n  {'':<11} ".join(lines)
    if away:
        raise Wrong(found, "start it, or correct COMFYUI_URL; renders wait, and go on by themselves when it is back")
    if sick:
        return Remark(found, "a stuck server takes prompts and runs none: start it anew")
    return found


def _known(system: System) -> dict[str, Known]:
    try:
        with system.database.connection() as conn:
            return {each.name: each for each in pool.servers(conn)}
    except psycopg.Error:  # a check of its own says what is wrong there
        return {}


def _facts(client: Client) -> str:
    stats, queue = client.stats(_unhurried), client.remaining(_unhurried)
    devices = stats.get("devices")
    return ", ".join(
        [
            f"ComfyUI {stats['system'].get('comfyui_version') or 'of an unknown version'}",
            *(_device(each) for each in (devices if isinstance(devices, list) else ()) if isinstance(each, dict)),
            f"{queue} prompt{'s' * (queue != 1)} in its queue",
        ]
    )


def _device(device: dict[str, Any]) -> str:
    free, total = (device.get(name) for name in ("vram_free", "vram_total"))
    if not isinstance(free, int | float) or not isinstance(total, int | float):
        return str(device.get("name"))
    return f"{device.get('name')} with {free / _GB:.1f} of {total / _GB:.1f} GB free"


def _unhurried() -> None:
    """Nobody stops a check-up but its user."""
