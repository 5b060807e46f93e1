"""Connections that die, freeze, are forgotten or lead elsewhere: each wait ends, one line says so, all comes back by itself."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis

from agentflow import network, schema, settings
from agentflow.broker import BrokerAway, message_for
from agentflow.database import Unavailable
from agentflow.jobs.model import Job, Ring
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.connection_support import (
    AWAY,
    HOST,
    KINDS,
    VARIABLES,
    Authority,
    Log,
    Servers,
    broker_of,
    reach,
    reachable,
    valkey,
)
from tests.middleman import between
from tests.postgres15 import cluster
from tests.processes import Process, eventually, worker
from tests.rabbitmq import Node

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def far(environment: dict[str, str], servers: Servers) -> Iterator[System]:
    """A system whose servers are reached by middlemen, under HOST."""
    with servers.behind():
        system = System(settings.load({**environment, **servers.environment(HOST)}), "test")
        yield system
        system.close()


# ---- names and addresses ----


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """An address where nothing answers, not even with a refusal: a listener whose queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            waiting.append(sock)
        yield listener.getsockname()
        for sock in waiting:
            sock.close()


def test_a_dead_address_does_not_use_up_the_time_of_a_live_one(
    silent: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as live:
        addresses = [silent, silent, live.getsockname()]
        answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: answer)

        with network.connect("two.example.com", 1, timeout_s=20.0) as sock:
            assert sock.getpeername() == live.getsockname()
        # One after the other, each for the whole time, the first two would have used it up.
        assert network.in_order("two.example.com", 1, 20.0)[0] == "127.0.0.1"


def test_a_name_of_dead_addresses_only_ends_in_time(silent: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", silent)] * 2
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: answer)

    with pytest.raises(TimeoutError, match="did not answer in time"):
        network.connect("dead.example.com", 1, timeout_s=0.6)


def test_a_resolver_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: hangs.wait(60) and [])

    with pytest.raises(TimeoutError, match="was not looked up"):
        network.resolve("slow.example.com", 1, 0.2)
    hangs.set()


@pytest.mark.parametrize(
    ("listens", "answers"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("::1", ["::1"]),
        ("127.0.0.1", ["::1", "127.0.0.1"]),
        ("::1", ["127.0.0.1", "::1"]),
        ("127.0.0.1", ["127.99.0.1", "127.99.0.2", "127.0.0.1"]),
    ],
)
def test_names_of_one_family_of_both_and_with_dead_addresses_are_reached(
    environment: dict[str, str], servers: Servers, names: dict[str, list[str]], listens: str, answers: list[str]
) -> None:
    names[HOST] = answers
    with servers.behind(host=listens):
        system = System(settings.load({**environment, **servers.environment(HOST)}), "test")
        for kind in KINDS:
            reach(system, kind)
        system.close()


def test_a_name_that_is_gone_is_said_once_and_found_when_it_is_back(
    far: System, names: dict[str, list[str]], said: Log, servers: Servers
) -> None:
    names[HOST] = []
    for _ in range(3):
        assert [reachable(far, kind) for kind in KINDS] == [False] * 3
    names[HOST] = ["127.0.0.1"]
    for kind in KINDS:
        eventually(lambda kind=kind: reachable(far, kind))

    for kind in KINDS:
        events = [event for event, _ in said.lines if event.startswith(kind)]
        assert events == [f"{kind} URL constructed", f"{kind} cannot be reached", f"{kind} connection ready"]
    lost = said.of("cannot be reached")
    assert {fields["variable"] for fields in lost} == set(VARIABLES.values())
    assert all(f"the name {HOST} cannot be found" in fields["error"] for fields in lost)
    assert all(fields["suppressed_errors"] >= 0 for fields in said.of("connection ready"))


# ---- frozen and forgotten ----


def test_every_socket_notices_a_peer_that_is_gone_without_a_word(
    far: System, names: dict[str, list[str]], servers: Servers
) -> None:
    def options(sock: socket.socket) -> dict[str, int]:
        return {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in network.KEEPALIVE}

    with far.database.connect() as conn:
        with socket.socket(fileno=socket.dup(conn.fileno())) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert options(sock) == network.KEEPALIVE
    client = far.redis_client()
    client.ping()
    connection = client.connection_pool.get_connection()
    assert connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert options(connection._sock) == network.KEEPALIVE
    client.close()
    broker = broker_of(far)
    broker.check(8.0)
    sock = broker.publishing._connection._transport._sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert options(sock) == network.KEEPALIVE


@pytest.mark.parametrize("fate", ["frozen", "forgotten"])
def test_a_wait_for_a_silent_peer_ends_and_the_next_connection_works(
    far: System, names: dict[str, list[str]], servers: Servers, fate: str
) -> None:
    conn = far.database.connect(answer_timeout_s=1.0)
    client = far.redis_client(answer_timeout_s=1.0)
    broker = broker_of(far)
    conn.execute("select 1")
    client.ping()
    broker.check(8.0)
    for middleman in servers.middlemen.values():
        middleman.forget()
        middleman.frozen = fate == "frozen"

    with pytest.raises(psycopg.OperationalError, match="did not answer within 1 s"):
        conn.execute("select 1")
    assert conn.closed
    with pytest.raises(redis.TimeoutError):
        client.ping()
    with pytest.raises(TimeoutError, match="did not confirm"):
        broker.publishing.publish([broker._letter(_message(far))], timeout_s=1.0)

    if (
        fate == "frozen"
    ):  # new connections are accepted by the kernel of a frozen peer, and must not wait for ever either
        assert [reachable(far, kind) for kind in KINDS] == [False] * 3
        for middleman in servers.middlemen.values():
            middleman.frozen = False
    for kind in KINDS:
        eventually(lambda kind=kind: reachable(far, kind), within_s=60)


def _message(system: System) -> Any:
    return message_for(Ring(UUID(int=0), "default", "ping"), system.settings.job_queue_name)


# ---- whole workers ----


@pytest.fixture
def quick(environment: dict[str, str], servers: Servers) -> Iterator[dict[str, str]]:
    """A worker's environment by middlemen, with short leases."""
    with servers.behind():
        yield {
            **environment,
            **servers.environment("127.0.0.1"),
            "JOB_LEASE": "6",
            "JOB_LEASE_RENEW": "2",
            "AGENTFLOW_ENV": "production",
            "PORT": str(free_port()),
        }


@pytest.fixture
def near(environment: dict[str, str], rabbitmq: Node) -> Iterator[System]:
    """The same system, past the middlemen."""
    system = System.start(settings.load({**environment, "RABBITMQ_URL": rabbitmq.url}), "test")
    yield system
    system.close()


def done(url: str, jobs: list[Job]) -> bool:
    """Asked past the middlemen."""
    with psycopg.connect(url, autocommit=True) as conn:
        row = conn.execute(
            "select count(*) from agentflow.jobs where id = any (%s) and state = 'succeeded'", ([j.id for j in jobs],)
        ).fetchone()
    return row == (len(jobs),)


def once_each(url: str, jobs: list[Job]) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        ends = conn.execute(
            "select count(*) filter (where outcome = 'succeeded') from agentflow.job_attempts where job_id = any (%s)"
            " group by job_id",
            ([j.id for j in jobs],),
        ).fetchall()
    assert ends == [(1,)] * len(jobs)


def lines_of(process: Process, event: str) -> list[str]:
    return [line for line in process.text().splitlines() if f'"event": "{event}"' in line]


def ask_how_it_is(environment: dict[str, str]) -> bool:
    """As the platform does every few seconds, which has each connection looked at."""
    with urllib.request.urlopen(f"http://127.0.0.1:{environment['PORT']}/health", timeout=10) as answer:
        return bool(answer.status == 200)


@pytest.mark.long
def test_a_worker_whose_connections_were_all_forgotten_goes_on(
    quick: dict[str, str], near: System, database_url: str, servers: Servers, tmp_path: Path
) -> None:
    with worker(quick, tmp_path / "worker.log") as process:
        far = System(settings.load(quick), "test")
        jobs = [far.submit(1, NewJob("ping", {"sleep_ms": 50})).job for _ in range(10)]
        eventually(lambda: done(database_url, jobs))
        for middleman in servers.middlemen.values():
            middleman.forget()
        # Past the middlemen: by the forgotten pool it would wait for its answer.
        jobs += [near.submit(1, NewJob("ping", {"sleep_ms": 50})).job for _ in range(10)]
        eventually(lambda: done(database_url, jobs), within_s=120)
        far.close()
        assert process.popen.poll() is None
    once_each(database_url, jobs)


def test_an_outage_of_everything_is_a_handful_of_lines(
    quick: dict[str, str], near: System, database_url: str, servers: Servers, tmp_path: Path
) -> None:
    with worker(quick, tmp_path / "worker.log") as process:
        jobs = [near.submit(1, NewJob("ping", {})).job for _ in range(5)]
        eventually(lambda: done(database_url, jobs))
        for kind in KINDS:  # results go to Redis after the jobs have ended
            eventually(lambda kind=kind: len(lines_of(process, f"{kind} connection ready")) == 1)
        before = len(process.text().splitlines())
        for middleman in servers.middlemen.values():
            middleman.refuse()
        for _ in range(20):
            ask_how_it_is(quick)
            time.sleep(1)
        attempts = [middleman.accepted for middleman in servers.middlemen.values()]
        for middleman in servers.middlemen.values():
            middleman.listen()
        for kind in KINDS:
            again = f"{kind} connection ready"
            eventually(lambda again=again: ask_how_it_is(quick) and len(lines_of(process, again)) == 2, every_s=0.5)
        jobs += [near.submit(1, NewJob("ping", {})).job for _ in range(5)]
        eventually(lambda: done(database_url, jobs))
        news = process.text().splitlines()[before:]
        for middleman, accepted in zip(servers.middlemen.values(), attempts, strict=True):
            assert middleman.accepted - accepted < 40  # and no storm when it is back

    for kind in KINDS:
        said = [line for line in news if f'"{kind} ' in line]
        assert len([line for line in said if "connection lost" in line]) == 1, said
        assert len([line for line in said if "connection ready" in line]) == 1, said
        assert "suppressed_errors" in said[-1] and "away_s" in said[-1]
    assert len(news) <= 15, "\n".join(news)
    assert "guest:guest" not in process.text()


# ---- passwords ----


@pytest.mark.long
def test_a_changed_password_is_said_by_name_and_not_asked_for_in_a_hot_loop(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with cluster(method="scram-sha-256") as server:
        server.make("log_connections = on")
        server.start()
        server.sql("alter role agentflow password 'first'")
        with between(("127.0.0.1", server.port)) as middleman:
            url = server.url(middleman.port, password="first")
            own = {**environment, "DATABASE_URL": url, "JOB_LEASE": "6", "JOB_LEASE_RENEW": "2"}
            _migrate(server.by_socket)
            system = System.start(settings.load({**own, "DATABASE_URL": server.by_socket}), "test")
            with worker(own, tmp_path / "worker.log") as process:
                jobs = [system.submit(1, NewJob("ping", {})).job for _ in range(3)]
                eventually(lambda: done(server.by_socket, jobs))

                server.sql("alter role agentflow password 'second'")
                jobs += [system.submit(1, NewJob("ping", {})).job for _ in range(3)]
                eventually(lambda: done(server.by_socket, jobs))  # what is connected goes on
                before = middleman.accepted
                middleman.cut()
                process.wait_for("password authentication failed")
                time.sleep(10)
                tried = middleman.accepted - before
                (line,) = [x for x in process.text().splitlines() if "password authentication failed" in x]
                server.sql("alter role agentflow password 'first'")
                jobs += [system.submit(1, NewJob("ping", {})).job for _ in range(3)]
                eventually(lambda: done(server.by_socket, jobs), within_s=60)
            system.close()

    assert "DATABASE_URL" in line and "first" not in line
    assert 1 <= tried <= 20, tried


def _migrate(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        schema.migrate(conn)


def test_a_changed_password_of_redis_is_not_asked_for_in_a_hot_loop(
    environment: dict[str, str], said: Log, tmp_path: Path
) -> None:
    with valkey(tmp_path, "--requirepass", "first") as port, between(("127.0.0.1", port)) as middleman:
        url = f"redis://:first@127.0.0.1:{middleman.port}/0"
        system = System(settings.load({**environment, "REDIS_URL": url}), "test")
        client = system.redis_client(answer_timeout_s=2.0)
        with redis.Redis(port=port, password="first") as operator:
            client.ping()
            operator.config_set("requirepass", "second")
            middleman.cut()
            for _ in range(300):
                with pytest.raises(redis.RedisError):
                    client.ping()
            tried = middleman.accepted
            operator.config_set("requirepass", "first")
        eventually(lambda: reachable(system, "Redis"), within_s=60)
        client.close()

    (lost,) = said.of("connection lost")
    assert lost["variable"] == "REDIS_URL" and "first" not in str(said.lines)
    assert tried <= 12, tried


@pytest.mark.long
def test_a_changed_password_of_rabbitmq_is_not_asked_for_in_a_hot_loop(
    environment: dict[str, str], rabbitmq: Node, said: Log
) -> None:
    rabbitmq.ctl("add_user", "changing", "first")
    rabbitmq.ctl("set_permissions", "changing", ".*", ".*", ".*")
    try:
        with between(("127.0.0.1", rabbitmq.port)) as middleman:
            url = f"amqp://changing:first@127.0.0.1:{middleman.port}/%2F"
            system = System(settings.load({**environment, "RABBITMQ_URL": url}), "test")
            reach(system, "RabbitMQ")
            rabbitmq.ctl("change_password", "changing", "second")
            before = middleman.accepted
            middleman.cut()
            eventually(lambda: middleman.accepted > before + 2)
            time.sleep(10)
            tried = middleman.accepted - before
            rabbitmq.ctl("change_password", "changing", "first")
            eventually(lambda: reachable(system, "RabbitMQ"), within_s=60)
            system.close()
    finally:
        rabbitmq.ctl("delete_user", "changing")

    (lost,) = said.of("connection lost")
    assert lost["variable"] == "RABBITMQ_URL"
    assert tried <= 20, tried


# ---- a standby takes over ----


def test_a_promoted_standby_behind_the_same_name_goes_on_with_every_job(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Replication is synchronous: what was accepted is on both. The standby answers before it is promoted, and only reads."""
    with cluster() as primary, cluster() as standby:
        primary.make()
        primary.start()
        standby.make_standby_of(primary)
        standby.start()
        _migrate(primary.by_socket)
        primary.sql("alter system set synchronous_standby_names = '*'")
        primary.sql("select pg_reload_conf()")
        eventually(lambda: primary.sql("select sync_state from pg_stat_replication") == [("sync",)])
        with between(("127.0.0.1", primary.port)) as middleman:
            own = {**environment, "DATABASE_URL": primary.url(middleman.port), "JOB_LEASE": "6", "JOB_LEASE_RENEW": "2"}
            system = System.start(settings.load(own), "test")
            with worker(own, tmp_path / "worker.log") as process:
                jobs = [system.submit(1, NewJob("ping", {"sleep_ms": 400})).job for _ in range(40)]
                eventually(lambda: primary.sql("select 1 from agentflow.jobs where state = 'running'"))

                primary.kill()
                middleman.target = ("127.0.0.1", standby.port)
                middleman.cut()
                process.wait_for("takes no writes")  # away, and no permanent error
                with pytest.raises(Unavailable):
                    system.submit(1, NewJob("ping", {}))
                standby.promote()

                eventually(lambda: _accepts(system, jobs), within_s=60)
                eventually(lambda: done(standby.by_socket, jobs), within_s=90)
                said = process.text()
            system.close()
        once_each(standby.by_socket, jobs)
        late = "select count(*) from agentflow.jobs where state = 'running' or lease_until is not null"
        assert standby.sql(late) == [(0,)]
        assert standby.sql("select count(*) from agentflow.jobs where state <> 'succeeded'") == [(0,)]
        assert "Traceback" not in said
        assert len([line for line in said.splitlines() if "Postgres connection ready" in line]) == 2, said


def _accepts(system: System, jobs: list[Job]) -> bool:
    try:
        jobs.append(system.submit(1, NewJob("ping", {})).job)
        return True
    except Unavailable:
        return False


def test_a_connection_left_with_a_server_that_became_read_only_is_given_up(
    environment: dict[str, str], database_url: str, conn: psycopg.Connection, system: System, said: Log
) -> None:
    """As Supabase does with a full disk, and as a failover does whose old primary lives on."""
    name = conn.info.dbname
    ours = system.database.connect()
    ours.execute("set default_transaction_read_only = on")  # as if by the server: this connection is the old one's
    with pytest.raises(Unavailable, match="takes no writes"):
        ours.execute("insert into agentflow.installation (name, value) values ('x', 'y')")
    assert ours.closed

    conn.execute(f"alter database {name} set default_transaction_read_only = on".encode())
    with pytest.raises(Unavailable, match=r"^the server takes no writes"):
        System(system.settings, "another").database.connect()  # which knows nothing of an outage yet
    conn.execute("set default_transaction_read_only = off")
    conn.execute(f"alter database {name} reset default_transaction_read_only".encode())
    eventually(lambda: reachable(system, "Postgres"))


# ---- Upstash ----


@pytest.mark.parametrize("variable", ["UPSTASH_REDIS_REST_URL", "REDIS_URL"])
def test_a_worker_uses_upstashs_redis_by_the_rest_variables(
    environment: dict[str, str], authority: Authority, tmp_path: Path, variable: str
) -> None:
    """The derived URL is rediss://default:<token>@<host>:6379, so the stand-in has an address of its own to have that port."""
    token, host = "AX+t/ok:en==", "127.83.71.2"
    with (
        valkey(tmp_path, "--requirepass", token) as port,
        between(("127.0.0.1", port), host=host, port=6379, tls=authority.server(host)),
    ):
        del environment["REDIS_URL"]
        environment |= {
            variable: f"https://{host}",
            "UPSTASH_REDIS_REST_TOKEN": token,
            "TLS_CA_FILE": str(authority.file),
            "AGENTFLOW_ENV": "production",
        }
        system = System.start(settings.load(environment), "test")
        with worker(environment, tmp_path / "worker.log") as process:
            job = system.submit(1, NewJob("ping", {})).job
            ended = system.wait_finished(job, 25.0)
            assert ended is not None and ended.state == "succeeded"
            (line,) = lines_of(process, "Redis URL constructed")
            assert len(lines_of(process, "Redis connection ready")) == 1
        with closing(redis.Redis(port=port, password=token)) as operator:
            assert operator.dbsize() > 0  # type: ignore[operator]
        system.close()

    assert host in line and '"tls": "verified"' in line
    assert token not in process.text()


# ---- who we are ----


def test_every_server_is_told_who_is_connected(
    environment: dict[str, str], system: System, rabbitmq: Node, conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment["RABBITMQ_URL"] = rabbitmq.url
    with worker(environment, tmp_path / "worker.log"):
        job = system.submit(1, NewJob("ping", {})).job
        eventually(lambda: system.wait_finished(job, 1.0).terminal)  # type: ignore[union-attr]
        backends = conn.execute(
            "select application_name from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        ).fetchall()
        clients = [c["name"] for c in system.redis_client().client_list()]
        connections = rabbitmq.connections()

    assert backends and all(name.startswith(("agentflow worker ", "agentflow test ")) for (name,) in backends)
    assert any(name.startswith("agentflow-worker-") for name in clients)
    assert any(name.startswith("agentflow worker ") for name in connections)


def test_a_broker_known_to_be_away_is_not_waited_for(
    far: System, names: dict[str, list[str]], servers: Servers
) -> None:
    reach(far, "RabbitMQ")
    servers.middlemen["RabbitMQ"].refuse()
    eventually(lambda: not far.broker.can_publish())
    with pytest.raises(BrokerAway):
        far.broker.tell_cancel()
    assert issubclass(BrokerAway, AWAY)
