"""Endpoints for webhooks: made, set, rotated, disabled. Tokens and secrets are shown when they are made, and never again."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import ConfigDict, Field

from agentflow.database import Connection
from agentflow.fetch import Guard
from agentflow.webhooks import config, endpoints
from agentflow.webhooks.config import Config, InvalidConfig
from agentflow.webhooks.endpoints import Endpoint, Kind
from web.api import Answer, Body, Call, Query, Routes, View
from web.cursors import cursor_of, read_cursor
from web.jobs import Word
from web.problems import Refused, invalid

routes = Routes("webhook-endpoints")

Source = Literal["standard", "github", "stripe", "slack", "telegram", "kommo", "kommo_chats", "generic"]
MAX_GRACE_S: Final = 30 * 86_400.0
Secret = Annotated[str, Field(min_length=1, max_length=500)]
SilenceAfter = Annotated[float, Field(ge=60, le=366 * 86_400.0)]


class _Settings(Body):
    name: Word = Field(description="For people")
    config: Config = Field(Config(), description="What becomes of its events; left out: they are kept")
    silence_after_s: SilenceAfter | None = Field(
        None, description="Seconds without a webhook after which the alarm is raised; null: never"
    )


class EndpointRequest(_Settings):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "source": "github",
                    "name": "issues",
                    "config": {
                        "action": {"kind": "job", "type": "ping", "payload": {"sleep_ms": {"$from": "/issue/number"}}}
                    },
                }
            ]
        }
    )

    source: Source = Field(description="`standard` is Standard Webhooks and Svix, `generic` any HMAC")
    secret: Secret | None = Field(
        None,
        description="What the sender signs with, where the vendor shows it (Stripe, Slack, Kommo's chats); else made here",
    )


class EndpointChange(_Settings):
    """All of it is set: what is left out goes back to its default."""


class RotationRequest(Body):
    kind: Kind = Field("secret", description="`secret`: what is signed with; `token`: the end of the URL")
    secret: Secret | None = Field(None, description="The vendor's new one, where the vendor makes it")
    grace_s: Annotated[float, Field(ge=0, le=MAX_GRACE_S)] = Field(
        endpoints.ROTATION_GRACE_S, description="Seconds for which the one before this one still works"
    )


class CredentialView(View):
    id: UUID
    kind: Kind
    created_at: datetime
    expires_at: datetime | None = Field(description="Null: until another is made")


class EndpointView(View):
    id: UUID
    organization_id: int
    source: Source
    name: str
    config: Config
    silence_after_s: float | None
    silent_since: datetime | None = Field(description="No webhook came for longer than allowed, as was noticed then")
    created_at: datetime
    disabled_at: datetime | None


class EndpointWhole(EndpointView):
    credentials: list[CredentialView] = Field(description="The tokens and secrets that work now, the newest first")


class EndpointCreated(EndpointView):
    path: str = Field(description="Where webhooks go, on this server; with the token: shown now, and never again")
    secret: str | None = Field(
        description="To enter at the sender: shown now, and never again; null: none was made here"
    )


class Rotated(View):
    path: str | None = Field(description="The new address, for a token: shown now, and never again")
    secret: str | None = Field(description="The new secret, where it was made here: shown now, and never again")


class EndpointQuery(Query):
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class EndpointList(View):
    endpoints: list[EndpointView] = Field(description="The newest first")
    next_cursor: str | None


@routes.post("/api/webhook-endpoints", {201: EndpointCreated}, body=EndpointRequest, scope="webhooks")
def create(call: Call, body: EndpointRequest) -> Answer:
    """Make an endpoint: an address that one sender posts its webhooks to."""
    _check(call, body.source, body.config)
    try:
        with call.system.database.transaction() as conn:
            made, token, secret = endpoints.create(
                conn,
                call.organization_id,
                body.source,
                body.name,
                body.config,
                call.system.sealer,
                secret=body.secret,
                silence_after_s=body.silence_after_s,
            )
    except ValueError as error:
        raise invalid("secret", str(error)) from None
    view = EndpointCreated(**_columns(made), path=_path(made, token), secret=secret)
    return Answer(view, 201, {"Location": f"/api/webhook-endpoints/{made.id}"})


@routes.get("/api/webhook-endpoints", {200: EndpointList}, query=EndpointQuery)
def search(call: Call, query: EndpointQuery) -> EndpointList:
    """List endpoints, the newest first."""
    before = read_cursor(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = endpoints.every(conn, call.sees, before=before, limit=query.limit + 1)
    page = found[: query.limit]
    return EndpointList(
        endpoints=[EndpointView(**_columns(each)) for each in page],
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.get("/api/webhook-endpoints/<uuid:endpoint_id>", {200: EndpointWhole}, problems=(404,))
def show(call: Call, endpoint_id: UUID) -> EndpointWhole:
    """Look at an endpoint: what becomes of its events, whether it is silent, and what opens it."""
    with call.system.database.connection() as conn:
        endpoint = endpoints.get(conn, call.sees, endpoint_id)
        if endpoint is None:
            raise _unknown(endpoint_id)
        live = endpoints.credentials(conn, endpoint)
    return EndpointWhole(
        **_columns(endpoint),
        credentials=[
            CredentialView(id=c.id, kind=c.kind, created_at=c.created_at, expires_at=c.expires_at) for c in live
        ],
    )


@routes.post(
    "/api/webhook-endpoints/<uuid:endpoint_id>",
    {200: EndpointView},
    body=EndpointChange,
    scope="webhooks",
    problems=(404,),
)
def change(call: Call, endpoint_id: UUID, body: EndpointChange) -> EndpointView:
    """Set an endpoint anew. Events that wait are handled by what is set then."""
    with call.system.database.connection() as conn:
        known = endpoints.get(conn, call.sees, endpoint_id)
    if known is None:
        raise _unknown(endpoint_id)
    _check(call, known.source, body.config)
    with call.system.database.transaction() as conn:
        set_ = endpoints.change(conn, known, name=body.name, config=body.config, silence_after_s=body.silence_after_s)
    return EndpointView(**_columns(set_))


@routes.post(
    "/api/webhook-endpoints/<uuid:endpoint_id>/rotate",
    {201: Rotated},
    body=RotationRequest,
    scope="webhooks",
    problems=(404,),
)
def rotate(call: Call, endpoint_id: UUID, body: RotationRequest) -> Answer:
    """Make a new secret, or a new token. The one before it works for `grace_s`; more than two never do."""
    if body.kind == "token" and body.secret is not None:
        raise invalid("secret", "goes with the kind `secret`; tokens are made here")
    try:
        with call.system.database.transaction() as conn:
            endpoint = _find(call, conn, endpoint_id)
            made = endpoints.rotate(
                conn, endpoint, body.kind, call.system.sealer, secret=body.secret, grace_s=body.grace_s
            )
    except ValueError as error:
        raise invalid("kind" if body.secret is None else "secret", str(error)) from None
    is_token = body.kind == "token"
    path = _path(endpoint, made) if is_token and made is not None else None
    return Answer(Rotated(path=path, secret=None if is_token else made), 201)


@routes.post(
    "/api/webhook-endpoints/<uuid:endpoint_id>/disable", {200: EndpointView}, scope="webhooks", problems=(404,)
)
def disable(call: Call, endpoint_id: UUID) -> EndpointView:
    """Take nothing more in: within a few seconds the address is unknown. What has come stays, and may be replayed."""
    with call.system.database.transaction() as conn:
        return EndpointView(**_columns(endpoints.disable(conn, _find(call, conn, endpoint_id))))


@routes.post("/api/webhook-endpoints/<uuid:endpoint_id>/enable", {200: EndpointView}, scope="webhooks", problems=(404,))
def enable(call: Call, endpoint_id: UUID) -> EndpointView:
    """Take webhooks in again, by the same token and secrets."""
    with call.system.database.transaction() as conn:
        return EndpointView(**_columns(endpoints.enable(conn, _find(call, conn, endpoint_id))))


def _check(call: Call, source: str, wanted: Config) -> None:
    try:
        config.check(source, wanted, guard=Guard(allow=call.system.settings.fetch_allow))
    except InvalidConfig as error:
        raise invalid(f"config.{error.field}", error.problem) from None


def _find(call: Call, conn: Connection, endpoint_id: UUID) -> Endpoint:
    endpoint = endpoints.get(conn, call.sees, endpoint_id)
    if endpoint is None:
        raise _unknown(endpoint_id)
    return endpoint


def _unknown(endpoint_id: UUID) -> Refused:
    return Refused(404, f"there is no webhook endpoint {endpoint_id}")


def _path(endpoint: Endpoint, token: str) -> str:
    return f"/webhooks/{endpoint.source}/{token}"


def _columns(endpoint: Endpoint) -> dict[str, Any]:
    return {name: getattr(endpoint, name) for name in EndpointView.model_fields}
