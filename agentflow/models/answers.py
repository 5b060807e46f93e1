"""Answers that were paid for, kept by what was asked, so that a second run of a job does not pay again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from psycopg.types.json import Jsonb

from agentflow.database import Connection
from agentflow.jobs.text import storable_json


def key_of(*parts: str | bytes) -> bytes:
    """The key of a question: everything that the answer depends on, such as a picture, the model and the prompt."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else part.encode(errors="surrogatepass")
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.digest()


def find(conn: Connection, organization_id: int, key: bytes) -> Any:
    """The kept answer, or None."""
    row = conn.execute(
        "select answer from agentflow.model_answers where organization_id = %s and key = %s", (organization_id, key)
    ).fetchone()
    return row[0] if row else None


def keep(conn: Connection, organization_id: int, key: bytes, answer: Any) -> None:
    """Keep an answer; one that is there already stays."""
    conn.execute(
        "insert into agentflow.model_answers (organization_id, key, answer) values (%s, %s, %s) on conflict do nothing",
        (organization_id, key, Jsonb(answer, dumps=_storable)),
    )


def delete_old(conn: Connection, *, hours: float, limit: int = 1000) -> int:
    """Forget one batch of answers older than that. Returns how many; fewer than `limit`: done."""
    return conn.execute(
        "with old as materialized (select organization_id, key from agentflow.model_answers"
        " where created_at < clock_timestamp() - make_interval(secs => %s * 3600) limit %s for update skip locked)"
        " delete from agentflow.model_answers a using old where a.organization_id = old.organization_id and a.key = old.key",
        (hours, limit),
    ).rowcount


def _storable(answer: Any) -> str:
    return storable_json(json.dumps(answer))[0]
