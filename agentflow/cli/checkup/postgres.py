"""Postgres, and the schema in it."""

from __future__ import annotations

import time

import psycopg
from psycopg.conninfo import conninfo_to_dict

from agentflow import schema, tls
from agentflow.cli.checkup import network
from agentflow.cli.checkup.report import Remark, Wrong
from agentflow.cli.errors import one_line
from agentflow.database import connect_once
from agentflow.system import System
from agentflow.tls import Trust


def database(system: System) -> str | Remark:
    if system.settings.embedded_database:
        return server(system.database_url, "AGENTFLOW_HOME")
    return server(system.database_url, "DATABASE_URL", system.settings.trust)


def server(url: str, variable: str, trust: Trust | None = None) -> str | Remark:
    trust = trust or Trust()
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        raise Wrong(
            f"{variable} cannot be read: {one_line(error)}", "it looks like postgresql://user:password@host/name"
        ) from None
    host, port = (
        str(parts.get("host") or parts.get("hostaddr") or ""),
        int(str(parts.get("port") or 5432).split(",")[0]),
    )
    if host and not host.startswith("/"):
        network.reach(host.split(",")[0], port, variable)
    where = f"{parts.get('dbname', '')} at {host or 'this machine'}" if not host.startswith("/") else "by its socket"
    began = time.monotonic()
    try:
        with connect_once(
            url,
            application_name="agentflow doctor",
            trust=trust,
            variable=variable,
            connect_timeout_s=network.CONNECT_S,
        ) as conn:
            connected_ms = (time.monotonic() - began) * 1000
            began = time.monotonic()
            row = conn.execute(
                "select current_setting('server_version'), current_setting('max_connections')"
            ).fetchone()
            answer_ms = (time.monotonic() - began) * 1000
            version = conn.info.server_version
            encrypted = conn.pgconn.ssl_in_use
    except psycopg.OperationalError as error:
        raise _refused(error, variable) from None
    if version < 150000:
        raise Wrong(f"Postgres {version // 10000} is too old", "15 or newer is needed")
    assert row is not None  # noqa: S101 - a select of one row
    found = f"Postgres {str(row[0]).split(' ')[0]} {where}, connected in {connected_ms:.0f} ms, answers in {answer_ms:.1f} ms"
    mode = tls.postgres_mode(parts, verify=trust.verify)
    if encrypted:
        verified = "verified" if mode in tls.VERIFYING else "not verified"
        found += f", TLS {verified} (sslmode={mode})"
        if verified != "verified" and not tls.is_private(host.split(",")[0]):
            return Remark(found, f"add sslmode=verify-full to {variable}, and TLS_CA_FILE for an authority of your own")
    if host and not host.startswith("/") and not encrypted and not network.is_private(host):
        return Remark(f"{found}, not encrypted", f"add sslmode=require to {variable}")
    return found


def _refused(error: psycopg.OperationalError, variable: str) -> Wrong:
    """libpq says what went wrong in words alone until there is a server to send an SQLSTATE."""
    text = one_line(error)
    low = text.lower()
    if "password" in low or "authentication failed" in low or "no pg_hba.conf entry" in low:
        if "no encryption" in low or "ssl off" in low:
            return Wrong(f"TLS: the server wants an encrypted connection: {text}", f"add sslmode=require to {variable}")
        return Wrong(
            f"auth: the server refuses the user or password: {text}",
            f"check both in {variable}; quote @ : / # as %40 %3A %2F %23",
        )
    if "ssl" in low or "certificate" in low or "tls" in low:
        return Wrong(
            f"TLS: {text}",
            f"TLS_CA_FILE names the file of your own authority; sslmode=require in {variable} goes without verifying",
        )
    if "does not exist" in low:
        return Wrong(text, f"create it, or correct the name in {variable}")
    if "too many" in low or "remaining connection slots" in low or "max clients" in low:
        return Wrong(text, "lower DATABASE_POOL_SIZE or the number of processes, or use the provider's pooler")
    if "timeout" in low or "timed out" in low:
        return Wrong(f"timeout: connected, but Postgres did not answer: {text}", "is it starting, or overloaded?")
    if "starting up" in low or "shutting down" in low or "recovery" in low:
        return Wrong(text, "wait a moment and ask again")
    return Wrong(text, f"check {variable}")


def schema_version(system: System) -> str:
    with system.database.connect() as conn:
        try:
            if system.settings.embedded_database:
                schema.migrate(conn)
            schema.check(conn)
        except schema.SchemaError as error:
            problem, _, advice = str(error).partition(": run ")
            raise Wrong(problem, f"run {advice}" if advice else "") from None
        return f"up to date ({schema.shipped()[-1].name})"
