"""Signatures of callbacks, as Standard Webhooks has them (https://www.standardwebhooks.com, symmetric `v1`).

Each organization has secrets of its own. Two may be live at once, and both sign: whoever verifies can change from one to the
other without losing a callback.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.ids import new_id
from agentflow.secrets import Sealer, context_of

SECRET_PURPOSE: Final = "callback_secret"  # noqa: S105 - its name
_PREFIX: Final = "whsec_"
_SECRET_BYTES: Final = 32
#: How long a replaced secret signs along, unless said otherwise.
ROTATION_GRACE_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class CallbackSecret:
    """What is known of a secret after it was made: everything but the secret."""

    id: UUID
    organization_id: int
    created_at: datetime
    expires_at: datetime | None


def headers(message_id: str, timestamp_s: int, body: bytes, live: Sequence[str]) -> dict[str, str]:
    """`live` are `whsec_…` secrets, the newest first. Without one the message is not signed."""
    said = {"webhook-id": message_id, "webhook-timestamp": str(timestamp_s)}
    if live:
        said["webhook-signature"] = " ".join(_signature(message_id, timestamp_s, body, secret) for secret in live)
    return said


def _signature(message_id: str, timestamp_s: int, body: bytes, secret: str) -> str:
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    signed = f"{message_id}.{timestamp_s}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def make_secret() -> str:
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def create_secret(
    conn: Connection, organization_id: int, sealer: Sealer, *, grace_s: float = ROTATION_GRACE_S
) -> tuple[CallbackSecret, str]:
    """A new secret, which is shown now and never again. Those before it sign along for `grace_s`. In a transaction."""
    secret_id = new_id()
    secret = make_secret()
    # Two at once would each take the other's for none, and three would sign.
    conn.execute("select from agentflow.organizations where id = %s for no key update", (organization_id,))
    conn.execute(
        "update agentflow.callback_secrets set"
        " expires_at = least(expires_at, clock_timestamp() + make_interval(secs => %s)) where organization_id = %s"
        " and (expires_at is null or expires_at > clock_timestamp())",
        (grace_s, organization_id),
    )
    # Of more than two live ones the oldest end now: a header with ten signatures helps nobody.
    conn.execute(
        "update agentflow.callback_secrets set expires_at = clock_timestamp() where organization_id = %(organization)s"
        " and expires_at > clock_timestamp() and id not in (select id from agentflow.callback_secrets"
        " where organization_id = %(organization)s order by created_at desc, id desc limit 1)",
        {"organization": organization_id},
    )
    row = conn.execute(
        "insert into agentflow.callback_secrets (id, organization_id, sealed) values (%s, %s, %s)"
        " returning id, organization_id, created_at, expires_at",
        (
            secret_id,
            organization_id,
            sealer.seal(secret, context=context_of(SECRET_PURPOSE, organization_id, secret_id)),
        ),
    ).fetchone()
    assert row is not None  # noqa: S101 - an INSERT returns its row
    return CallbackSecret(*row), secret


def secrets_of(conn: Connection, organization_id: int) -> list[CallbackSecret]:
    """The live ones, the newest first."""
    rows = conn.execute(
        "select id, organization_id, created_at, expires_at from agentflow.callback_secrets where organization_id = %s"
        " and (expires_at is null or expires_at > clock_timestamp()) order by created_at desc, id desc",
        (organization_id,),
    ).fetchall()
    return [CallbackSecret(*row) for row in rows]


def live_secrets(conn: Connection, organization_id: int, sealer: Sealer) -> list[str]:
    """To sign with, the newest first. Raises agentflow.secrets.Unreadable."""
    rows = conn.execute(
        "select id, sealed from agentflow.callback_secrets where organization_id = %s"
        " and (expires_at is null or expires_at > clock_timestamp()) order by created_at desc, id desc",
        (organization_id,),
    ).fetchall()
    return [sealer.open(row[1], context=context_of(SECRET_PURPOSE, organization_id, row[0])) for row in rows]
