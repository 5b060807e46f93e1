"""The render that a request becomes: the payload of a `comfy_render` job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentflow.comfyui import versions
from agentflow.database import Connection


def places(conn: Connection, organization_id: int, workflow: str) -> list[str]:
    """The workflow's names for pictures, in their order: an album has no more places than these."""
    found = versions.find(conn, organization_id, workflow)
    if found is None:
        return ["image"]  # it is refused by its name
    return [name for name, parameter in found.definition.parameters.items() if parameter.type == "image"]


def render_of(workflow: str, prompt: str, names: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """Of the first pictures, for which there are places. No seed is named: each render draws its own."""
    images = {name: {"artefact": key} for name, key in zip(names, keys, strict=False)}
    return {"workflow": workflow, "parameters": {"prompt": prompt}, "images": images}
