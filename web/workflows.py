"""Workflows for renders: graphs with parameters, in versions that never change; and the pre-flight of one without rendering."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final

from flask import Response
from pydantic import ConfigDict, Field, model_validator

from agentflow.comfyui import graphs, pool, preflight, versions
from agentflow.comfyui.graphs import InvalidGraph
from agentflow.comfyui.preflight import Complaint
from agentflow.comfyui.requests import PoolName, WorkflowName
from agentflow.comfyui.versions import Listed, NameTaken, TooMany, Workflow
from agentflow.comfyui.workflows import Definition, Parameter
from agentflow.database import Connection
from agentflow.jobs.text import is_storable
from web.api import Answer, Body, Call, Query, Routes, View
from web.cursors import packed, unpacked
from web.problems import Refused, invalid

routes = Routes("workflows")

_WORKFLOW: Final = "/api/workflows/<workflow:name>"
_EXAMPLE: Final[dict[str, Any]] = {
    "graph": {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}},
    },
    "parameters": {"width": {"type": "integer", "paths": ["1.width"], "default": 64, "min": 1, "max": 2048}},
}


class WorkflowRequest(Definition):
    """A workflow; under a name that is there already, a new version of it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "blue", **_EXAMPLE}]})

    name: WorkflowName


class CheckRequest(Body):
    """What to check: one of the three."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["workflow"]}, {"required": ["definition"]}, {"required": ["graph"]}],
            "examples": [{"definition": _EXAMPLE}],
        }
    )

    # Left out, but never null: the default is not checked, and stands in no schema.
    workflow: WorkflowName = Field(default_factory=lambda: None, description="One that is there, the newest version")  # type: ignore[assignment]
    definition: Definition = Field(default_factory=lambda: None, description="As for `POST /api/workflows`")  # type: ignore[assignment]
    graph: dict[str, Any] = Field(default_factory=lambda: None, description="In API format")  # type: ignore[arg-type]
    pool: PoolName = Field("default", description="Whose servers")

    @model_validator(mode="after")
    def _one(self) -> CheckRequest:
        if sum(each is not None for each in (self.workflow, self.definition, self.graph)) != 1:
            raise ValueError("give one of workflow, definition and graph")
        return self


class ListQuery(Query):
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=200)] | None = Field(None, description="`next_cursor` of the page before")


class VersionQuery(Query):
    version: Annotated[int, Field(ge=1, lt=1 << 31)] | None = Field(None, description="Left out: the newest")


class WorkflowSummary(View):
    name: str
    version: int
    description: str
    shipped: bool = Field(description="It came with AgentFlow, and is there for every organization")
    organization_id: int | None = Field(description="Null of one that is shipped")
    digest: str = Field(description="SHA-256 of its content")
    created_at: datetime | None


class WorkflowView(WorkflowSummary):
    graph: dict[str, Any]
    parameters: dict[str, Parameter]
    outputs: list[str] | None = Field(description="The nodes whose outputs count; null: all")


class WorkflowList(View):
    workflows: list[WorkflowSummary] = Field(description="The newest version of each, by name")
    next_cursor: str | None


class VersionList(View):
    versions: list[WorkflowSummary] = Field(description="The newest first; the last two hundred are kept")
    next_cursor: str | None


class ComplaintView(View):
    node: str | None = Field(description="Its id; null: the whole graph")
    input: str | None
    code: str = Field(description="As ComfyUI calls it where it does, such as `value_not_in_list`; `model_missing` …")
    message: str


class CheckView(View):
    checked: bool = Field(description="False: no server of the pool was asked so far, so only the shape was looked at")
    complaints: list[ComplaintView] = Field(
        description="Empty: a render would not be refused. Of a workflow, at its defaults and with each switch thrown"
    )


@routes.get("/api/workflows", {200: WorkflowList}, query=ListQuery)
def search(call: Call, query: ListQuery) -> WorkflowList:
    """List workflows, by name: the organization's own and those that are shipped."""
    after = _read_cursor(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = versions.search(conn, call.sees, after=after, limit=query.limit + 1)
    page = found[: query.limit]
    return WorkflowList(
        workflows=[_summary(each) for each in page],
        next_cursor=_cursor_of(page[-1]) if len(found) > query.limit else None,
    )


@routes.post(
    "/api/workflows",
    {201: WorkflowView, 200: WorkflowView},
    body=WorkflowRequest,
    scope="manage",
    problems=(409,),
)
def create(call: Call, body: WorkflowRequest) -> Answer:
    """Add a workflow, or a new version of it.

    200: the newest version is the same already. 409: the name is that of a shipped one, or there are too many. A workflow as
    ComfyUI's editor saves it is 422, with the way to export it.
    """
    definition = Definition(**{name: getattr(body, name) for name in Definition.model_fields})
    try:
        with call.system.database.transaction() as conn:
            saved, created = versions.save(conn, call.organization_id, body.name, definition)
    except (NameTaken, TooMany) as error:
        raise Refused(409, str(error)) from None
    return Answer(_view(saved), 201 if created else 200, {"Location": f"/api/workflows/{saved.name}"})


@routes.post("/api/workflows/check", {200: CheckView}, body=CheckRequest, scope="submit", problems=(404,))
def check(call: Call, body: CheckRequest) -> CheckView:
    """Check a workflow or a graph against what the servers of a pool last said of their nodes and models; nothing is kept."""
    nodes = pool.known_nodes(call.system, body.pool)
    if body.graph is not None:
        try:
            found = preflight.complaints(graphs.parse(body.graph), nodes) if nodes is not None else []
        except InvalidGraph as error:
            raise invalid("graph", str(error)) from None
    else:
        definition = body.definition
        if body.workflow is not None:
            with call.system.database.connection() as conn:
                definition = _find(call, conn, body.workflow).definition
        found = preflight.of_definition(definition, nodes) if nodes is not None else []
    return CheckView(checked=nodes is not None, complaints=[_complaint(each) for each in found])


@routes.get(_WORKFLOW, {200: WorkflowView}, query=VersionQuery, problems=(404,))
def show(call: Call, name: str, query: VersionQuery) -> WorkflowView:
    """Look at a workflow: its newest version, or another one."""
    with call.system.database.connection() as conn:
        return _view(_find(call, conn, name, query.version))


@routes.get(f"{_WORKFLOW}/versions", {200: VersionList}, query=ListQuery, problems=(404,))
def history(call: Call, name: str, query: ListQuery) -> VersionList:
    """List the versions of a workflow, the newest first."""
    before = _read_number(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = versions.history(conn, _find(call, conn, name), before=before, limit=query.limit + 1)
    page = found[: query.limit]
    return VersionList(
        versions=[_summary(each) for each in page],
        next_cursor=str(page[-1].version) if len(found) > query.limit else None,
    )


@routes.delete(_WORKFLOW, {204: "It is gone"}, scope="manage", problems=(404, 409))
def delete(call: Call, name: str) -> Response:
    """Delete a workflow with all its versions; renders that wait for their turn with it fail. A shipped one stays: 409."""
    with call.system.database.transaction() as conn:
        found = _find(call, conn, name)
        if found.organization_id is None:
            raise Refused(409, f"the workflow {name!r} is shipped with AgentFlow and cannot be deleted")
        versions.delete(conn, found.organization_id, name)
    return Response(status=204)


def _find(call: Call, conn: Connection, name: str, version: int | None = None) -> Workflow:
    found = versions.find(conn, call.sees, name, version, own=call.organization_id) if "\x00" not in name else None
    if found is None:
        of_it = f" with a version {version}" if version is not None else ""
        raise Refused(404, f"there is no workflow {name!r}{of_it}")
    return found


def _summary(each: Listed) -> WorkflowSummary:
    return WorkflowSummary(
        name=each.name,
        version=each.version,
        description=each.description,
        shipped=each.organization_id is None,
        organization_id=each.organization_id,
        digest=each.digest,
        created_at=each.created_at,
    )


def _view(workflow: Workflow) -> WorkflowView:
    definition = workflow.definition
    return WorkflowView(
        **_summary(workflow.listed).model_dump(),
        graph=definition.graph,
        parameters=definition.parameters,
        outputs=definition.outputs,
    )


def _complaint(each: Complaint) -> ComplaintView:
    return ComplaintView(node=each.node, input=each.input, code=each.code, message=each.message)


def _cursor_of(last: Listed) -> str:
    return packed(f"{last.organization_id or 0}:{last.name}")


def _read_cursor(cursor: str) -> tuple[str, int]:
    try:
        number, _, name = unpacked(cursor).partition(":")
        if is_storable(name):
            return name, _small(number)
    except (ValueError, AttributeError, TypeError):
        pass
    raise invalid("cursor", "is not a next_cursor of ours", "query")


def _read_number(cursor: str) -> int:
    try:
        return min(_small(cursor), (1 << 31) - 1)
    except ValueError:
        raise invalid("cursor", "is not a next_cursor of ours", "query") from None


def _small(digits: str) -> int:
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 18:
        raise ValueError("is no number of ours")
    return int(digits)
