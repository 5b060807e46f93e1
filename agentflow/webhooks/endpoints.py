"""Endpoints: where webhooks may arrive. The URL's token finds one, its secret tells the sender from a forger.

Of tokens only the SHA-256 is kept; secrets are sealed, since they have to be used. Two of a kind may be live at once.
"""

from __future__ import annotations

import hashlib
import re
import secrets as random
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from agentflow.database import Connection, Database
from agentflow.ids import new_id
from agentflow.secrets import Sealer, context_of
from agentflow.webhooks.config import Config
from agentflow.webhooks.sources import SOURCES

Kind = Literal["token", "secret"]

SECRET_PURPOSE: Final = "webhook_secret"  # noqa: S105 - its name
#: How long a replaced token or secret still works, unless said otherwise.
ROTATION_GRACE_S: Final = 86_400.0
#: A process asks the database about a token at most so often: a change is in force everywhere within these seconds.
REMEMBERED_S: Final = 3.0
_MOST_REMEMBERED: Final = 10_000
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`silent_since`: no event came for `silence_after_s` seconds, as was noticed then."""

    id: UUID
    organization_id: int
    source: str
    name: str
    config: Config
    silence_after_s: float | None
    silent_since: datetime | None
    created_at: datetime
    disabled_at: datetime | None


@dataclass(frozen=True, slots=True)
class Credential:
    """What is known of a token or a secret after it was made: everything but itself."""

    id: UUID
    kind: Kind
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Door:
    """An endpoint as its senders meet it. `secrets` are open: never logged, never answered."""

    endpoint: Endpoint
    secrets: tuple[str, ...] = field(repr=False)


_COLUMNS: Final = ", ".join(f"e.{name}" for name in Endpoint.__dataclass_fields__)
_CONFIG_AT: Final = list(Endpoint.__dataclass_fields__).index("config")


def create(
    conn: Connection,
    organization_id: int,
    source: str,
    name: str,
    config: Config,
    sealer: Sealer,
    *,
    secret: str | None = None,
    silence_after_s: float | None = None,
) -> tuple[Endpoint, str, str | None]:
    """The endpoint, its token, and the secret where one was made here. In a transaction. Raises ValueError for a wrong secret."""
    secret, made = _chosen(source, secret)
    row = conn.execute(
        "insert into agentflow.webhook_endpoints as e (id, organization_id, source, name, config, silence_after_s)"  # noqa: S608 - constants
        f" values (%s, %s, %s, %s, %s, %s) returning {_COLUMNS}",
        (new_id(), organization_id, source, name, _stored(config), silence_after_s),
    ).fetchone()
    assert row is not None  # noqa: S101 - an INSERT returns its row
    endpoint = _endpoint(row)
    token = random.token_urlsafe(32)
    _add(conn, endpoint, "token", token, sealer)
    if secret is not None:
        _add(conn, endpoint, "secret", secret, sealer)
    return endpoint, token, made


def rotate(
    conn: Connection,
    endpoint: Endpoint,
    kind: Kind,
    sealer: Sealer,
    *,
    secret: str | None = None,
    grace_s: float = ROTATION_GRACE_S,
) -> str | None:
    """A new token or secret; the one before works for `grace_s` more, older ones end now. In a transaction.

    Returns what was made here, None where the vendor's secret was given. Raises ValueError for a wrong secret, or where the
    source has none.
    """
    if kind == "token":
        value, made = random.token_urlsafe(32), True
    else:
        chosen, shown = _chosen(endpoint.source, secret)
        if chosen is None:
            raise ValueError("this source has no secret: rotate the token")
        value, made = chosen, shown is not None
    # Two at once would each take the other's for none.
    conn.execute(
        "select from agentflow.webhook_endpoints where id = %s and organization_id = %s for no key update",
        (endpoint.id, endpoint.organization_id),
    )
    conn.execute(
        "update agentflow.webhook_credentials c set expires_at = least(c.expires_at, clock_timestamp() + case when c.id = ("
        " select n.id from agentflow.webhook_credentials n where n.endpoint_id = c.endpoint_id and n.kind = c.kind"
        " and n.organization_id = c.organization_id order by n.created_at desc, n.id desc limit 1"
        ") then make_interval(secs => %s) else interval '0' end)"
        " where c.endpoint_id = %s and c.kind = %s and organization_id = %s"
        " and (c.expires_at is null or c.expires_at > clock_timestamp())",
        (grace_s, endpoint.id, kind, endpoint.organization_id),
    )
    _add(conn, endpoint, kind, value, sealer)
    return value if made else None


def every(
    conn: Connection, organization_id: int | None, *, before: UUID | None = None, limit: int = 1000
) -> list[Endpoint]:
    """The newest first; of every organization where it is None."""
    rows = conn.execute(
        f"select {_COLUMNS} from agentflow.webhook_endpoints e"  # noqa: S608 - constants
        " where (%(organization)s::bigint is null or e.organization_id = %(organization)s)"
        " and (%(before)s::uuid is null or e.id < %(before)s) order by e.id desc limit %(limit)s",
        {"organization": organization_id, "before": before, "limit": limit},
    ).fetchall()
    return [_endpoint(row) for row in rows]


def get(conn: Connection, organization_id: int | None, endpoint_id: UUID) -> Endpoint | None:
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.webhook_endpoints e where e.id = %(id)s"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or e.organization_id = %(organization)s)",
        {"id": endpoint_id, "organization": organization_id},
    ).fetchone()
    return _endpoint(row) if row else None


def change(
    conn: Connection, endpoint: Endpoint, *, name: str, config: Config, silence_after_s: float | None
) -> Endpoint:
    """Set it anew: name, what becomes of its events (those that wait, too), and the alarm."""
    return _changed(
        conn,
        endpoint,
        "name = %(name)s, config = %(config)s, silence_after_s = %(after)s, watched_since = case when silence_after_s"
        " is distinct from %(after)s then clock_timestamp() else watched_since end,"
        " silent_since = case when silence_after_s is not distinct from %(after)s then silent_since end",
        {"name": name, "config": _stored(config), "after": silence_after_s},
    )


def disable(conn: Connection, endpoint: Endpoint) -> Endpoint:
    """From now on its URL is unknown (web processes notice within seconds)."""
    change = "disabled_at = coalesce(disabled_at, clock_timestamp()), silent_since = null"
    return _changed(conn, endpoint, change, {})


def enable(conn: Connection, endpoint: Endpoint) -> Endpoint:
    return _changed(conn, endpoint, "disabled_at = null, watched_since = clock_timestamp()", {})


def credentials(conn: Connection, endpoint: Endpoint) -> list[Credential]:
    """The live ones, the newest first."""
    rows = conn.execute(
        "select id, kind, created_at, expires_at from agentflow.webhook_credentials where endpoint_id = %s"
        " and organization_id = %s and (expires_at is null or expires_at > clock_timestamp())"
        " order by created_at desc, id desc",
        (endpoint.id, endpoint.organization_id),
    ).fetchall()
    return [Credential(*row) for row in rows]


class Known:
    """The doors that this process has met lately. Safe in threads."""

    def __init__(self, database: Database, sealer: Sealer) -> None:
        self._database = database
        self._sealer = sealer
        self._remembered: dict[bytes, tuple[Door, float]] = {}

    def find(self, source: str, token: str) -> Door | None:
        """None: there is no such token, or its endpoint is another source's or disabled. Raises agentflow.secrets.Unreadable."""
        if not _TOKEN.fullmatch(token):
            return None
        hashed = _hash(token)
        found, until = self._remembered.get(hashed, (None, 0.0))
        if found is None or time.monotonic() >= until:
            self._remembered.pop(hashed, None)
            asked_at = time.monotonic()
            with self._database.connection() as conn:
                found = _door(conn, hashed, self._sealer)
            if found is None:
                return None
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[hashed] = (found, asked_at + REMEMBERED_S)
        return found if found.endpoint.source == source else None


def _door(conn: Connection, hashed: bytes, sealer: Sealer) -> Door | None:
    # By an index on a hash: how long it takes tells nothing of the token.
    row = conn.execute(
        f"select {_COLUMNS} from agentflow.webhook_credentials c join agentflow.webhook_endpoints e"  # noqa: S608 - constants
        " on e.id = c.endpoint_id and e.organization_id = c.organization_id where c.hash = %s and e.disabled_at is null"
        " and (c.expires_at is null or c.expires_at > clock_timestamp())",
        (hashed,),
    ).fetchone()
    if row is None:
        return None
    return door_of(conn, _endpoint(row), sealer)


def door_of(conn: Connection, endpoint: Endpoint, sealer: Sealer) -> Door:
    """With its live secrets, the newest first. Raises agentflow.secrets.Unreadable."""
    sealed = conn.execute(
        "select id, sealed from agentflow.webhook_credentials where endpoint_id = %s and organization_id = %s"
        " and kind = 'secret' and (expires_at is null or expires_at > clock_timestamp()) order by created_at desc",
        (endpoint.id, endpoint.organization_id),
    ).fetchall()
    of = endpoint.organization_id
    return Door(endpoint, tuple(sealer.open(s, context=context_of(SECRET_PURPOSE, of, id_)) for id_, s in sealed))


def _chosen(source: str, secret: str | None) -> tuple[str | None, str | None]:
    """The secret to keep, and the same where it was made here and has to be shown."""
    kind = SOURCES[source]
    if secret is not None:
        kind.check_secret(secret)
        return secret, None
    if kind.secret == "none":  # noqa: S105 - no secret
        return None, None
    made = kind.make_secret()
    return made, made


def _add(conn: Connection, endpoint: Endpoint, kind: Kind, value: str, sealer: Sealer) -> None:
    id_, of = new_id(), endpoint.organization_id
    sealed = sealer.seal(value, context=context_of(SECRET_PURPOSE, of, id_)) if kind == "secret" else None
    conn.execute(
        "insert into agentflow.webhook_credentials (id, organization_id, endpoint_id, kind, hash, sealed)"
        " values (%s, %s, %s, %s, %s, %s)",
        (id_, of, endpoint.id, kind, _hash(value) if kind == "token" else None, sealed),
    )


def _changed(conn: Connection, endpoint: Endpoint, change: str, values: dict[str, Any]) -> Endpoint:
    row = conn.execute(
        f"update agentflow.webhook_endpoints e set {change} where e.id = %(id)s"  # noqa: S608 - constants
        f" and e.organization_id = %(organization)s returning {_COLUMNS}",
        {"id": endpoint.id, "organization": endpoint.organization_id, **values},
    ).fetchone()
    assert row is not None  # noqa: S101 - endpoints are not deleted
    return _endpoint(row)


def _endpoint(row: tuple[Any, ...]) -> Endpoint:
    values = list(row)
    values[_CONFIG_AT] = Config.model_validate(values[_CONFIG_AT], strict=False)
    return Endpoint(*values)


def _stored(config: Config) -> Jsonb:
    return Jsonb(config.model_dump(mode="json", exclude_defaults=True))


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
