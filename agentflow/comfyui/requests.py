"""A request for a render, and what becomes of it: the graph that is sent, and the images that go into it first."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import Field, model_validator

from agentflow.comfyui import graphs, versions, workflows
from agentflow.comfyui.graphs import Graph, InvalidGraph
from agentflow.comfyui.versions import Workflow
from agentflow.comfyui.workflows import Filled, InvalidParameters
from agentflow.database import Connection
from agentflow.errors import Permanent
from agentflow.jobs.registry import Payload
from agentflow.storage import Storage

#: The type of the jobs that render.
TYPE: Final = "comfy_render"
MAX_IMAGES: Final = 8
#: Beyond it a program in JavaScript would send another number back.
_DRAWN_BITS: Final = 53
_SEED_INPUTS: Final = ("seed", "noise_seed")

WorkflowName = Annotated[str, Field(pattern=versions.NAME_PATTERN)]
PoolName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,49}$")]


class Image(Payload):
    """A picture to work on: one of the two."""

    artefact: Annotated[str, Field(min_length=1, max_length=900)] | None = Field(
        None, description="The key of a file in storage, of the same organization: from a job's result"
    )
    url: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="http(s), a public address"
    )

    @model_validator(mode="after")
    def _one(self) -> Image:
        if (self.artefact is None) == (self.url is None):
            raise ValueError("give either artefact or url")
        return self


class RenderRequest(Payload):
    """What to render: a workflow by its name, with values for its parameters, or a whole graph."""

    workflow: WorkflowName | None = Field(None, description="One of `GET /api/workflows`")
    version: Annotated[int, Field(ge=1, lt=1 << 31)] | None = Field(
        None, description="Of the workflow; left out: the newest"
    )
    parameters: dict[str, Any] = Field({}, description="Values by the workflow's names for them")
    graph: dict[str, Any] | None = Field(
        None, description="In place of a workflow: a graph in API format (ComfyUI: Workflow → Export (API))"
    )
    images: Annotated[dict[str, Image], Field(max_length=MAX_IMAGES)] = Field(
        {}, description="By the workflow's names for them; of a graph by `<node id>.<input>`, such as `78.image`"
    )
    pool: PoolName = Field("default", description="Which servers may do it")

    @model_validator(mode="after")
    def _one(self) -> RenderRequest:
        if (self.workflow is None) == (self.graph is None):
            raise ValueError("give either workflow or graph")
        if self.workflow is None and (self.version is not None or self.parameters):
            raise ValueError("version and parameters belong to a workflow; a graph has its values in its nodes")
        return self


@dataclass(frozen=True, slots=True)
class Place:
    """The name under which a server took the image belongs in this input of this node."""

    node: str
    input: str
    image: Image


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is sent once the images are in their places. `outputs` are the nodes whose outputs count (None: all); `provenance`
    is what the result says of where it came from."""

    graph: Graph
    images: tuple[Place, ...]
    outputs: frozenset[str] | None
    provenance: dict[str, Any]


class InvalidRender(Permanent):
    """This cannot be rendered. `problems` are pairs of a field of the request (`parameters.steps`) and what would be right."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {problem}" for field, problem in problems), code="render_invalid")
        self.problems = problems


def folder(organization_id: int, job_id: UUID, request: RenderRequest | None = None) -> str:
    """Where a render keeps its files: what was uploaded for it, and what came out."""
    return f"o/{organization_id}/renders/{job_id}"


def prepare(
    conn: Connection, organization_id: int, request: RenderRequest, *, drawn_from: UUID | None = None
) -> Prepared:
    """The graph of a request, checked against its workflow; whether a server can run it is for the pre-flight to say.

    A seed that the request does not name follows from `drawn_from` (the job's id: each attempt renders the same), else it is
    drawn anew at each call; `pinned` writes it into the request. Raises InvalidRender.
    """
    problems = [
        (f"images.{name}.artefact", "is not a key of a file of this organization")
        for name, image in request.images.items()
        if image.artefact is not None and not is_own(organization_id, image.artefact)
    ]
    if problems:
        raise InvalidRender(problems)
    if request.graph is not None:
        return _of_graph(request, request.graph)
    workflow = _find(conn, organization_id, request)
    filled = _fill(workflow, request, _draw if drawn_from is None else lambda name: _follow(drawn_from, name))
    places = [Place(node, name, request.images[image]) for image, at in filled.places.items() for node, name in at]
    outputs = workflow.definition.outputs
    provenance = {
        "workflow": workflow.name,
        "version": workflow.version,
        "digest": workflow.digest,
        "parameters": filled.values,
        "seeds": filled.seeds,
    }
    return _prepared(filled.graph, places, outputs, provenance)


def pinned(conn: Connection, organization_id: int, request: RenderRequest) -> RenderRequest:
    """The same request with the newest version and with seeds in it, so that it means the same from now on.

    Raises InvalidRender.
    """
    if request.graph is not None:
        return request
    workflow = _find(conn, organization_id, request)
    seeds = _fill(workflow, request, _draw).seeds
    return request.model_copy(update={"version": workflow.version, "parameters": {**request.parameters, **seeds}})


def is_own(organization_id: int, key: str) -> bool:
    """Whether a storage key is the organization's, and a key at all."""
    try:
        return Storage.check_key(key).startswith(f"o/{organization_id}/")
    except ValueError:
        return False


def _find(conn: Connection, organization_id: int, request: RenderRequest) -> Workflow:
    assert request.workflow is not None  # noqa: S101 - one of the two
    found = versions.find(conn, organization_id, request.workflow, request.version)
    if found is not None:
        return found
    if request.version is not None and versions.find(conn, organization_id, request.workflow) is not None:
        raise InvalidRender(
            [("version", f"the workflow {request.workflow!r} has no version {request.version} any more")]
        )
    known = ", ".join(versions.names(conn, organization_id))
    raise InvalidRender([("workflow", f"there is no workflow {request.workflow!r}; there are {known}")])


def _fill(workflow: Workflow, request: RenderRequest, draw: Callable[[str], int]) -> Filled:
    try:
        return workflows.fill(workflow.definition, request.parameters, request.images, draw)
    except InvalidParameters as error:
        raise InvalidRender(error.problems) from None


def _of_graph(request: RenderRequest, given: Any) -> Prepared:
    try:
        graph = graphs.parse(given)
    except InvalidGraph as error:
        raise InvalidRender([(f"graph.{error.node}" if error.node is not None else "graph", error.problem)]) from None
    places, problems = [], []
    for name, image in request.images.items():
        try:
            node, input_ = graphs.place(name)
        except ValueError as error:
            problems.append((f"images.{name}", f"for a graph, images are named by their place: {error}"))
            continue
        if node in graph:
            places.append(Place(node, input_, image))
        else:
            problems.append((f"images.{name}", f"the graph has no node {node!r}"))
    if problems:
        raise InvalidRender(problems)
    provenance = {"workflow": None, "version": None, "digest": None, "parameters": {}, "seeds": dict(_seeds(graph))}
    return _prepared(graph, places, None, provenance)


def _prepared(graph: Graph, places: list[Place], outputs: list[str] | None, provenance: dict[str, Any]) -> Prepared:
    """With nothing where the images belong: the file names of another machine are not sent."""
    graph = dict(graph)
    for place in places:
        node = graph[place.node]
        graph[place.node] = {**node, "inputs": {**node["inputs"], place.input: ""}}
    return Prepared(graph, tuple(places), frozenset(outputs) if outputs is not None else None, provenance)


def _seeds(graph: Graph) -> Iterator[tuple[str, int]]:
    for id_, node in graph.items():
        for name in _SEED_INPUTS:
            if isinstance(node["inputs"].get(name), int):
                yield f"{id_}.{name}", node["inputs"][name]


def _draw(_: str) -> int:
    return secrets.randbits(_DRAWN_BITS)


def _follow(source: UUID, name: str) -> int:
    digest = hashlib.sha256(f"{source}:{name}".encode()).digest()
    return int.from_bytes(digest[:8]) >> (64 - _DRAWN_BITS)
