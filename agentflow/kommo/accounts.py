"""Connected accounts: what is known of them, and what stops them. tokens.py has their tokens, syncing.py their syncs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import UUID

from agentflow import log
from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.secrets import Sealer, context_of

if TYPE_CHECKING:
    pass

logger = log.get(__name__)

AccountState = Literal["connecting", "connected", "needs_reauth", "blocked", "removed"]
_PURGE_BATCH: Final = 5000


@dataclass(frozen=True, slots=True)
class Account:
    """`auth`: a long-lived token, or OAuth. `state_reason` says what stopped it; `deletions_held`: how many wait for a person."""

    id: UUID
    organization_id: int
    name: str
    base_url: str
    remote_id: int | None
    auth: Literal["token", "oauth"]
    state: AccountState
    state_reason: str | None
    access_expires_at: datetime | None
    grant_refused_at: datetime | None
    sync_every_s: int
    reconcile_every_s: int
    delete_share: float
    next_sync_at: datetime
    next_reconcile_at: datetime
    sweep_started_at: datetime | None
    deletions_held: int | None
    deletions_confirmed: int | None
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Credentials:
    """A long-lived token, or a code that buys one; with the integration's own client where it is not the installation's."""

    token: str | None = None
    code: str | None = None
    client_id: str | None = None
    client_secret: str | None = None
    redirect_uri: str | None = None


_COLUMNS: Final = ", ".join(Account.__dataclass_fields__)
_SEEN: Final = "(%(organization)s::bigint is null or organization_id = %(organization)s) and state <> 'removed'"


def purpose(what: str) -> str:
    return f"crm_account_{what}"


def context(organization_id: int, account_id: UUID, what: str) -> str:
    """What a sealed value is bound to."""
    return context_of(purpose(what), organization_id, account_id)


def create(
    conn: Connection, organization_id: int, sealer: Sealer, *, name: str, base_url: str, credentials: Credentials
) -> Account:
    """Its first sync finds out whether the credentials are good."""
    account_id = new_id()
    row = conn.execute(
        "insert into agentflow.crm_accounts (id, organization_id, name, base_url, auth, access_sealed, grant_type,"  # noqa: S608
        " grant_sealed, client_id, client_sealed, redirect_uri) values (%(id)s, %(organization)s, %(name)s, %(base_url)s,"
        " %(auth)s, %(access)s, %(grant_type)s, %(grant)s, %(client_id)s, %(client)s, %(redirect_uri)s)"
        f" returning {_COLUMNS}",
        {
            "id": account_id,
            "organization": organization_id,
            "name": name,
            "base_url": base_url,
            **_sealed(sealer, organization_id, account_id, credentials),
        },
    ).fetchone()
    assert row is not None  # noqa: S101 - an INSERT returns its row
    return Account(*row)


def reconnect(
    conn: Connection,
    organization_id: int,
    account_id: UUID,
    sealer: Sealer,
    credentials: Credentials,
    *,
    base_url: str | None = None,
) -> Account | None:
    """New credentials for an account, whatever stopped it. None: there is no such account."""
    row = conn.execute(
        "update agentflow.crm_accounts set auth = %(auth)s, access_sealed = %(access)s, access_expires_at = null,"  # noqa: S608
        " access_renew_at = null, grant_type = %(grant_type)s, grant_sealed = %(grant)s, grant_begun_at = null,"
        " grant_held_until = null, grant_refused_at = null, client_id = coalesce(%(client_id)s, client_id),"
        " client_sealed = coalesce(%(client)s, client_sealed), redirect_uri = coalesce(%(redirect_uri)s, redirect_uri),"
        " base_url = coalesce(%(base_url)s, base_url), state = 'connecting', state_reason = null"
        f" where organization_id = %(organization)s and id = %(id)s and state <> 'removed' returning {_COLUMNS}",
        {
            "id": account_id,
            "organization": organization_id,
            "base_url": base_url,
            **_sealed(sealer, organization_id, account_id, credentials),
        },
    ).fetchone()
    return Account(*row) if row else None


def _sealed(sealer: Sealer, organization_id: int, account_id: UUID, given: Credentials) -> dict[str, Any]:
    def seal(what: str, plain: str | None) -> str | None:
        return sealer.seal(plain, context=context(organization_id, account_id, what)) if plain is not None else None

    return {
        "auth": "token" if given.token is not None else "oauth",
        "access": seal("access", given.token),
        "grant_type": "authorization_code" if given.token is None else None,
        "grant": seal("grant", given.code if given.token is None else None),
        "client_id": given.client_id,
        "client": seal("client", given.client_secret),
        "redirect_uri": given.redirect_uri,
    }


def get(conn: Connection, organization_id: int | None, account_id: UUID) -> Account | None:
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.crm_accounts where {_SEEN} and id = %(id)s",  # noqa: S608 - constants
        {"organization": organization_id, "id": account_id},
    ).fetchone()
    return Account(*row) if row else None


def every(
    conn: Connection, organization_id: int | None, *, before: UUID | None = None, limit: int = 1000
) -> list[Account]:
    """The newest first; of every organization where it is None."""
    rows = conn.execute(
        f"select {_COLUMNS} from agentflow.crm_accounts where {_SEEN}"  # noqa: S608 - constants
        " and (%(before)s::uuid is null or id < %(before)s) order by id desc limit %(limit)s",
        {"organization": organization_id, "before": before, "limit": limit},
    ).fetchall()
    return [Account(*row) for row in rows]


def by_state(conn: Connection, organization_id: int | None) -> dict[AccountState, int]:
    """How many there are; of every organization where it is None."""
    return dict(
        conn.execute(
            f"select state, count(*) from agentflow.crm_accounts where {_SEEN} group by 1",  # noqa: S608 - constants
            {"organization": organization_id},
        ).fetchall()
    )


def change(
    conn: Connection,
    organization_id: int,
    account_id: UUID,
    *,
    name: str | None = None,
    sync_every_s: int | None = None,
    reconcile_every_s: int | None = None,
    delete_share: float | None = None,
) -> Account | None:
    """None leaves as it is. A shorter interval counts from now."""
    row = conn.execute(
        "update agentflow.crm_accounts set name = coalesce(%(name)s, name),"  # noqa: S608 - constants
        " sync_every_s = coalesce(%(sync)s, sync_every_s), reconcile_every_s = coalesce(%(reconcile)s, reconcile_every_s),"
        " delete_share = coalesce(%(share)s, delete_share),"
        " next_sync_at = least(next_sync_at, clock_timestamp() + make_interval(secs => %(sync)s)),"
        " next_reconcile_at = least(next_reconcile_at, clock_timestamp() + make_interval(secs => %(reconcile)s))"
        f" where organization_id = %(organization)s and id = %(id)s and state <> 'removed' returning {_COLUMNS}",
        {
            "organization": organization_id,
            "id": account_id,
            "name": name,
            "sync": sync_every_s,
            "reconcile": reconcile_every_s,
            "share": delete_share,
        },
    ).fetchone()
    return Account(*row) if row else None


def connected(conn: Connection, organization_id: int, account_id: UUID, remote_id: int) -> bool:
    """The credentials are good. False: they are of another account than those before."""
    return (
        conn.execute(
            "update agentflow.crm_accounts set state = 'connected', state_reason = null, remote_id = %(remote)s"
            " where organization_id = %(organization)s and id = %(id)s and state = 'connecting'"
            " and coalesce(remote_id, %(remote)s) = %(remote)s",
            {"organization": organization_id, "id": account_id, "remote": remote_id},
        ).rowcount
        > 0
    )


def stop(
    conn: Connection,
    organization_id: int,
    account_id: UUID,
    state: Literal["needs_reauth", "blocked"],
    reason: str,
) -> None:
    """Nothing is asked of this account until a person has reconnected it. Said once, however many jobs find out."""
    stopped = conn.execute(
        "update agentflow.crm_accounts set state = %s, state_reason = %s where organization_id = %s and id = %s"
        " and state in ('connecting', 'connected')",
        (state, reason, organization_id, account_id),
    ).rowcount
    if stopped:
        logger.error("a CRM account stopped", account_id=str(account_id), state=state, reason=reason)


def hold_deletions(conn: Connection, organization_id: int, account_id: UUID, held: int | None) -> None:
    """So many wait for a person; None: none, and what was confirmed is used up."""
    conn.execute(
        "update agentflow.crm_accounts set deletions_held = %s, deletions_confirmed = null"
        " where organization_id = %s and id = %s",
        (held, organization_id, account_id),
    )


def confirm_deletions(conn: Connection, organization_id: int, account_id: UUID) -> int | None:
    """As many as are held may be deleted by the next reconciliation. None: nothing waits to be confirmed."""
    row = conn.execute(
        "update agentflow.crm_accounts set deletions_confirmed = deletions_held where organization_id = %s and id = %s"
        " and deletions_held is not null and state <> 'removed' returning deletions_confirmed",
        (organization_id, account_id),
    ).fetchone()
    return row[0] if row else None


def remove(conn: Connection, organization_id: int, account_id: UUID) -> bool:
    """The secrets go now, and nobody sees it any more; its mirror goes by `purge`."""
    return (
        conn.execute(
            "update agentflow.crm_accounts set state = 'removed', state_reason = null, access_sealed = null,"
            " grant_sealed = null, client_sealed = null where organization_id = %s and id = %s and state <> 'removed'",
            (organization_id, account_id),
        ).rowcount
        > 0
    )


def is_removed(conn: Connection, organization_id: int, account_id: UUID) -> bool:
    row = conn.execute(
        "select from agentflow.crm_accounts where organization_id = %s and id = %s and state = 'removed'",
        (organization_id, account_id),
    ).fetchone()
    return row is not None


def purge(conn: Connection, organization_id: int, account_id: UUID) -> int:
    """Delete a batch of what a removed account left; with the last of it the account. Returns how many rows."""
    for table in ("crm_entities", "crm_events"):
        deleted = conn.execute(
            f"delete from agentflow.{table} where ctid = any (array(select ctid from agentflow.{table}"  # noqa: S608
            " where organization_id = %s and account_id = %s limit %s))",
            (organization_id, account_id, _PURGE_BATCH),
        ).rowcount
        if deleted:
            return deleted
    for table in ("crm_streams", "crm_touched", "crm_drift", "crm_writes", "sync_runs"):
        conn.execute(
            f"delete from agentflow.{table} where organization_id = %s and account_id = %s",  # noqa: S608 - constants
            (organization_id, account_id),
        )
    return conn.execute(
        "delete from agentflow.crm_accounts where organization_id = %s and id = %s and state = 'removed'",
        (organization_id, account_id),
    ).rowcount


def next_end_s(conn: Connection) -> float | None:
    """Seconds until the next token ends that nobody but a person can renew. None: none does."""
    row = conn.execute(
        "select extract(epoch from min(access_expires_at) - clock_timestamp())::float8 from agentflow.crm_accounts"
        " where state <> 'removed' and access_expires_at > clock_timestamp() and (auth = 'token' or grant_refused_at is not null)"
    ).fetchone()
    return row[0] if row else None
