"""Who is signed in to the dashboard. The browser keeps a random token, the row its hash and the key that it was made with: a
session ends with its key."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from agentflow.database import Connection

#: A working day: long enough not to be asked again in the middle of it.
LASTS_S: Final = 12 * 3600.0


@dataclass(frozen=True, slots=True)
class Session:
    """`organization_id` None: the operator's. `key_name` and `key_prefix` tell people which key it was."""

    organization_id: int | None
    organization_slug: str | None
    key_name: str | None
    key_prefix: str | None
    scopes: frozenset[str]


def begin(conn: Connection, key_id: UUID | None, operator_key: bytes) -> str:
    """A new session of that key (None: the operator's own). Returns the token, which is nowhere else."""
    token = secrets.token_urlsafe(32)
    conn.execute(
        "insert into agentflow.dashboard_sessions (hash, organization_id, key_id, operator_proof, expires_at)"
        " values (%(hash)s, (select organization_id from agentflow.api_keys where id = %(key)s), %(key)s, %(proof)s,"
        " clock_timestamp() + make_interval(secs => %(lasts)s))",
        {
            "hash": _hash(token),
            "key": key_id,
            "proof": _proof(token, operator_key) if key_id is None else None,
            "lasts": LASTS_S,
        },
    )
    return token


def find(conn: Connection, token: str, operator_key: bytes) -> Session | None:
    """None: there is none, it is over, or its key opens nothing any more."""
    row = conn.execute(
        "select s.organization_id, o.slug, k.name, k.prefix, k.scopes, s.operator_proof from agentflow.dashboard_sessions s"
        " left join agentflow.api_keys k on k.id = s.key_id left join agentflow.organizations o on o.id = s.organization_id"
        " where s.hash = %s and s.expires_at > clock_timestamp() and (s.key_id is null or k.revoked_at is null"
        " and (k.expires_at is null or k.expires_at > clock_timestamp()))",
        (_hash(token),),
    ).fetchone()
    if row is None:
        return None
    organization_id, slug, name, prefix, scopes, proof = row
    if proof is not None and not hmac.compare_digest(bytes(proof), _proof(token, operator_key)):
        return None
    return Session(organization_id, slug, name, prefix, frozenset(scopes or ()))


def end(conn: Connection, token: str) -> None:
    conn.execute("delete from agentflow.dashboard_sessions s where s.hash = %s", (_hash(token),))


def delete_old(conn: Connection) -> int:
    """Those that are over."""
    return conn.execute("delete from agentflow.dashboard_sessions where expires_at < clock_timestamp()").rowcount


def form_token(token: str) -> str:
    """What a change has to come with: whoever knows it could read a page of this session."""
    return hmac.digest(token.encode(), b"agentflow-dashboard-form", hashlib.sha256).hex()


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _proof(token: str, operator_key: bytes) -> bytes:
    # Keyed by the token, so that the table alone gives nothing to guess an operator's own choice of key by.
    return hmac.digest(token.encode(), operator_key, hashlib.sha256)
