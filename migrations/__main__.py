"""`python -m migrations`: bring the database's schema up to this version. Safe to run at any time, from several places."""

from __future__ import annotations

import sys

import psycopg

from agentflow import embedded, schema, settings
from agentflow.database import connect_once
from agentflow.settings import Settings


def main() -> int:
    try:
        read = settings.load()
    except settings.SettingsError as error:
        return _fail(str(error), 2)
    try:
        if read.embedded_database:
            with embedded.join(read.agentflow_home) as joined:
                return _migrate(joined.database_url, read)
        url = read.direct_database_url or read.database_url
        assert url is not None  # noqa: S101 - not embedded
        return _migrate(url.get_secret_value(), read)
    except embedded.EmbeddedError as error:
        return _fail(str(error), 3)


def _migrate(url: str, read: Settings) -> int:
    variable = "DIRECT_DATABASE_URL" if read.direct_database_url else "DATABASE_URL"
    try:
        with connect_once(url, application_name="agentflow migrations", trust=read.trust, variable=variable) as conn:
            applied = schema.migrate(conn, say=lambda name: print(f"applied {name}"))
    except schema.SchemaError as error:
        return _fail(str(error), 1)
    except psycopg.OperationalError as error:
        return _fail(f"cannot connect to the database: {' '.join(str(error).split())}", 3)
    print(f"schema is up to date ({len(applied)} applied)")
    return 0


def _fail(message: str, status: int) -> int:
    print(f"agentflow: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
