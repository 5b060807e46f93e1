"""One account's token, its limits and its refusals; and writing to it where answers get lost."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from actors import write_crm
from agentflow.connections import NoAnswer
from agentflow.errors import Permanent, Transient, Wait
from agentflow.jobs.requests import NewJob
from agentflow.kommo import accounts, hosts, syncing, tokens
from agentflow.kommo.accounts import Credentials
from agentflow.kommo.client import Client
from agentflow.kommo.tokens import NeedsReauth
from agentflow.system import System
from tests.core_support import ORGANIZATION, rows, value
from tests.http_server import Reply
from tests.kommo_server import Account as Server
from tests.kommo_server import answers, kommo, lose
from tests.kommo_support import account_of, attempt, connect, linked, run, server, sync, write
from tests.two_at_once import together

__all__ = ["linked", "server"]

Connection = psycopg.Connection
TOKEN = "/oauth2/access_token"


def authorized(system: System, server: Server, conn: Connection) -> accounts.Account:
    """An account that was connected by OAuth."""
    account = connect(system, server, code=server.new_code())
    buy(system, account)
    conn.execute("update agentflow.crm_accounts set state = 'connected'")
    return account_of(system, account)


def buy(system: System, account: accounts.Account, refused: str | None = None) -> str:
    return tokens.access(system, account, lambda: None, refused=refused).token


def renewal_due(conn: Connection, *, ended: bool = False) -> None:
    conn.execute("update agentflow.crm_accounts set access_renew_at = now() - interval '1 s', grant_held_until = null")
    if ended:
        conn.execute("update agentflow.crm_accounts set access_expires_at = now()")


def let_go(conn: Connection) -> None:
    """The minute for which a purchase holds the account is over."""
    conn.execute("update agentflow.crm_accounts set grant_held_until = now() - interval '1 s'")


# ---- tokens ----


def test_a_code_and_then_refresh_tokens_buy_tokens_each_once(linked: System, server: Server, conn: Connection) -> None:
    account = connect(linked, server, code=server.new_code())

    ended = sync(linked, conn, account)
    renewal_due(conn)
    again = sync(linked, conn, account)

    assert ended["state"] == again["state"] == "succeeded"
    assert server.requests[f"POST {TOKEN}"] == 2
    assert sorted(each.used for each in server.grants.values()) == [False, True]


def test_two_workers_buy_one_token(linked: System, server: Server, conn: Connection) -> None:
    account = authorized(linked, server, conn)
    renewal_due(conn)

    bought = together(*[lambda: buy(linked, account) for _ in range(6)])

    assert server.requests[f"POST {TOKEN}"] == 2
    assert {each for each in bought if each in server.tokens} == set(bought)
    assert buy(linked, account) != min(server.tokens)


def test_two_workers_with_a_token_that_ended_do_not_use_up_each_others(
    linked: System, server: Server, conn: Connection
) -> None:
    account = authorized(linked, server, conn)
    renewal_due(conn, ended=True)

    def one() -> str | None:
        try:
            return buy(linked, account)
        except Wait:
            return None

    bought = {each for each in together(*[one for _ in range(6)]) if each}

    assert len(bought) == 1 and server.requests[f"POST {TOKEN}"] == 2
    assert account_of(linked, account).state == "connected"


@pytest.mark.parametrize("done", [False, True])
def test_a_lost_answer_about_a_token_ends_nothing_at_once(
    linked: System, server: Server, conn: Connection, done: bool
) -> None:
    account = authorized(linked, server, conn)
    old = buy(linked, account)
    renewal_due(conn)
    server.faults.append(lose(server, "POST", TOKEN, done=done))

    assert buy(linked, account) == old  # the one at hand
    assert value(conn, "select grant_begun_at is not null from agentflow.crm_accounts")
    asked = server.requests[f"POST {TOKEN}"]
    assert buy(linked, account) == old and server.requests[f"POST {TOKEN}"] == asked  # within the minute nobody asks
    let_go(conn)
    after = buy(linked, account)

    if not done:
        assert after != old and value(conn, "select grant_begun_at is null from agentflow.crm_accounts")
        return
    assert after == old and account_of(linked, account).state == "connected"
    assert account_of(linked, account).grant_refused_at is not None
    renewal_due(conn, ended=True)
    with pytest.raises(NeedsReauth):
        buy(linked, account)
    assert account_of(linked, account).state == "needs_reauth"
    assert server.requests[f"POST {TOKEN}"] == asked + 1  # the refused one is not tried again


def test_a_purchase_that_was_not_even_sent_leaves_no_doubt(linked: System, server: Server, conn: Connection) -> None:
    account = authorized(linked, server, conn)
    renewal_due(conn, ended=True)
    conn.execute("update agentflow.crm_accounts set base_url = 'http://127.0.0.1:9'")

    with pytest.raises(NoAnswer) as error:
        buy(linked, account)

    assert not error.value.sent
    assert value(conn, "select grant_begun_at is null and grant_held_until is null from agentflow.crm_accounts")


def test_a_dead_long_lived_token_is_said_once_and_then_nothing_is_asked(
    linked: System, server: Server, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    account = connect(linked, server)
    sync(linked, conn, account)
    server.tokens.clear()

    for _ in range(2):
        job = linked.submit(ORGANIZATION, NewJob("sync_crm", {"account_id": str(account.id)})).job
        if _ == 0:
            with pytest.raises(NeedsReauth):
                run(linked, conn, job)
            asked = server.requests.total()
    skipped = run(linked, conn, job)

    assert skipped == {"skipped": "the account is needs_reauth"} and server.requests.total() == asked
    assert sum("a CRM account stopped" in record.getMessage() for record in caplog.records) == 1
    assert value(conn, "select state from agentflow.sync_runs order by id desc limit 1") == "failed"
    assert server.token not in caplog.text
    with linked.database.connection() as ours:
        conn.execute("update agentflow.crm_accounts set next_sync_at = now()")
        assert syncing.due(ours) == []
        again = accounts.reconnect(ours, ORGANIZATION, account.id, linked.sealer, Credentials(token=server.new_token()))
    assert again is not None and sync(linked, conn, account)["state"] == "succeeded"
    assert account_of(linked, account).state == "connected"


def test_an_account_that_moved_is_followed(linked: System, server: Server, conn: Connection, environment: Any) -> None:
    account = authorized(linked, server, conn)
    with kommo() as new:
        linked.settings.__dict__["fetch_allow"] = (server.host, new.host)
        server.moved_to = new.host
        new.grants = server.grants
        renewal_due(conn, ended=True)

        bought = buy(linked, account)

    assert bought in new.tokens
    assert account_of(linked, account).base_url == f"http://{new.host}"


def test_credentials_of_another_account_are_refused(linked: System, server: Server, conn: Connection) -> None:
    account = connect(linked, server)
    conn.execute("update agentflow.crm_accounts set remote_id = 5")

    with pytest.raises(Permanent, match="another Kommo account"):
        sync(linked, conn, account)

    assert account_of(linked, account).state == "needs_reauth"


def test_tokens_stand_nowhere_in_the_clear(linked: System, server: Server, conn: Connection) -> None:
    account = authorized(linked, server, conn)
    sync(linked, conn, account)

    tables = [
        row[0] for row in conn.execute("select tablename from pg_tables where schemaname = 'agentflow'").fetchall()
    ]
    everything = " ".join(
        row[0]
        for table in tables
        for row in conn.execute(f"select t::text from agentflow.{table} t").fetchall()  # noqa: S608
    )
    for secret in (*server.tokens, *server.grants, "s-1"):
        assert secret not in everything
    assert str(account.id) in everything


# ---- calls ----


def client(system: System, account: accounts.Account) -> Client:
    caller: Any = SimpleNamespace(check=lambda: None, sleep=lambda _: None, spent=lambda **_: None)
    return Client(system, caller, account, "me")


def test_429_is_waited_out_by_all_and_403_stops_the_account(linked: System, server: Server, conn: Connection) -> None:
    account = connect(linked, server)
    first, second = client(linked, account), client(linked, account)
    server.rate, server.retry_after, server.most_violations = 0, 30, 1

    with pytest.raises(Wait) as wait:
        first.account()
    with pytest.raises(Wait) as also:
        second.account()

    assert wait.value.seconds == 30 and 25 < also.value.seconds <= 30
    assert server.requests["GET /api/v4/account"] == 1  # the second did not even ask
    server.blocked = True
    linked.limits._client.flushdb()  # type: ignore[union-attr]
    with pytest.raises(Permanent, match="blocked"):
        second.account()
    assert account_of(linked, account).state == "blocked"


@pytest.mark.parametrize("named", ["example.kommo.com", "https://Example.amocrm.ru/", "a.b.amocrm.com"])
def test_hosts_of_kommo_are_taken(named: str) -> None:
    assert hosts.base_url(named).startswith("https://")


@pytest.mark.parametrize(
    "named",
    [
        "www.kommo.com",
        "kommo.com",
        "evilkommo.com",
        "kommo.com.evil.org",
        "a.kommo.com/x",
        "u@a.kommo.com",
        "127.0.0.1",
        "a.kommo.com:80",
    ],
)
def test_other_hosts_are_not(named: str) -> None:
    with pytest.raises(hosts.NotKommo):
        hosts.base_url(named)


# ---- writes ----


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was lost has had its time."""
    monkeypatch.setattr(write_crm, "SETTLE_S", 0.0)


def test_things_are_made_and_changed_and_soon_in_the_mirror(linked: System, server: Server, conn: Connection) -> None:
    account = connect(linked, server)
    sync(linked, conn, account)
    lead = server.add("leads", name="there")

    made = write(linked, conn, account, "leads", {"name": "new", "price": 5}, {"id": lead, "name": "changed"})
    job = conn.execute("select payload from agentflow.jobs where type = 'sync_crm' and state = 'queued'").fetchone()
    sync(linked, conn, account, touched=True)

    new = made["items"][0]["id"]
    assert made == {
        "items": [{"state": "created", "id": new}, {"state": "updated", "id": lead}],
        "refused": 0,
    }
    assert server.shown("leads")[new]["price"] == 5 and server.shown("leads")[lead]["name"] == "changed"
    assert job is not None and job[0]["touched"] is True
    names = {
        row.name
        for row in rows(conn, "select data->>'name' as name from agentflow.crm_entities where entity_type = 'leads'")
    }
    assert names == {"new", "changed"}


def test_what_is_wrong_is_named_for_each_and_the_others_are_made(
    linked: System, server: Server, conn: Connection
) -> None:
    account = connect(linked, server)
    wrong = {"name": "b", "custom_fields_values": [{"field_id": 1, "values": [{"value": "x"}]}]}

    said = write(linked, conn, account, "leads", {"name": "a"}, wrong, {"name": "c", "price": "much"}, {"name": "d"})

    assert [each["state"] for each in said["items"]] == ["created", "refused", "refused", "created"]
    assert said["items"][1]["errors"][0]["path"] == "custom_fields_values.0.field_id"
    assert sorted(each["name"] for each in server.shown("leads").values()) == ["a", "d"]


@pytest.mark.parametrize("done", [True, False])
def test_a_creation_whose_answer_is_lost_makes_one(
    linked: System, server: Server, conn: Connection, settled: None, done: bool
) -> None:
    account = connect(linked, server)
    server.faults.append(lose(server, "POST", "/api/v4/leads", done=done))
    items = [{"name": "twin", "price": 5}, {"name": "twin", "price": 5}, {"name": "other"}]
    payload = {"account_id": str(account.id), "kind": "leads", "items": items}
    job = linked.submit(ORGANIZATION, NewJob("write_crm", payload)).job

    with pytest.raises(Transient):
        attempt(linked, conn, job)
    said = attempt(linked, conn, job)

    assert sorted(each["name"] for each in server.shown("leads").values()) == ["other", "twin", "twin"]
    assert sorted(each["id"] for each in said["items"]) == sorted(server.shown("leads"))
    assert server.requests["POST /api/v4/leads"] == 1


def test_after_a_lost_answer_it_is_not_looked_too_early(linked: System, server: Server, conn: Connection) -> None:
    account = connect(linked, server)
    server.faults.append(lose(server, "POST", "/api/v4/tasks"))
    task = {"text": "call", "complete_till": 2_000_000_000}
    payload = {"account_id": str(account.id), "kind": "tasks", "items": [task]}
    job = linked.submit(ORGANIZATION, NewJob("write_crm", payload)).job

    with pytest.raises(Transient):
        attempt(linked, conn, job)
    with pytest.raises(Wait) as wait:
        attempt(linked, conn, job)
    assert 0 < wait.value.seconds <= 60
    conn.execute("update agentflow.crm_writes set sent_at = sent_at - interval '60 s'")
    attempt(linked, conn, job)

    assert len(server.shown("tasks")) == 1


def test_what_was_certainly_not_done_is_sent_again_at_once(linked: System, server: Server, conn: Connection) -> None:
    account = connect(linked, server)
    limited = Reply(429, json.dumps({"retry_after": 0.1}).encode(), {"Content-Type": "application/problem+json"})
    server.faults.append(answers("POST", "/api/v4/contacts", limited))
    payload = {"account_id": str(account.id), "kind": "contacts", "items": [{"name": "Ann"}]}
    job = linked.submit(ORGANIZATION, NewJob("write_crm", payload)).job

    with pytest.raises(Wait):
        attempt(linked, conn, job)
    assert value(conn, "select count(*) from agentflow.crm_writes") == 0
    linked.limits._client.flushdb()  # type: ignore[union-attr]
    attempt(linked, conn, job)

    assert len(server.shown("contacts")) == 1


def test_a_job_that_runs_again_after_its_end_makes_nothing(linked: System, server: Server, conn: Connection) -> None:
    account = connect(linked, server)
    note = {"entity_id": 5, "note_type": "common", "params": {"text": "hello"}}
    payload = {"account_id": str(account.id), "kind": "lead_notes", "items": [note]}
    job = linked.submit(ORGANIZATION, NewJob("write_crm", payload)).job
    first = attempt(linked, conn, job)
    conn.execute(
        "update agentflow.jobs set state = 'queued', finished_at = null, wake_at = now(), result = null where id = %s",
        (job.id,),
    )

    second = attempt(linked, conn, job)

    assert first == second and len(server.shown("leads/notes")) == 1


def test_504_is_looked_after_and_the_batch_shrinks(
    linked: System, server: Server, conn: Connection, settled: None
) -> None:
    account = connect(linked, server)
    slow = Reply(504, b"<html>", {"Content-Type": "text/html"})
    server.faults.append(answers("POST", "/api/v4/leads", slow))
    payload = {"account_id": str(account.id), "kind": "leads", "items": [{"name": str(n)} for n in range(40)]}
    job = linked.submit(ORGANIZATION, NewJob("write_crm", payload)).job

    with pytest.raises(Transient):
        attempt(linked, conn, job)
    attempt(linked, conn, job)

    assert len(server.shown("leads")) == 40 and server.requests["POST /api/v4/leads"] == 2
