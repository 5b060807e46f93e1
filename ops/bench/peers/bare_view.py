"""What HTTP intake is measured against: a Flask view that inserts one row, with no authentication and no checks.

`gunicorn -c web/gunicorn_config.py ops.bench.peers.bare_view:application`
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from flask import Flask, Response, jsonify, request
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

TABLE = """
create table if not exists public.bare_jobs (
    id uuid primary key, type text not null, payload jsonb not null, created_at timestamptz not null default clock_timestamp()
)
"""

app = Flask("bare")
# As large as AgentFlow's by default.
pool = ConnectionPool(os.environ["DATABASE_URL"], min_size=1, max_size=5, open=True)
with pool.connection() as first:
    first.execute(TABLE)


@app.post("/jobs")
def submit() -> tuple[Response, int]:
    body = request.get_json()
    with pool.connection() as conn:
        row = conn.execute(
            "insert into public.bare_jobs (id, type, payload) values (%s, %s, %s) returning id, created_at",
            (uuid4(), body["type"], Jsonb(body["payload"])),
        ).fetchone()
    assert row is not None
    return jsonify(id=str(row[0]), created_at=row[1].isoformat()), 202


@app.get("/health/ready")
def ready() -> dict[str, bool]:
    return {"ready": True}


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """No Flask object, which the configuration of AgentFlow's gunicorn would take for AgentFlow."""
    return app(environ, start_response)
