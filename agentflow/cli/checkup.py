"""`agentflow doctor`: looks at everything AgentFlow stands on, and says what to do about what is wrong. Shows no secret.

A server is looked at in steps (name, connection, TLS, password, answer), so that each kind of failure has its own advice.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import psycopg
import redis
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr
from rich.console import Console
from rich.markup import escape

from agentflow import embedded, schema, settings, tls
from agentflow.broker import RabbitBroker
from agentflow.broker import redis as redis_broker
from agentflow.cli import output, running
from agentflow.cli.errors import WRONG, Failure, one_line
from agentflow.cli.job_commands import unserved
from agentflow.database import connect_once
from agentflow.jobs import statistics
from agentflow.settings import Settings, Tier
from agentflow.storage import StorageError
from agentflow.system import System
from agentflow.tls import Trust

_CONNECT_S: Final = 5.0
_LITTLE_DISK: Final = 1_000_000_000
_NO_DISK: Final = 100_000_000
_CLOCK_S: Final = 5.0
#: Of the connections that a server allows: beyond it the next process may find none.
_CROWDED: Final = 0.8
#: One that publishes and one that consumes; other processes only publish.
_WORKERS_RABBITMQ: Final = 2
#: System.application_name, as a client of Redis may be called (without spaces).
_REDIS_NAME: Final = re.compile(r"agentflow-(\w+)-(.+)-(\d+)")


class Wrong(Exception):
    """A check failed. `advice` is what to do."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Remark:
    """A check that passed with something to think of."""

    found: str
    advice: str


def doctor() -> None:
    """Raises Failure when something is wrong; SettingsError is one line of its own, as everywhere."""
    read = settings.current()
    report = Report(output.console(), read)
    system = System(read, "doctor")
    with report.check("settings"):
        report.good(_settings(read))
    report.run("tier", lambda: _tier(read))
    report.run("home", lambda: _home(read))
    stack = None
    reachable = True
    if read.embedded_database:
        with report.check("servers"):
            stack = embedded.join(read.agentflow_home)
            report.good(f"Postgres and Valkey of its own run in {read.agentflow_home}")
        reachable = stack is not None
    try:
        if reachable and report.run("database", lambda: _database(system)):
            report.run("clock", lambda: _clock(system))
            if report.run("schema", lambda: _schema(system)):
                report.run("workers", lambda: _workers(system))
                report.run("connections", lambda: _connections(system))
        if read.direct_database_url is not None:
            url = read.direct_database_url.get_secret_value()
            report.run("migrations", lambda: _postgres(url, "DIRECT_DATABASE_URL", read.trust))
        if reachable and read.uses_redis:
            report.run("redis", lambda: _redis(system))
        if read.rabbitmq_url is not None:
            report.run("rabbitmq", lambda: _rabbitmq(system))
        report.run("storage", lambda: _storage(system))
        report.run("web", lambda: _web(read))
    finally:
        system.close()
        if stack is not None:
            stack.leave()
    if report.wrong:
        raise Failure(f"{report.wrong} of {report.checks} checks failed", WRONG)


class Report:
    """Prints each check as it is done."""

    def __init__(self, console: Console, read: Settings) -> None:
        self.checks = self.wrong = 0
        self._console = console
        self._name = ""
        self._secrets = sorted(_secrets(read), key=len, reverse=True)

    def run(self, name: str, look: Callable[[], str | Remark]) -> bool:
        before = self.wrong
        with self.check(name):
            self.good(look())
        return self.wrong == before

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        self.checks += 1
        self._name = name
        try:
            yield
        except Wrong as error:
            self._bad(str(error), error.advice)
        except embedded.EmbeddedError as error:
            self._bad(str(error), "")  # it says itself what to do
        except (*_UNAVAILABLE, redis.RedisError, StorageError, OSError) as error:
            self._bad(one_line(error) or type(error).__name__, "")

    def good(self, found: str | Remark) -> None:
        if isinstance(found, Remark):
            self._line("!", "yellow", found.found, found.advice)
        else:
            self._line("✓", "green", found, "")

    def _bad(self, problem: str, advice: str) -> None:
        self.wrong += 1
        self._line("✗", "red", problem, advice)

    def _line(self, mark: str, colour: str, text: str, advice: str) -> None:
        if not self._console.encoding.lower().startswith("utf"):
            mark = {"✓": "ok", "!": "note", "✗": "WRONG"}[mark]
        self._console.print(
            f"[{colour}]{mark}[/{colour}] {self._name:<11} {escape(self._scrubbed(text))}", soft_wrap=True
        )
        if advice:
            self._console.print(f"  {'':<11} → {escape(self._scrubbed(advice))}", soft_wrap=True)

    def _scrubbed(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


_UNAVAILABLE: Final = (psycopg.Error,)


def _secrets(read: Settings) -> set[str]:
    """Whatever must not be printed, should a library quote it in an error: secrets, and passwords inside of URLs."""
    found = set()
    for name in type(read).model_fields:
        value = getattr(read, name)
        if not isinstance(value, SecretStr):
            continue
        text = value.get_secret_value()
        if "://" in text:
            with suppress(ValueError):
                password = urlsplit(text).password
                if password:
                    found |= {password, unquote(password)}
        found.add(text)
    return {secret for secret in found if len(secret) >= 3}


# ---- this machine ----


def _settings(read: Settings) -> str | Remark:
    given = [name.upper() for name in sorted(read.model_fields_set)]
    warnings = read.warnings()
    if warnings:
        return Remark("; ".join(warnings), "change it unless it is meant")
    return f"read; set are {', '.join(given)}" if given else "none set: everything runs on this machine"


_TIERS: Final[dict[Tier, str]] = {
    "embedded": "embedded: Postgres and Valkey of its own, on this machine",
    "database only": "database only: no broker and no Redis, workers look into Postgres every {poll:g} s",
    "starter": "starter: Redis rings, and keeps results and live progress",
    "production": "production: RabbitMQ rings, {redis}",
}


def _tier(read: Settings) -> str | Remark:
    redis = "Redis keeps results and live progress" if read.uses_redis else "results and progress are in Postgres alone"
    found = _TIERS[read.tier].format(poll=read.worker_polling_interval, redis=redis)
    try:
        settings.check_files(read)
    except settings.SettingsError as error:
        return Remark(f"{found}; for `agentflow up` alone", str(error))
    return found


def _home(read: Settings) -> str | Remark:
    home = read.agentflow_home
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = home / f".doctor-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise Wrong(
            f"{home} cannot be written ({(error.strerror or str(error)).lower()})",
            "set AGENTFLOW_HOME to a folder of your own",
        ) from None
    free = shutil.disk_usage(home).free
    if free < _NO_DISK:
        raise Wrong(f"only {output.size(free)} are free in {home}", "make room: Postgres stops when the disk is full")
    if free < _LITTLE_DISK:
        return Remark(f"only {output.size(free)} are free in {home}", "make room before the next large video")
    return f"{home}, {output.size(free)} free"


def _clock(system: System) -> str | Remark:
    with system.database.connect() as conn:
        began = time.monotonic()
        row = conn.execute("select clock_timestamp()").fetchone()
        trip_s = time.monotonic() - began
    assert row is not None  # noqa: S101 - a select of one row
    ahead_s = (datetime.now(UTC) - row[0]).total_seconds() - trip_s / 2
    if abs(ahead_s) > _CLOCK_S:
        where = "ahead of" if ahead_s > 0 else "behind"
        return Remark(
            f"this machine's clock is {abs(ahead_s):.0f} s {where} the database's",
            "let a time service (chrony, systemd-timesyncd) set it: signed links and TLS go by it",
        )
    return f"agrees with the database's to {abs(ahead_s) * 1000:.0f} ms"


# ---- servers ----


def _reach(host: str, port: int, variable: str) -> None:
    """Raises Wrong: the name is not known, nobody listens, nothing answers."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise Wrong(
            f"DNS: the name {host} is not known ({why})",
            f"check the host in {variable}; inside a private network the internal name may be needed",
        ) from None
    last: OSError = OSError("no address")
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(_CONNECT_S)
                probe.connect(address)
                return
        except OSError as error:
            last = error
    where = f"{host} port {port}"
    if isinstance(last, TimeoutError):
        raise Wrong(
            f"timeout: {where} did not answer within {_CONNECT_S:g} s",
            f"a firewall or an address list stands between, or the address in {variable} is of another network",
        )
    if isinstance(last, ConnectionRefusedError):
        raise Wrong(f"refused: nobody listens at {where}", f"start the server, or correct host and port in {variable}")
    raise Wrong(
        f"{where} cannot be reached ({(last.strerror or str(last)).lower()})", f"check host and port in {variable}"
    )


def _database(system: System) -> str | Remark:
    if system.settings.embedded_database:
        return _postgres(system.database_url, "AGENTFLOW_HOME")
    return _postgres(system.database_url, "DATABASE_URL", system.settings.trust)


def _postgres(url: str, variable: str, trust: Trust | None = None) -> str | Remark:
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
        _reach(host.split(",")[0], port, variable)
    where = f"{parts.get('dbname', '')} at {host or 'this machine'}" if not host.startswith("/") else "by its socket"
    began = time.monotonic()
    try:
        with connect_once(
            url, application_name="agentflow doctor", trust=trust, variable=variable, connect_timeout_s=_CONNECT_S
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
        raise _postgres_refused(error, variable) from None
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
    if host and not host.startswith("/") and not encrypted and not _is_private(host):
        return Remark(f"{found}, not encrypted", f"add sslmode=require to {variable}")
    return found


def _postgres_refused(error: psycopg.OperationalError, variable: str) -> Wrong:
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


def _is_private(host: str) -> bool:
    import ipaddress

    with suppress(OSError, ValueError, IndexError):
        return ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0]).is_private
    return False


def _schema(system: System) -> str:
    with system.database.connect() as conn:
        try:
            if system.settings.embedded_database:
                schema.migrate(conn)
            schema.check(conn)
        except schema.SchemaError as error:
            problem, _, advice = str(error).partition(": run ")
            raise Wrong(problem, f"run {advice}" if advice else "") from None
        return f"up to date ({schema.shipped()[-1].name})"


def _workers(system: System) -> str | Remark:
    with system.database.connect() as conn:
        workers = statistics.workers(conn)
        queues = statistics.queues(conn)
    due = sum(q.due for q in queues)
    if workers:
        found = f"{len(workers)} alive, {sum(w.threads for w in workers)} threads"
        if missing := unserved(queues):
            advice = "start one with `dramatiq actors -Q` and their names, or one without -Q, which serves all"
            return Remark(f"{found}; none serves {missing}", advice)
        return found
    waiting = f" and {due} jobs wait" if due else ""
    return Remark(f"none is running{waiting}", "start `agentflow up`, or `dramatiq actors`")


def _connections(system: System) -> str | Remark:
    """By process, as Postgres and Redis know them; a broker that speaks AMQP alone tells nobody, so those are by rule."""
    with system.database.connect() as conn:
        postgres = statistics.connections(conn)
    processes = {name: {"Postgres": number} for name, number in postgres.of_processes.items()}
    totals = [f"Postgres {postgres.used} of {postgres.most}"]
    crowded = postgres.used > _CROWDED * postgres.most
    if system.settings.redis_url is not None or system.settings.embedded_redis:
        with suppress(redis.RedisError):  # a check of its own says what is wrong there
            clients, most = _redis_clients(system)
            for name, number in clients.items():
                processes.setdefault(name, {})["Redis"] = number
            totals.append(f"Redis {sum(clients.values())}" + (f" of {most}" if most else ""))
            crowded = crowded or bool(most and sum(clients.values()) > _CROWDED * most)
    if system.settings.rabbitmq_url is not None:
        for name, counts in processes.items():
            counts["RabbitMQ"] = _WORKERS_RABBITMQ if name.split(" ")[1] in ("worker", "up") else 1
        totals.append(f"RabbitMQ at most {sum(counts['RabbitMQ'] for counts in processes.values())}")
    lines = [
        f"{name.removeprefix('agentflow ')}: {', '.join(f'{server} {n}' for server, n in counts.items())}"
        for name, counts in sorted(processes.items())
    ]
    found = f"\n  {'':<11} ".join([", ".join(totals), *lines])
    if crowded:
        return Remark(found, "lower DATABASE_POOL_SIZE or the number of processes, or take a larger plan")
    return found


def _redis_clients(system: System) -> tuple[dict[str, int], int | None]:
    """Connections by process, and the most that there may be, where the server says so."""
    client = system.redis_client(answer_timeout_s=_CONNECT_S)
    try:
        found: dict[str, int] = {}
        for each in client.client_list():
            if named := _REDIS_NAME.fullmatch(str(each.get("name", ""))):
                name = f"agentflow {' '.join(named.groups())}"
                found[name] = found.get(name, 0) + 1
        return found, client.info("clients").get("maxclients")
    finally:
        client.close()


def _redis(system: System) -> str | Remark:
    variable = "REDIS_URL" if system.settings.redis_url else "AGENTFLOW_HOME"
    url = system.redis_url
    parts = urlsplit(url)
    if parts.scheme != "unix":
        _reach(parts.hostname or "localhost", parts.port or 6379, variable)
    began = time.monotonic()
    trust = system.settings.trust
    client = redis_broker.connect(
        url, connect_timeout_s=_CONNECT_S, answer_timeout_s=_CONNECT_S, client_name="agentflow doctor", trust=trust
    )
    try:
        client.ping()
        connected_ms = (time.monotonic() - began) * 1000
        info: dict[str, Any] = client.info()
    except redis.RedisError as error:
        raise _redis_refused(error, parts.scheme, variable) from None
    finally:
        client.close()
    name = "Valkey" if "valkey_version" in info else "Redis"
    found = f"{name} {info.get('valkey_version') or info.get('redis_version', '?')}, answers in {connected_ms:.0f} ms"
    if parts.scheme == "rediss":
        found += f", TLS {redis_broker.presence_of(url, trust).where['tls']}"
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory") and policy != "noeviction":
        return Remark(f"{found}, throws keys away when it is full ({policy})", "set its policy to noeviction")
    if parts.scheme == "redis" and parts.hostname and not _is_private(parts.hostname):
        return Remark(f"{found}, not encrypted", "use rediss:// in REDIS_URL")
    return found


def _redis_refused(error: redis.RedisError, scheme: str, variable: str) -> Wrong:
    text = one_line(error)
    low = text.lower()
    if isinstance(error, redis.AuthenticationError) or "noauth" in low or "wrongpass" in low or "noperm" in low:
        return Wrong(f"auth: the server refuses the password: {text}", f"check it in {variable}; quote @ : / # in it")
    if isinstance(error.__cause__, ssl.SSLError) or "ssl" in low or "certificate" in low:
        return Wrong(
            f"TLS: {text}", "redis:// for a server without TLS; TLS_CA_FILE names the file of your own authority"
        )
    if isinstance(error, redis.TimeoutError):
        return Wrong(
            f"timeout: connected, but it did not answer within {_CONNECT_S:g} s",
            "if it wants TLS use rediss://, else it hangs or is overloaded",
        )
    if isinstance(error, redis.ConnectionError) and scheme == "redis" and ("closed" in low or "reset" in low):
        return Wrong(f"the connection was closed at once: {text}", "the server may want TLS: rediss://")
    return Wrong(text, f"check {variable}")


def _rabbitmq(system: System) -> str | Remark:
    broker = system.broker
    assert isinstance(broker, RabbitBroker)  # noqa: S101 - what RABBITMQ_URL makes it
    _reach(broker.host, broker.port, "RABBITMQ_URL")
    began = time.monotonic()
    try:
        broker.check(_CONNECT_S)
    except OSError as error:
        raise _rabbitmq_refused(error) from None
    found = (
        f"{broker.publishing.server}, connected in {(time.monotonic() - began) * 1000:.0f} ms;"
        f" {'quorum' if broker.quorum else 'classic'} queues; a worker uses 2 connections, any other process 1"
    )
    if broker.encrypted:
        found += f"; TLS {broker.presence.where['tls']}"
    if not broker.encrypted and not _is_private(broker.host):
        return Remark(f"{found}, not encrypted", "use amqps:// in RABBITMQ_URL")
    return found


def _rabbitmq_refused(error: OSError) -> Wrong:
    text = one_line(error)
    low = text.lower()
    if "access_refused" in low or "authentication" in low:
        return Wrong(f"auth: the server refuses the user or password: {text}", "check both in RABBITMQ_URL")
    if "vhost" in low or "not_allowed" in low or "accessdenied" in low:
        return Wrong(f"the virtual host is refused: {text}", "it is the path of RABBITMQ_URL; %2F is the default one")
    if "ssl" in low or "certificate" in low or "incompatibleprotocol" in low:
        return Wrong(
            f"TLS: {text}", "amqp:// for a server without TLS; TLS_CA_FILE names the file of your own authority"
        )
    if "blocks publishers" in low:
        return Wrong(text, "the server is short of memory or disk: make room there")
    if isinstance(error, TimeoutError) or "timeout" in low or "not connected yet" in low:
        return Wrong(
            f"timeout: connected, but it did not answer within {_CONNECT_S:g} s", "is it starting, or overloaded?"
        )
    return Wrong(text, "check RABBITMQ_URL")


def _storage(system: System) -> str:
    settings = system.settings
    where = "STORAGE_URL" if settings.storage_url else "SUPABASE_URL" if settings.supabase_key else "AGENTFLOW_HOME"
    key = f"doctor/{uuid4()}"
    content = os.urandom(64)
    try:
        storage = system.storage
        storage.put_bytes(key, content)
        back = b"".join(storage.read(key))
        storage.delete(key)
    except (StorageError, OSError) as error:
        keys = (
            "SUPABASE_SECRET_KEY"
            if settings.supabase_key
            else "for s3:// AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION"
        )
        raise Wrong(one_line(error), f"check {where}, and {keys}") from None
    if back != content:
        raise Wrong("what was written came back changed", f"do not use the storage of {where}")
    kind = "Supabase" if settings.supabase_key else urlsplit(settings.storage_url or "file:").scheme
    return "written, read and deleted " + ("on this machine's disk" if kind == "file" else f"in the {kind} bucket")


def _web(read: Settings) -> str | Remark:
    url = running.url_of(read.agentflow_home)
    return f"`agentflow up` serves at {url}" if url else "no `agentflow up` runs in this home"
