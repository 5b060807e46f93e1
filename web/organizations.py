"""Organizations and their API keys, for the operator's key."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

from pydantic import AwareDatetime, ConfigDict, Field, Strict

from agentflow import organizations
from agentflow.organizations import ApiKey, Scope
from web.api import Answer, Body, Call, Query, Routes, View
from web.cursors import cursor_of, read_cursor
from web.jobs import Word, within_calendars
from web.problems import Refused

routes = Routes("organizations")

MAX_GRACE_S: Final = 30 * 86_400.0


class OrganizationRequest(Body):
    slug: Annotated[str, Field(pattern=rf"^{organizations.SLUG.pattern}$")] = Field(
        description="What the command line and `X-Organization` name it by"
    )
    name: Word | None = Field(None, description="For people; the slug if left out")


class OrganizationView(View):
    id: int
    slug: str
    name: str
    created_at: datetime


class OrganizationQuery(Query):
    after: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(0, description="The last id of the page before")
    limit: Annotated[int, Field(ge=1, le=100)] = 50


class OrganizationList(View):
    organizations: list[OrganizationView] = Field(description="By id")


class KeyRequest(Body):
    name: Word = Field(description="What uses the key")
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4)] = Field(
        description="submit: hand work in; read: look; manage: cancel and try again; webhooks: signing secrets and replays"
    )
    expires_at: Annotated[AwareDatetime, Strict()] | None = Field(None, description="Null: it does not expire")


class RotationRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"grace_s": 86_400}]})

    grace_s: Annotated[float, Field(ge=0, le=MAX_GRACE_S)] = Field(
        organizations.ROTATION_GRACE_S, description="Seconds for which the old key still works"
    )


class KeyView(View):
    id: UUID
    organization_id: int
    name: str
    prefix: str = Field(description="How the key begins")
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="To a minute or so")
    successor_id: UUID | None = Field(description="The key that it was rotated to")


class KeyCreated(KeyView):
    key: str = Field(description="The key itself: shown now, and never again")


class KeyQuery(Query):
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class KeyList(View):
    keys: list[KeyView] = Field(description="The newest first")
    next_cursor: str | None


@routes.get("/api/organizations", {200: OrganizationList}, query=OrganizationQuery, scope="admin")
def search(call: Call, query: OrganizationQuery) -> OrganizationList:
    """List organizations."""
    with call.system.database.connection() as conn:
        found = organizations.every(conn, after=query.after, limit=query.limit)
    return OrganizationList(
        organizations=[OrganizationView(id=o.id, slug=o.slug, name=o.name, created_at=o.created_at) for o in found]
    )


@routes.post("/api/organizations", {201: OrganizationView}, body=OrganizationRequest, scope="admin", problems=(409,))
def create(call: Call, body: OrganizationRequest) -> Answer:
    """Make an organization."""
    try:
        with call.system.database.transaction() as conn:
            made = organizations.create(conn, body.slug, body.name or body.slug)
    except organizations.SlugTaken as error:
        raise Refused(409, str(error)) from None
    return Answer(OrganizationView(id=made.id, slug=made.slug, name=made.name, created_at=made.created_at), 201)


@routes.get("/api/keys", {200: KeyList}, query=KeyQuery, scope="admin")
def search_keys(call: Call, query: KeyQuery) -> KeyList:
    """List keys: of the organization that `X-Organization` names, or of all."""
    before = read_cursor(query.cursor) if query.cursor is not None else None
    with call.system.database.connection() as conn:
        found = organizations.keys(conn, call.sees, before=before, limit=query.limit + 1)
    page = found[: query.limit]
    return KeyList(
        keys=[_view(key) for key in page],
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@routes.post("/api/keys", {201: KeyCreated}, body=KeyRequest, scope="admin")
def create_key(call: Call, body: KeyRequest) -> Answer:
    """Make a key for the organization that `X-Organization` names (number 1 without it)."""
    with call.system.database.transaction() as conn:
        made, key = organizations.create_key(
            conn, call.organization_id, body.name, body.scopes, expires_at=within_calendars(body.expires_at)
        )
    return Answer(_created(made, key), 201)


@routes.post(
    "/api/keys/<uuid:key_id>/rotate", {201: KeyCreated}, body=RotationRequest, scope="admin", problems=(404, 409)
)
def rotate_key(call: Call, key_id: UUID, body: RotationRequest) -> Answer:
    """Make a key with the same name, scopes and expiry; the old one ends after `grace_s`. 409: it has ended already."""
    with call.system.database.transaction() as conn:
        rotated = organizations.rotate_key(conn, call.sees, key_id, grace_s=body.grace_s)
        if rotated is None:
            if organizations.get_key(conn, call.sees, key_id) is None:
                raise _unknown(key_id)
            raise Refused(409, "this key was revoked or has expired: make a new one")
    return Answer(_created(*rotated), 201)


@routes.post("/api/keys/<uuid:key_id>/revoke", {200: KeyView}, scope="admin", problems=(404,))
def revoke_key(call: Call, key_id: UUID) -> KeyView:
    """End a key: it is refused within a few seconds, everywhere."""
    with call.system.database.transaction() as conn:
        key = organizations.revoke_key(conn, call.sees, key_id)
    if key is None:
        raise _unknown(key_id)
    return _view(key)


def _unknown(key_id: UUID) -> Refused:
    return Refused(404, f"there is no key {key_id}")


def _view(key: ApiKey) -> KeyView:
    return KeyView(**{name: getattr(key, name) for name in KeyView.model_fields})


def _created(made: ApiKey, key: str) -> KeyCreated:
    return KeyCreated(**{name: getattr(made, name) for name in KeyView.model_fields}, key=key)
