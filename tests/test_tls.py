"""Who is believed: TLS with verification for Postgres, Redis and RabbitMQ, by our own authority and none else."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

import psycopg
import pytest

from agentflow import database, settings, tls
from agentflow.cli import checkup
from agentflow.cli.checkup import postgres, rabbitmq, redis
from agentflow.settings import SettingsError
from agentflow.system import System
from agentflow.tls import Trust
from tests.connection_support import AWAY, HOST, KINDS, VARIABLES, Authority, Log, Servers, reach, reachable
from tests.postgres15 import cluster, own
from tests.processes import BIN, worker

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("names")]


def started_system(environment: dict[str, str], servers: Servers, **more: str) -> System:
    return System(settings.load({**environment, **servers.environment(HOST, tls=True), **more}), "test")


@pytest.mark.parametrize("how", ["file", "text"])
def test_the_own_authority_is_believed_by_one_setting(
    environment: dict[str, str], servers: Servers, authority: Authority, said: Log, how: str
) -> None:
    value = str(authority.file) if how == "file" else authority.file.read_text().strip()
    with servers.behind(tls=authority.server(HOST)):
        system = started_system(environment, servers, TLS_CA_FILE=value)
        for kind in KINDS:
            reach(system, kind)
        system.close()

    ready = {event for event, _ in said.lines if event.endswith("connection ready")}
    assert ready == {f"{kind} connection ready" for kind in KINDS}
    assert {fields["tls"] for fields in said.of("URL constructed")} == {"verify-full", "verified"}
    assert {fields["host"] for fields in said.of("URL constructed")} == {HOST}


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        ("unknown authority", "unable to get local issuer certificate|self-signed certificate"),
        ("another name", "[Hh]ostname mismatch|does not match host name"),
        ("expired", "certificate has expired"),
    ],
)
def test_a_certificate_that_is_wrong_is_refused_by_variable_and_reason(
    environment: dict[str, str],
    servers: Servers,
    authority: Authority,
    stranger: Authority,
    said: Log,
    fate: str,
    reason: str,
) -> None:
    context = {
        "unknown authority": lambda: stranger.server(HOST),
        "another name": lambda: authority.server("other.example.com"),
        "expired": lambda: authority.server(HOST, days=-1),
    }[fate]()
    with servers.behind(tls=context):
        system = started_system(environment, servers, TLS_CA_FILE=str(authority.file))
        for kind in KINDS:
            with pytest.raises(AWAY, match=reason) as refused:
                reach(system, kind)
            if kind != "RabbitMQ":  # whose errors are raised with the name by doctor, and by the log's field
                assert str(refused.value).startswith(f"{VARIABLES[kind]}: ")
        system.close()

    told = {fields["variable"]: fields["error"] for fields in said.of("cannot be reached")}
    assert set(told) == set(VARIABLES.values())
    for error in told.values():
        assert re.search(reason, error), error
    assert not said.of("connection ready")


def test_without_the_setting_the_systems_authorities_are_believed_and_no_other(
    environment: dict[str, str], servers: Servers, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with servers.behind(tls=authority.server(HOST)):
        system = started_system(environment, servers)
        assert [reachable(system, kind) for kind in KINDS] == [False] * 3
        system.close()

        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))  # as if the system's administrator had added ours
        system = started_system(environment, servers)
        assert [reachable(system, kind) for kind in KINDS] == [True] * 3
        system.close()


def test_the_own_authority_is_believed_beside_the_systems(
    environment: dict[str, str],
    servers: Servers,
    authority: Authority,
    stranger: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(stranger.file))
    with servers.behind(tls=stranger.server(HOST)):
        system = started_system(environment, servers, TLS_CA_FILE=str(authority.file))
        assert [reachable(system, kind) for kind in KINDS] == [True] * 3
        system.close()


def test_turning_verification_off_is_a_setting_that_the_log_complains_about(
    environment: dict[str, str], servers: Servers, stranger: Authority, said: Log
) -> None:
    with servers.behind(tls=stranger.server("other.example.com")):
        system = started_system(environment, servers, TLS_VERIFY="false")
        for kind in KINDS:
            reach(system, kind)
        warnings = system.settings.warnings()
        system.close()

    assert [w.split(" ")[0] for w in warnings] == ["TLS_VERIFY"]
    assert {fields["tls"] for fields in said.of("URL constructed")} == {"require", "not verified"}


def test_what_a_url_says_is_obeyed_and_complained_about(
    environment: dict[str, str], servers: Servers, stranger: Authority
) -> None:
    with servers.behind(tls=stranger.server(HOST)):
        urls = servers.environment(HOST, tls=True)
        urls["DATABASE_URL"] += "?sslmode=require"
        urls["REDIS_URL"] += "?ssl_cert_reqs=none"
        system = System(settings.load({**environment, **urls}), "test")
        reach(system, "Postgres")
        reach(system, "Redis")
        assert not reachable(system, "RabbitMQ")
        warnings = system.settings.warnings()
        system.close()

    assert [w.split(":")[0] for w in warnings] == ["DATABASE_URL", "REDIS_URL"]
    assert "require" in warnings[0]


def test_a_real_postgres_with_tls_is_verified_in_full(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    issued = authority.ca.issue_cert(HOST)
    with cluster() as server:
        key, chain = server.folder / "server.key", server.folder / "server.pem"
        issued.private_key_pem.write_to_path(str(key))
        issued.cert_chain_pems[0].write_to_path(str(chain))
        key.chmod(0o600)
        own(key)
        own(chain)
        server.make("ssl = on", f"ssl_key_file = '{key}'", f"ssl_cert_file = '{chain}'")
        server.start()
        url = server.url(host=HOST)

        ours = Trust(authority.file.read_text(), folder=tmp_path)
        with database.connect_once(url, application_name="t", trust=ours, variable="DATABASE_URL") as conn:
            assert conn.pgconn.ssl_in_use
        for query in ("", "?sslmode=verify-ca", "?sslrootcert=system", "?sslmode=verify-full"):
            strangers = Trust(stranger.file.read_text(), folder=tmp_path)
            with pytest.raises(
                psycopg.OperationalError, match="DATABASE_URL: the server's certificate is not accepted"
            ):
                database.connect_once(url + query, application_name="t", trust=strangers, variable="DATABASE_URL")
        # The URL's own authority goes before the setting's.
        named = f"{url}?sslmode=verify-full&sslrootcert={authority.file}"
        with database.connect_once(named, application_name="t", trust=strangers, variable="DATABASE_URL") as conn:
            assert conn.pgconn.ssl_in_use


@pytest.mark.parametrize(
    ("where", "mode"),
    [
        ("@db.example.com/x", "verify-full"),
        ("@ec2-1-2-3-4.compute-1.amazonaws.com/x", "verify-full"),
        ("@8.8.8.8/x", "verify-full"),
        ("@[2606:4700::1111]/x", "verify-full"),
        ("@db.example.com/x?sslmode=require", "require"),
        ("@db.example.com/x?sslmode=disable", "disable"),
        ("@db/x", "prefer"),
        ("@localhost/x", "prefer"),
        ("@10.0.0.5/x", "prefer"),
        ("@[fd12::5]/x", "prefer"),
        ("@postgres.railway.internal/x", "prefer"),
        ("@db.default.svc.cluster.local/x", "prefer"),
        ("@db,db.example.com/x", "verify-full"),
        ("@db.internal.example.com/x", "verify-full"),
        ("/x?host=/run/postgresql", None),
        ("/x", None),
    ],
)
def test_a_server_with_a_public_name_is_verified_and_one_of_a_private_network_need_not_have_tls(
    where: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGSSLMODE", raising=False)

    assert Trust().postgres(f"postgresql://{where}").get("sslmode") == mode


def test_doctor_says_what_tls_each_connection_uses(
    environment: dict[str, str], servers: Servers, authority: Authority, stranger: Authority
) -> None:
    with servers.behind(tls=authority.server(HOST)):
        system = started_system(environment, servers, TLS_CA_FILE=str(authority.file))
        for look, found in (
            (postgres.database, "TLS verified (sslmode=verify-full)"),
            (redis.server, "TLS verified"),
            (rabbitmq.server, "TLS verified"),
        ):
            said = look(system)
            assert isinstance(said, str) and found in said
        system.close()
    with servers.behind(tls=stranger.server(HOST)):
        system = started_system(environment, servers, TLS_CA_FILE=str(authority.file))
        for look in (postgres.database, redis.server, rabbitmq.server):
            with pytest.raises(checkup.Wrong, match=r"TLS: .*certificate") as wrong:
                look(system)
            assert "TLS_CA_FILE" in wrong.value.advice
        system.close()
        system = started_system(environment, servers, TLS_VERIFY="false")
        remark = postgres.database(system)
        assert isinstance(remark, checkup.Remark) and "TLS not verified (sslmode=require)" in remark.found
        system.close()


def test_a_file_without_certificates_stops_the_process_and_names_the_setting(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("no certificate")
    for value, why in ((str(empty), "no certificates"), (str(tmp_path / "none.pem"), "cannot be read")):
        with pytest.raises(SettingsError, match=f"TLS_CA_FILE: .*{why}"):
            settings.load({"TLS_CA_FILE": value})


def test_the_bundle_for_libpq_is_made_once_and_holds_both(authority: Authority, tmp_path: Path) -> None:
    trust = Trust(authority.file.read_text(), folder=tmp_path / "home")

    bundle = trust.bundle()

    assert Trust(authority.file.read_text(), folder=tmp_path / "home").bundle() == bundle
    assert bundle.parent == (tmp_path / "home").resolve()
    assert len(ssl.create_default_context(cafile=str(bundle)).get_ca_certs()) > 20
    assert authority.file.read_text().strip() in bundle.read_text()


def test_a_worker_says_on_one_line_why_it_does_not_believe_its_database(
    environment: dict[str, str], servers: Servers, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    """By its address and not by a name: this is another process."""
    with servers.behind(tls=stranger.server("127.0.0.1")):
        urls = servers.environment("127.0.0.1", tls=True)
        urls["DATABASE_URL"] += "?sslmode=verify-full"
        settings_ = {**environment, **urls, "TLS_CA_FILE": str(authority.file)}
        with worker(settings_, tmp_path / "worker.log", ready=False) as process:
            process.wait_for("certificate")
            (line, *_) = [line for line in process.text().splitlines() if "certificate" in line]

    assert "Postgres cannot be reached" in line and "DATABASE_URL" in line
    assert re.search("unable to get local issuer certificate|self-signed", line)


def test_postgres_by_a_private_name_is_encrypted_where_it_offers_that(
    environment: dict[str, str], servers: Servers, stranger: Authority
) -> None:
    assert tls.is_private("127.0.0.1") and BIN.exists()
    with servers.behind(tls=stranger.server("127.0.0.1")):
        url = servers.environment("127.0.0.1", tls=True)["DATABASE_URL"]
        with database.connect_once(url, application_name="t", trust=Trust(), variable="DATABASE_URL") as conn:
            assert conn.pgconn.ssl_in_use
