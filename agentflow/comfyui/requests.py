"""A request for a render, and what becomes of it: the graph that is sent, and the images that go into it first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from agentflow.comfyui import graphs
from agentflow.database import Connection
from agentflow.jobs.registry import Payload

#: The type of the jobs that render.
TYPE: Final = "comfy_render"


class Image(Payload):
    artefact: str | None = None
    url: str | None = None


class RenderRequest(Payload):
    workflow: str | None = None
    version: int | None = None
    parameters: dict[str, Any] = {}
    graph: dict[str, Any] | None = None
    images: dict[str, Image] = {}
    pool: str = "default"


@dataclass(frozen=True, slots=True)
class Place:
    node: str
    input: str
    image: Image


@dataclass(frozen=True, slots=True)
class Prepared:
    graph: graphs.Graph
    images: tuple[Place, ...]
    outputs: frozenset[str] | None
    provenance: dict[str, Any]


def folder(organization_id: int, job_id: UUID, request: RenderRequest | None = None) -> str:
    """Where a render keeps its files: what was uploaded for it, and what came out."""
    return f"o/{organization_id}/renders/{job_id}"


def prepare(
    conn: Connection, organization_id: int, request: RenderRequest, *, drawn_from: UUID | None = None
) -> Prepared:
    places = [Place(*name.split(".", 1), image) for name, image in request.images.items()]
    return Prepared(dict(request.graph or {}), tuple(places), None, {"workflow": None})
