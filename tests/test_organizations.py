"""Organizations and their keys: what is kept of a key, how soon an end is noticed, wrong ones from one address, the commands."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from flask import Flask, Request
from werkzeug.test import EnvironBuilder

from agentflow import organizations, settings
from agentflow.organizations import SCOPES
from agentflow.settings import SettingsError
from agentflow.system import System
from tests.conftest import ADMIN_KEY
from tests.processes import BIN, ROOT, eventually
from tests.web_support import problem
from web import access, create_app
from web.address import Proxies

Connection = psycopg.Connection


def key_of(conn: Connection, organization_id: int = 1, **more: Any) -> tuple[organizations.ApiKey, str]:
    with conn.transaction():
        return organizations.create_key(conn, organization_id, "test", SCOPES, **more)


def status_of(app: Flask, key: str, address: str = "203.0.113.7", **headers: str) -> int:
    asked = app.test_client().get(
        "/api/job-types",
        headers={"Authorization": f"Bearer {key}", **headers},
        environ_base={"REMOTE_ADDR": address},
    )
    return asked.status_code


@pytest.fixture
def app_with(environment: dict[str, str]) -> Iterator[Callable[..., Flask]]:
    started: list[System] = []

    def make(**more: str) -> Flask:
        started.append(System.start(settings.load({**environment, **more}), "test"))
        return create_app(started[-1])

    yield make
    for system in started:
        system.close()


# ---- what is kept ----


def test_of_a_key_only_its_beginning_and_its_hash_are_kept(conn: Connection) -> None:
    made, key = key_of(conn)

    row = conn.execute("select to_jsonb(k)::text from agentflow.api_keys k").fetchone()
    assert row is not None and key not in row[0] and key[15:] not in row[0]
    assert key.startswith(made.prefix + "_") and len(key) == 15 + 1 + 43
    kept = conn.execute("select hash from agentflow.api_keys").fetchone()
    assert kept is not None and bytes(kept[0]) == hashlib.sha256(key.encode()).digest()
    found = organizations.present(conn, key)
    assert found is not None and (found.organization_id, found.state) == (1, "good")
    for wrong in (key[:-1], key + "x", key.replace("af_", "AF_"), made.prefix, "", "é", "af_" + "\x00" * 56):
        assert organizations.present(conn, wrong) is None


def test_two_keys_with_the_same_beginning_cannot_be(conn: Connection) -> None:
    made, key = key_of(conn)

    other = key[:16] + ("a" * 43)

    assert organizations.present(conn, other) is None  # found by its prefix, refused by its hash
    assert made.prefix == other[:15]


def test_the_last_use_is_written_at_most_once_a_minute(conn: Connection) -> None:
    made, key = key_of(conn)

    def used() -> datetime | None:
        found = organizations.get_key(conn, 1, made.id)
        assert found is not None
        return found.last_used_at

    assert used() is None
    organizations.present(conn, key)
    first = used()
    organizations.present(conn, key)
    assert first is not None and used() == first
    conn.execute("update agentflow.api_keys set last_used_at = last_used_at - interval '61 s'")
    organizations.present(conn, key)
    again = used()
    assert again is not None and again >= first


@pytest.mark.parametrize("scopes", [[], ["everything"], ["read", "admin"]])
def test_unknown_scopes_are_refused_by_the_program_and_by_the_database(conn: Connection, scopes: list[Any]) -> None:
    with pytest.raises(ValueError, match="scopes"):
        organizations.create_key(conn, 1, "x", scopes)
    with pytest.raises(psycopg.errors.CheckViolation):
        conn.execute(
            "insert into agentflow.api_keys (id, organization_id, name, prefix, hash, scopes)"
            " values (%s, 1, 'x', 'p', sha256('x'), %s)",
            (uuid4(), scopes),
        )


# ---- how soon an end is noticed ----


def test_a_revoked_key_stops_within_seconds_and_an_expired_one_on_time(
    app_with: Callable[..., Flask], conn: Connection
) -> None:
    app, other = app_with(), app_with()  # two processes, each with its memory
    made, key = key_of(conn)
    _, short = key_of(conn, expires_at=datetime.now(UTC) + timedelta(seconds=2))
    assert [status_of(a, k) for a in (app, other) for k in (key, short)] == [200] * 4

    began = time.monotonic()
    organizations.revoke_key(conn, 1, made.id)

    eventually(lambda: {status_of(a, k) for a in (app, other) for k in (key, short)} <= {401, 429})
    assert time.monotonic() - began < 30  # a slow machine's; the bound itself is the next test's
    assert status_of(app, ADMIN_KEY) == 200


def test_a_key_is_believed_without_a_look_for_no_longer_than_the_bound(
    app_with: Callable[..., Flask], conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    app = app_with()
    made, key = key_of(conn)
    assert status_of(app, key) == 200
    organizations.revoke_key(conn, 1, made.id)

    now[0] += access.REMEMBERED_S - 0.01
    assert status_of(app, key) == 200  # this is what the memory costs …
    now[0] += 0.02
    assert status_of(app, key) == 401  # … and where it ends
    assert access.REMEMBERED_S <= 5


def test_a_rotated_key_works_for_its_grace_and_an_ended_one_is_not_brought_back(conn: Connection) -> None:
    made, key = key_of(conn, expires_at=datetime(2099, 1, 1, tzinfo=UTC))

    with conn.transaction():
        rotated = organizations.rotate_key(conn, 1, made.id, grace_s=3600)
    assert rotated is not None
    new, new_key = rotated
    assert new.expires_at == made.expires_at  # rotating prolongs nothing
    states = [organizations.present(conn, k) for k in (key, new_key)]
    assert [s.state for s in states if s] == ["good", "good"]
    old = organizations.get_key(conn, 1, made.id)
    assert old is not None and old.successor_id == new.id and (new.name, new.scopes) == (old.name, old.scopes)
    conn.execute("update agentflow.api_keys set expires_at = expires_at - interval '1 h' where id = %s", (made.id,))
    found = organizations.present(conn, key)
    assert found is not None and found.state == "expired"
    assert organizations.rotate_key(conn, 1, made.id) is None
    organizations.revoke_key(conn, 1, new.id)
    assert organizations.rotate_key(conn, 1, new.id) is None
    assert organizations.revoke_key(conn, 2, new.id) is None  # another organization's


# ---- wrong keys from one address ----


WRONG = "af_000000000000_" + "x" * 43


def test_wrong_keys_from_one_address_are_limited_and_a_good_one_never_is(
    app_with: Callable[..., Flask], conn: Connection
) -> None:
    first, second = app_with(AUTH_FAILURES_PER_MINUTE="5"), app_with(AUTH_FAILURES_PER_MINUTE="5")
    _, key = key_of(conn)

    said = [status_of((first, second)[n % 2], WRONG) for n in range(12)]

    assert 429 in said[5:] and said[:5] == [401] * 5  # counted together (a minute may turn in between)
    answer = first.test_client().get(
        "/api/job-types", headers={"Authorization": f"Bearer {WRONG}"}, environ_base={"REMOTE_ADDR": "203.0.113.7"}
    )
    if answer.status_code == 429:
        problem(answer, 429)
        assert 1 <= int(answer.headers["Retry-After"]) <= 61
    assert status_of(first, key) == status_of(second, ADMIN_KEY) == 200
    assert status_of(first, WRONG, "203.0.113.8") == 401  # somebody else


def test_without_redis_each_process_counts_by_itself(app_with: Callable[..., Flask], conn: Connection) -> None:
    app = app_with(AUTH_FAILURES_PER_MINUTE="5", REDIS_URL="redis://127.0.0.1:1")
    _, key = key_of(conn)

    said = [status_of(app, WRONG) for _ in range(12)]

    assert said[:5] == [401] * 5 and 429 in said[5:]
    assert status_of(app, key) == 200


def test_a_request_without_a_key_is_no_guess(app_with: Callable[..., Flask]) -> None:
    app = app_with(AUTH_FAILURES_PER_MINUTE="2")

    said = {app.test_client().get("/api/job-types").status_code for _ in range(8)}

    assert said == {401}


@pytest.mark.parametrize(
    ("trusted", "remote", "forwarded", "client"),
    [
        # Nobody in front: what a caller says of himself does not count.
        ((), "203.0.113.7", "198.51.100.1", "203.0.113.7"),
        ((), "203.0.113.7", None, "203.0.113.7"),
        # By number: the platform's one proxy appends whom it saw; the rest is the caller's own invention.
        (("1",), "10.0.0.1", "203.0.113.7", "203.0.113.7"),
        (("1",), "10.0.0.1", "1.1.1.1, 203.0.113.7", "203.0.113.7"),
        (("2",), "10.0.0.1", "1.1.1.1, 203.0.113.7, 10.0.0.2", "203.0.113.7"),
        (("1",), "10.0.0.1", None, "10.0.0.1"),
        (("3",), "10.0.0.1", "203.0.113.7", "203.0.113.7"),
        # By address: the right-most that is none of ours.
        (("10.0.0.0/8",), "10.0.0.1", "1.1.1.1, 203.0.113.7, 10.9.9.9", "203.0.113.7"),
        (("10.0.0.0/8",), "203.0.113.9", "1.1.1.1", "203.0.113.9"),
        (("10.0.0.0/8", "::1"), "::1", "203.0.113.7", "203.0.113.7"),
        (("10.0.0.0/8",), "10.0.0.1", "10.1.1.1, 10.2.2.2", "10.1.1.1"),
        # Spellings of the platforms', and nonsense.
        (("1",), "10.0.0.1", "203.0.113.7:4711", "203.0.113.7"),
        (("1",), "10.0.0.1", "[2001:db8:1:2:3::4]:443", "2001:db8:1:2::/64"),
        (("1",), "10.0.0.1", "::ffff:203.0.113.7", "203.0.113.7"),
        (("1",), "10.0.0.1", "unknown", "10.0.0.1"),
        (("1",), "10.0.0.1", ",, ,", "10.0.0.1"),
        ((), "2001:db8:1:2:aaaa::1", None, "2001:db8:1:2::/64"),
        ((), "", None, "unknown"),
        ((), "", "203.0.113.7", "unknown"),
        (("1",), "", "203.0.113.7", "203.0.113.7"),
    ],
)
def test_the_address_is_the_nearest_that_is_none_of_the_proxies(
    trusted: tuple[str, ...], remote: str, forwarded: str | None, client: str
) -> None:
    environ = EnvironBuilder(headers={"X-Forwarded-For": forwarded} if forwarded is not None else None).get_environ()
    environ["REMOTE_ADDR"] = remote

    assert Proxies(trusted).client_of(Request(environ)) == client


def test_behind_a_proxy_callers_are_told_apart_and_cannot_hide(app_with: Callable[..., Flask]) -> None:
    app = app_with(AUTH_FAILURES_PER_MINUTE="3", TRUSTED_PROXIES="1")

    def guess(address: str, pretended: str = "") -> int:
        return status_of(app, WRONG, "10.0.0.1", **{"X-Forwarded-For": f"{pretended}{address}"})

    said = [guess("203.0.113.7", f"192.0.2.{n}, ") for n in range(8)]  # another invention each time

    assert 429 in said[3:]
    assert guess("203.0.113.8") == 401


@pytest.mark.parametrize("value", ["proxy.example", "10.0.0.0/33", "-1", "1, 10.0.0.1/x"])
def test_a_wrong_proxy_setting_is_named(environment: dict[str, str], value: str) -> None:
    with pytest.raises(SettingsError, match="TRUSTED_PROXIES"):
        settings.load({**environment, "TRUSTED_PROXIES": value})


# ---- over HTTP ----


def test_the_operator_makes_organizations_and_keys_over_http(app_with: Callable[..., Flask]) -> None:
    app = app_with()
    operator = app.test_client()
    operator.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {ADMIN_KEY}"
    made = operator.post("/api/organizations", json={"slug": "acme", "name": "Acme Ltd"})
    assert made.status_code == 201
    problem(operator.post("/api/organizations", json={"slug": "acme"}), 409)
    for slug in ("", "-a", "A", "a_b", "x" * 64, "a\n"):
        problem(operator.post("/api/organizations", json={"slug": slug}), 422)
    of_acme = {"X-Organization": "acme"}

    created = operator.post("/api/keys", json={"name": "bot", "scopes": ["read"]}, headers=of_acme)
    rotated = operator.post(f"/api/keys/{created.json['id']}/rotate", json={"grace_s": 0})
    assert (created.status_code, rotated.status_code) == (201, 201)
    assert created.json["organization_id"] == rotated.json["organization_id"] == made.json["id"]
    assert status_of(app, rotated.json["key"]) == 200
    assert status_of(app, created.json["key"]) == 401  # a grace of nothing
    revoked = operator.post(f"/api/keys/{rotated.json['id']}/revoke")
    assert revoked.status_code == 200 and revoked.json["revoked_at"] is not None
    problem(operator.post(f"/api/keys/{rotated.json['id']}/rotate", json={}), 409)
    problem(operator.post("/api/keys", json={"name": "bot", "scopes": ["root"]}), 422)

    listed = operator.get("/api/keys?limit=1", headers=of_acme).json
    rest = operator.get(f"/api/keys?cursor={listed['next_cursor']}", headers=of_acme).json
    assert [k["id"] for k in listed["keys"] + rest["keys"]] == [rotated.json["id"], created.json["id"]]
    assert rest["next_cursor"] is None and "key" not in listed["keys"][0]
    slugs = [o["slug"] for o in operator.get("/api/organizations").json["organizations"]]
    assert slugs == ["default", "acme"]
    assert [o["slug"] for o in operator.get("/api/organizations?after=1").json["organizations"]] == ["acme"]


# ---- commands ----


def test_the_commands_from_the_first_organization_to_a_leaked_key(
    app_with: Callable[..., Flask], environment: dict[str, str]
) -> None:
    app = app_with()

    def run(*arguments: str, status: int = 0) -> tuple[str, str]:
        done = subprocess.run(
            [str(BIN / "agentflow"), *arguments],
            env={"PATH": "/usr/bin:/bin", **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, done.stderr
        return done.stdout, done.stderr

    run("orgs", "create", "acme", "--name", "Acme Ltd")
    assert "acme" in run("orgs", "list")[0]
    key, note = run("keys", "create", "--org", "acme", "--name", "bot", "--scope", "read", "--scope", "submit")
    key = key.rstrip("\n")
    assert "\n" not in key and "not shown again" in note and key not in note
    assert status_of(app, key) == 200
    (listed,) = [json.loads(line) for line in run("keys", "list", "--org", "acme", "--json")[0].splitlines()]
    assert listed["prefix"] == key[:15] and listed["scopes"] == ["submit", "read"] and listed["last_used_at"]
    new = run("keys", "rotate", listed["id"], "--grace", "1")[0].rstrip("\n")
    assert status_of(app, new) == status_of(app, key) == 200
    assert "is revoked" in run("keys", "revoke", new)[0]  # by the key itself, as it was found in a log
    eventually(lambda: status_of(app, new) == 401)
    assert "revoked" in run("keys", "list")[0]
    _, refused = run("keys", "create", "--org", "nobody", "--name", "x", status=2)
    assert refused.count("\n") == 1 and "orgs list" in refused
    secret = run("callbacks", "secret", "--org", "acme")[0]
    assert secret.startswith("whsec_") and "when another is made" in run("callbacks", "secrets", "--org", "acme")[0]
    assert run("callbacks", "list", str(uuid4()))[0] == "no callbacks\n"
    assert "there is no callback" in run("callbacks", "replay", str(uuid4()), status=1)[1]
