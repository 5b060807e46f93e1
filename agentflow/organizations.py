"""Organizations, and the API keys by which their programs come in.

A key is `af_<prefix>_<secret>`: the prefix finds the row and is what people see of it later, the secret is 256 random
bits, of which only the SHA-256 of the whole key is kept. (A slow hash is for what can be guessed.)
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

from agentflow.database import Connection
from agentflow.ids import new_id

Scope = Literal["submit", "read", "manage", "webhooks"]

SCOPES: Final[tuple[Scope, ...]] = ("submit", "read", "manage", "webhooks")
#: Whose rows are the operator's own, and those of an installation without organizations.
DEFAULT_ORGANIZATION: Final = 1
SLUG: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
#: How long a rotated key still works, unless said otherwise.
ROTATION_GRACE_S: Final = 86_400.0
#: Who makes a key for a shorter time knows that it ends.
_LASTING_S: Final = 14 * 86_400.0
_KEY: Final = re.compile(r"(af_[a-z0-9]{12})_[A-Za-z0-9_-]{43}")
_PREFIX_CHARACTERS: Final = 15
_LETTERS: Final = string.ascii_lowercase + string.digits
#: `last_used_at` is written at most so often: a request costs no write.
_USED_EVERY_S: Final = 60.0


class SlugTaken(Exception):
    """There is an organization with this slug."""


@dataclass(frozen=True, slots=True)
class Organization:
    id: int
    slug: str
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key after it was made: everything but the key. `prefix` is its beginning."""

    id: UUID
    organization_id: int
    name: str
    prefix: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    successor_id: UUID | None


@dataclass(frozen=True, slots=True)
class Presented:
    """A key that somebody came with, and that is ours. `state` says whether it still opens anything."""

    id: UUID
    organization_id: int
    organization_slug: str
    scopes: frozenset[Scope]
    state: Literal["good", "revoked", "expired"]
    expires_in_s: float | None


_ORGANIZATION_COLUMNS: Final = "id, slug, name, created_at"
_KEY_COLUMNS: Final = ", ".join(ApiKey.__dataclass_fields__)


def create(conn: Connection, slug: str, name: str) -> Organization:
    """Raises SlugTaken; ValueError for a slug that is none."""
    if not SLUG.fullmatch(slug):
        raise ValueError("a slug is 1 to 63 lower-case letters, digits and hyphens, and begins with no hyphen")
    row = conn.execute(
        "insert into agentflow.organizations (slug, name) values (%s, %s) on conflict (slug) do nothing"  # noqa: S608 - constants
        f" returning {_ORGANIZATION_COLUMNS}",
        (slug, name),
    ).fetchone()
    if row is None:
        raise SlugTaken(f"there is an organization {slug!r} already")
    return Organization(*row)


def every(conn: Connection, *, after: int = 0, limit: int = 1000) -> list[Organization]:
    """By id, those after `after`."""
    rows = conn.execute(
        f"select {_ORGANIZATION_COLUMNS} from agentflow.organizations where id > %s order by id limit %s",  # noqa: S608
        (after, limit),
    ).fetchall()
    return [Organization(*row) for row in rows]


def find(conn: Connection, named: str) -> Organization | None:
    """By slug, or else by number."""
    number = int(named) if re.fullmatch(r"[0-9]{1,18}", named) else None
    row = conn.execute(
        f"select {_ORGANIZATION_COLUMNS} from agentflow.organizations where slug = %s or id = %s"  # noqa: S608 - constants
        " order by slug <> %s limit 1",
        (named, number, named),
    ).fetchone()
    return Organization(*row) if row else None


def create_key(
    conn: Connection, organization_id: int, name: str, scopes: Collection[Scope], *, expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    """A new key: its row, and the key itself, which is nowhere else. Raises ValueError for unknown scopes or none."""
    if not scopes or not set(scopes) <= set(SCOPES):
        raise ValueError(f"scopes are one or more of {', '.join(SCOPES)}")
    prefix = "af_" + "".join(secrets.choice(_LETTERS) for _ in range(12))
    key = f"{prefix}_{secrets.token_urlsafe(32)}"
    row = conn.execute(
        "insert into agentflow.api_keys (id, organization_id, name, prefix, hash, scopes, expires_at)"  # noqa: S608 - constants
        f" values (%s, %s, %s, %s, %s, %s, %s) returning {_KEY_COLUMNS}",
        (
            new_id(),
            organization_id,
            name,
            prefix,
            _hash(key),
            [s for s in SCOPES if s in scopes],
            expires_at,
        ),
    ).fetchone()
    assert row is not None  # noqa: S101 - an INSERT returns its row
    return ApiKey(*row), key


def keys(
    conn: Connection, organization_id: int | None, *, before: UUID | None = None, limit: int = 1000
) -> list[ApiKey]:
    """The newest first; of every organization where it is None. `before` is the last id of the page before."""
    rows = conn.execute(
        f"select {_KEY_COLUMNS} from agentflow.api_keys"  # noqa: S608 - constants
        " where (%(organization)s::bigint is null or organization_id = %(organization)s)"
        " and (%(before)s::uuid is null or id < %(before)s) order by id desc limit %(limit)s",
        {"organization": organization_id, "before": before, "limit": limit},
    ).fetchall()
    return [ApiKey(*row) for row in rows]


def get_key(conn: Connection, organization_id: int | None, key_id: UUID) -> ApiKey | None:
    row = conn.execute(
        f"select {_KEY_COLUMNS} from agentflow.api_keys where id = %(id)s"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or organization_id = %(organization)s)",
        {"id": key_id, "organization": organization_id},
    ).fetchone()
    return ApiKey(*row) if row else None


def find_key(conn: Connection, named: str) -> ApiKey | None:
    """For the operator: by id, by prefix, or by the key itself (of which only the prefix is looked at)."""
    row = conn.execute(
        f"select {_KEY_COLUMNS} from agentflow.api_keys where id::text = %s or prefix = %s",  # noqa: S608 - constants
        (named.lower(), named[:_PREFIX_CHARACTERS]),
    ).fetchone()
    return ApiKey(*row) if row else None


def revoke_key(conn: Connection, organization_id: int | None, key_id: UUID) -> ApiKey | None:
    """From now on the key opens nothing (web processes notice within seconds). None: there is no such key."""
    row = conn.execute(
        "update agentflow.api_keys set revoked_at = coalesce(revoked_at, clock_timestamp()) where id = %(id)s"  # noqa: S608 - constants
        " and (%(organization)s::bigint is null or organization_id = %(organization)s)"
        f" returning {_KEY_COLUMNS}",
        {"id": key_id, "organization": organization_id},
    ).fetchone()
    return ApiKey(*row) if row else None


def rotate_key(
    conn: Connection, organization_id: int | None, key_id: UUID, *, grace_s: float = ROTATION_GRACE_S
) -> tuple[ApiKey, str] | None:
    """A new key with the same name, scopes and expiry; the old one ends after `grace_s`. In the caller's transaction.

    None when there is no such key that still works: an ended one is not brought back by rotating it.
    """
    row = conn.execute(
        "select organization_id, name, scopes, expires_at from agentflow.api_keys where id = %(id)s"
        " and (%(organization)s::bigint is null or organization_id = %(organization)s)"
        " and revoked_at is null and (expires_at is null or expires_at > clock_timestamp()) for update",
        {"id": key_id, "organization": organization_id},
    ).fetchone()
    if row is None:
        return None
    new, key = create_key(conn, row[0], row[1], row[2], expires_at=row[3])
    conn.execute(
        "update agentflow.api_keys set successor_id = %s,"
        " expires_at = least(expires_at, clock_timestamp() + make_interval(secs => %s))"
        " where id = %s and organization_id = %s",
        (new.id, grace_s, key_id, row[0]),
    )
    return new, key


def next_end_s(conn: Connection) -> float | None:
    """Seconds until the next key ends that was made to last and has no successor. None: none does."""
    row = conn.execute(
        "select extract(epoch from expires_at - clock_timestamp())::float8 from agentflow.api_keys"
        " where expires_at is not null and revoked_at is null and successor_id is null and expires_at > clock_timestamp()"
        " and expires_at - created_at > make_interval(secs => %s) order by expires_at limit 1",
        (_LASTING_S,),
    ).fetchone()
    return row[0] if row else None


def looks_like_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None


def present(conn: Connection, key: str) -> Presented | None:
    """Whose key this is; None when it is nobody's. Notes that it was used."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    row = conn.execute(
        "select k.hash, k.id, k.organization_id, o.slug, k.scopes, k.revoked_at is not null,"
        " k.expires_at <= clock_timestamp(), extract(epoch from k.expires_at - clock_timestamp())::float8,"
        " k.last_used_at > clock_timestamp() - make_interval(secs => %s)"
        " from agentflow.api_keys k join agentflow.organizations o on o.id = k.organization_id where k.prefix = %s",
        (_USED_EVERY_S, match.group(1)),
    ).fetchone()
    if row is None or not hmac.compare_digest(bytes(row[0]), _hash(key)):
        return None
    _, key_id, organization_id, slug, scopes, revoked, expired, expires_in_s, just_used = row
    state: Literal["good", "revoked", "expired"] = "revoked" if revoked else "expired" if expired else "good"
    if state == "good" and not just_used:
        conn.execute(
            "update agentflow.api_keys set last_used_at = clock_timestamp() where id = %s and organization_id = %s",
            (key_id, organization_id),
        )
    return Presented(key_id, organization_id, slug, frozenset(scopes), state, expires_in_s)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
