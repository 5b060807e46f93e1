"""What is asked and answered about CRM accounts."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, ConfigDict, Field

from agentflow.jobs.text import is_storable
from agentflow.kommo.accounts import AccountState
from agentflow.kommo.runs import Mode, RunState
from web.api import Body, Query, View
from web.jobs import Word


def _storable_fields(item: dict[str, Any]) -> dict[str, Any]:
    if not is_storable(str(item)):
        raise ValueError("holds a NUL character or half of a surrogate pair, which cannot be stored")
    return item


Secret = Annotated[str, Field(min_length=1, max_length=8000, pattern=r"^[!-~]+$")]
Item = Annotated[dict[str, Any], AfterValidator(_storable_fields)]


class AccountRequest(Body):
    """With a long-lived `token`, or with the `code` that Kommo sent to your redirect address."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"host": "example.kommo.com", "token": "eyJ0eXAi.x.y"}]})

    host: Word = Field(description="The account's host, such as `example.kommo.com` (`referer` in Kommo's redirect)")
    name: Word | None = Field(None, description="For people; the host if left out")
    token: Secret | None = Field(None, description="A long-lived token of a private integration")
    code: Secret | None = Field(None, description="An authorization code; good for 20 minutes, once")
    client_id: Secret | None = Field(None, description="With `code`: the integration, where it is not KOMMO_CLIENT_ID")
    client_secret: Secret | None = Field(None, description="Its secret key")
    redirect_uri: Secret | None = Field(None, description="Its redirect address, exactly as registered")


class AccountChange(Body):
    """What is left out stays. With `token` (or `code`) the account is connected again."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"sync_every_s": 600}]})

    name: Word | None = None
    sync_every_s: Annotated[int, Field(ge=60, le=86_400)] | None = Field(None, description="Seconds between two syncs")
    reconcile_every_s: Annotated[int, Field(ge=3600, le=31_536_000)] | None = Field(
        None, description="Seconds between two walks over everything"
    )
    delete_share: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="More deletions than this share of a kind of thing wait to be confirmed"
    )
    token: Secret | None = None
    code: Secret | None = None


class AccountView(View):
    id: UUID
    organization_id: int
    name: str
    host: str
    remote_id: int | None = Field(description="The account's number at Kommo, once it has answered")
    auth: Literal["token", "oauth"]
    state: AccountState = Field(
        description="connecting: its first sync finds out; connected; needs_reauth: connect it again; blocked: by Kommo"
    )
    state_reason: str | None
    reauth_by: datetime | None = Field(description="Its token could not be renewed, and ends then: connect it again")
    sync_every_s: int
    reconcile_every_s: int
    delete_share: float
    next_sync_at: datetime
    next_reconcile_at: datetime
    deletions_held: int | None = Field(description="So many wait to be confirmed")
    created_at: datetime


class PageQuery(Query):
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class AccountList(View):
    accounts: list[AccountView] = Field(description="The newest first")
    next_cursor: str | None


class AuthorizationRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{}]})

    account_id: UUID | None = Field(None, description="The account to connect again; a new one if left out")
    name: Word | None = None


class AuthorizationView(View):
    url: str = Field(description="Send the user there; Kommo sends the browser on to `/crm/oauth/callback`")
    expires_at: datetime


class CallbackQuery(Query):
    state: Annotated[str, Field(max_length=1000)] = Field(description="As it was given to Kommo")
    code: Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[!-~]+$")] | None = None
    referer: Annotated[str, Field(max_length=300)] | None = Field(None, description="The account's host")
    client_id: Annotated[str, Field(max_length=200)] | None = None
    from_widget: Annotated[str, Field(max_length=200)] | None = None
    platform: Annotated[str, Field(max_length=200)] | None = None
    error: Annotated[str, Field(max_length=200)] | None = None


class SyncRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"mode": "reconcile"}]})

    mode: Literal["incremental", "backfill", "reconcile"] = Field(
        "incremental",
        description="`incremental`: what has changed; `backfill`: everything; `reconcile`: the same, and what is gone is deleted",
    )


class RunView(View):
    id: UUID
    job_id: UUID
    mode: Mode
    plan: bool = Field(description="A dry run: the counts are what the run would do")
    state: RunState = Field(description="held: more is gone than may be deleted unasked")
    calls: int = Field(description="Of Kommo's API")
    counts: dict[str, dict[str, int]] = Field(
        description="By kind of thing: created, updated, unchanged, stale, deleted, held"
    )
    error: str | None
    started_at: datetime
    finished_at: datetime | None


class RunList(View):
    runs: list[RunView] = Field(description="The newest first")
    next_cursor: str | None


class MirrorQuery(Query):
    type: Literal[
        "leads",
        "contacts",
        "companies",
        "tasks",
        "lead_notes",
        "contact_notes",
        "company_notes",
        "pipelines",
        "users",
        "lead_fields",
        "contact_fields",
        "company_fields",
        "events",
    ] = "leads"
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    cursor: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="`cursor` of the page before: also that of the last page, to find what changed since"
    )


class MirrorRow(View):
    id: int | str
    updated_at: int = Field(description="Unix seconds by Kommo's clock; 0 where it names none")
    deleted_at: datetime | None
    data: dict[str, Any] = Field(description="As Kommo's API gives it")


class MirrorList(View):
    rows: list[MirrorRow] = Field(description="In the order of their last change here; what is gone is among them")
    cursor: str = Field(description="Where to go on, now or later")
    more: bool


class DriftRow(View):
    type: str
    field: str
    kind: str
    first_seen_at: datetime


class DriftView(View):
    fields: list[DriftRow] = Field(description="Fields of Kommo's that nobody expected; they are kept in `data`")


class WriteItems(Body):
    """Up to 50, as Kommo's API takes them: with an `id` a thing is changed, without one it is made."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"items": [{"name": "A lead", "price": 100}]}]})

    items: Annotated[list[Item], Field(min_length=1, max_length=50)]


class TaskItems(WriteItems):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {"text": "Call", "complete_till": 1_900_000_000, "entity_id": 1, "entity_type": "leads"},
                    ]
                }
            ]
        }
    )


class NoteItems(WriteItems):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"of": "leads", "items": [{"entity_id": 1, "note_type": "common", "params": {"text": "Hi"}}]}]
        }
    )

    of: Literal["leads", "contacts", "companies"] = Field("leads", description="What the notes are about")
