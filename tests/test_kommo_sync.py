"""The mirror of a Kommo account: changes, deletions, walks over everything, plans, and what was read when."""

from __future__ import annotations

import time
from typing import Any

import psycopg
import pytest

from agentflow.kommo import accounts, mirror, syncing, touched
from agentflow.kommo.entities import thing
from agentflow.system import System
from tests.core_support import ORGANIZATION, rows, value
from tests.kommo_server import Account as Server
from tests.kommo_support import account_of, connect, differences, linked, server, sync

__all__ = ["linked", "server"]

Connection = psycopg.Connection
LONG_AGO = 1_600_000_000


def fill(server: Server, number: int = 5, at: int = LONG_AGO) -> dict[str, list[int]]:
    """So many of everything, changed a minute apart."""
    made: dict[str, list[int]] = {}
    for path in ("leads", "contacts", "companies", "tasks", "leads/notes", "contacts/notes"):
        about = {"entity_id": 1, "note_type": "common", "params": {"text": "x"}} if "notes" in path else {"name": path}
        made[path] = [server.add(path, at=at + 60 * n, **about) for n in range(number)]
    return made


def test_a_new_account_is_followed_and_filled(linked: System, server: Server, conn: Connection) -> None:
    fill(server)
    account = connect(linked, server)

    first = sync(linked, conn, account)
    backfill = value(
        conn, "select payload from agentflow.jobs where type = 'sync_crm' and payload->>'mode' = 'backfill'"
    )
    second = sync(linked, conn, account, mode="backfill")

    assert account_of(linked, account).state == "connected"
    assert backfill["account_id"] == str(account.id)
    assert first["state"] == second["state"] == "succeeded"
    assert second["counts"]["leads"] == {"created": 5}
    assert differences(conn, account.id, server) == []


def test_changes_are_found_and_what_is_as_it_was_is_not_written(
    linked: System, server: Server, conn: Connection
) -> None:
    made = fill(server)
    account = connect(linked, server)
    sync(linked, conn, account)
    sync(linked, conn, account, mode="backfill")
    lead, *_, gone = made["leads"]
    versions = dict(conn.execute("select entity_id, version from agentflow.crm_entities").fetchall())
    server.change("leads", lead, name="other")
    server.remove("leads", gone)
    added = server.add("contacts", name="new")

    ended = sync(linked, conn, account)

    assert ended["counts"]["leads"] == {"updated": 1, "deleted": 1}
    assert ended["counts"]["contacts"] == {"created": 1}
    assert differences(conn, account.id, server) == []
    written = dict(conn.execute("select entity_id, version from agentflow.crm_entities").fetchall())
    assert {id_ for id_ in written if versions.get(id_) != written[id_]} == {lead, gone, added}


def test_more_changes_in_one_second_than_a_page_holds_are_all_found(
    linked: System, server: Server, conn: Connection
) -> None:
    server.page_cap = 4
    account = connect(linked, server)
    sync(linked, conn, account)
    now = int(time.time())
    for path in ("leads", "tasks", "events"):
        for n in range(23):
            if path == "events":
                server.note_event("lead_added", "lead", n)
            else:
                server.add(path, at=now, name=str(n))

    sync(linked, conn, account)

    assert differences(conn, account.id, server) == []


@pytest.mark.parametrize("mode", [pytest.param("backfill", marks=pytest.mark.long), "reconcile"])
def test_nothing_is_passed_over_while_the_list_moves_under_the_walk(
    linked: System, server: Server, conn: Connection, mode: str
) -> None:
    server.page_cap = 5
    one_second = [server.add("leads", at=LONG_AGO, name=str(n)) for n in range(40)]
    spread = [server.add(path, at=LONG_AGO + n, name=str(n)) for n in range(40) for path in ("contacts", "tasks")]
    account = connect(linked, server)
    sync(linked, conn, account)
    waiting = one_second[:15]

    def move(request: object) -> None:
        # At each call one of the first is changed: everything behind it moves up by a place.
        if waiting:
            server.change("leads", waiting.pop(0), name="moved")
            contact = spread[2 * len(waiting)]
            server.change("contacts", contact, name="moved")

    server.faults.append(move)  # type: ignore[arg-type]

    sync(linked, conn, account, mode=mode)
    server.faults.clear()
    sync(linked, conn, account)

    assert not waiting
    assert differences(conn, account.id, server) == []


def test_what_vanished_without_a_word_is_found_by_the_reconciliation(
    linked: System, server: Server, conn: Connection
) -> None:
    made = fill(server, 20)
    account = connect(linked, server)
    sync(linked, conn, account)
    sync(linked, conn, account, mode="backfill")
    server.remove("leads", made["leads"][3], event=False)
    server.remove("tasks", made["tasks"][5], event=False)
    server.remove("leads/notes", made["leads/notes"][7], event=False)
    server.things["leads"][made["leads"][4]]["is_deleted"] = True  # in the trash, and listed

    sync(linked, conn, account)
    before = differences(conn, account.id, server)
    ended = sync(linked, conn, account, mode="reconcile")

    assert len(before) == 4
    assert ended["counts"]["leads"]["deleted"] == 2
    assert [each.split(":")[0] for each in differences(conn, account.id, server)] == [f"leads {made['leads'][4]}"]
    tombs = rows(conn, "select entity_type, entity_id from agentflow.crm_entities where deleted_at is not null")
    assert len(tombs) == 4


def test_more_deletions_than_the_share_stop_and_ask(linked: System, server: Server, conn: Connection) -> None:
    made = fill(server, 20)
    account = connect(linked, server)
    sync(linked, conn, account)
    sync(linked, conn, account, mode="backfill")
    for lead in made["leads"][:15]:
        server.remove("leads", lead, event=False)

    plan = sync(linked, conn, account, mode="reconcile", plan=True)
    held = sync(linked, conn, account, mode="reconcile")
    living = value(
        conn, "select count(*) from agentflow.crm_entities where entity_type = 'leads' and deleted_at is null"
    )
    with linked.database.connection() as ours:
        asked = accounts.confirm_deletions(ours, ORGANIZATION, account.id)
    done = sync(linked, conn, account, mode="reconcile")

    assert plan["state"] == held["state"] == "held"
    assert plan["counts"]["leads"] == held["counts"]["leads"] == {"unchanged": 5, "held": 15}
    assert (living, asked) == (20, 15)
    assert done["counts"]["leads"] == {"unchanged": 5, "deleted": 15}
    assert account_of(linked, account).deletions_held is None
    assert account_of(linked, account).deletions_confirmed is None
    assert differences(conn, account.id, server) == []


@pytest.mark.parametrize("mode", ["incremental", pytest.param("backfill", marks=pytest.mark.long), "reconcile"])
def test_a_plans_counts_and_calls_are_the_runs(linked: System, server: Server, conn: Connection, mode: str) -> None:
    server.page_cap = 5
    made = fill(server, 14)
    account = connect(linked, server)
    sync(linked, conn, account)
    sync(linked, conn, account, mode="backfill")
    server.clock = lambda: time.time() - 30
    for n in range(9):
        server.change("leads", made["leads"][n], name="other")
        server.add("contacts", name="new")
    for path in ("leads", "contacts", "tasks"):
        server.remove(path, made[path][12])
    with linked.database.connection() as ours:
        touched.note(ours, ORGANIZATION, account.id, [("lead", made["leads"][8]), ("contacts", made["contacts"][13])])
    server.remove("contacts", made["contacts"][13], event=False)
    before = whole(conn)

    plan = sync(linked, conn, account, mode=mode, plan=True)
    after = whole(conn)
    ended = sync(linked, conn, account, mode=mode)

    assert before == after
    assert plan["plan"] and not ended["plan"]
    assert plan["counts"] == ended["counts"]
    assert plan["calls"] == pytest.approx(ended["calls"], rel=0.1)  # some seconds have passed between the two
    assert sum(each.get("updated", 0) for each in plan["counts"].values()) == 9


def whole(conn: Connection) -> list[object]:
    """What a plan may not change."""
    tables = ("crm_entities", "crm_events", "crm_streams", "crm_touched", "crm_drift")
    return [rows(conn, f"select * from agentflow.{table} t order by t::text") for table in tables]  # noqa: S608


def test_a_page_that_was_read_earlier_does_not_overwrite_a_later_read(
    linked: System, server: Server, conn: Connection
) -> None:
    lead = server.add("leads", name="old", at=LONG_AGO)
    stale = thing(server.shown("leads")[lead])
    account = connect(linked, server)
    sync(linked, conn, account)
    with linked.database.connection() as ours:
        early = mirror.clock(ours)
    server.things["leads"][lead]["name"] = "new"  # within the same second
    hint(linked, account.id, lead)
    sync(linked, conn, account, touched=True)

    def page(read_at: object) -> tuple[dict[str, int], str]:
        with linked.database.transaction() as ours:
            version = mirror.begin(ours, ORGANIZATION, account.id)
            assert version is not None
            said = mirror.write(
                ours,
                ORGANIZATION,
                account.id,
                "leads",
                [stale],
                read_at=read_at,
                version=version,  # type: ignore[arg-type]
            )
        return dict(said), value(conn, "select data->>'name' from agentflow.crm_entities where entity_type = 'leads'")

    assert page(early) == ({"stale": 1}, "new")
    server.remove("leads", lead)
    hint(linked, account.id, lead)
    sync(linked, conn, account, touched=True)
    assert page(early) == ({"stale": 1}, "new")
    assert value(conn, "select deleted_at is not null from agentflow.crm_entities where entity_type = 'leads'")
    with linked.database.connection() as ours:
        now = mirror.clock(ours)
    assert page(now) == ({"created": 1}, "old")  # restored: a tombstone knows no time of change


def test_an_older_change_does_not_overwrite_a_newer_one_whatever_was_read_last(
    linked: System, server: Server, conn: Connection
) -> None:
    lead = server.add("leads", name="new")
    account = connect(linked, server)
    sync(linked, conn, account)
    laggard = thing({**server.shown("leads")[lead], "name": "old", "updated_at": LONG_AGO})

    with linked.database.transaction() as ours:
        version = mirror.begin(ours, ORGANIZATION, account.id)
        assert version is not None
        ids = ORGANIZATION, account.id
        said = mirror.write(ours, *ids, "leads", [laggard], read_at=mirror.clock(ours), version=version)

    assert said == {"stale": 1}
    assert differences(conn, account.id, server) == []


def test_what_is_named_again_while_it_is_read_is_read_again(linked: System, server: Server, conn: Connection) -> None:
    first, second = server.add("leads", name="1"), server.add("leads", name="2")
    account = connect(linked, server)
    sync(linked, conn, account)
    hint(linked, account.id, first, second)
    named: list[int] = []

    def name_again(request: object) -> None:
        if not named and getattr(request, "path", "").endswith("/leads"):
            named.append(first)
            hint(linked, account.id, first)

    server.faults.append(name_again)  # type: ignore[arg-type]
    before = server.requests["GET /api/v4/leads"]

    sync(linked, conn, account, touched=True)

    assert server.requests["GET /api/v4/leads"] - before == 2
    assert value(conn, "select count(*) from agentflow.crm_touched") == 0


def test_a_field_that_nobody_expected_is_kept_and_said_once(
    linked: System, server: Server, conn: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    lead = server.add("leads", name="x", mood={"colour": "blue"})
    account = connect(linked, server)

    for _ in range(2):
        server.change("leads", lead, name=str(_))
        sync(linked, conn, account)

    assert rows(conn, "select entity_type, field, kind from agentflow.crm_drift") == [("leads", "mood", "object")]
    assert differences(conn, account.id, server) == []


def test_a_reader_who_pages_by_version_misses_nothing(linked: System, server: Server, conn: Connection) -> None:
    fill(server, 10)
    account = connect(linked, server)
    sync(linked, conn, account)
    sync(linked, conn, account, mode="backfill")
    seen: dict[int, object] = {}
    after = (0, 0)

    def read() -> int:
        nonlocal after
        number = 0
        with linked.database.connection() as ours:
            while found := mirror.page(ours, ORGANIZATION, account.id, "leads", after=after, limit=3):
                after = (found[-1].version, found[-1].entity_id)
                seen.update({each.entity_id: None if each.deleted_at else each.data["name"] for each in found})
                number += len(found)
        return number

    assert read() == 10
    lead, other, *_ = seen
    server.change("leads", lead, name="other")
    server.remove("leads", other)
    sync(linked, conn, account)
    assert read() == 2
    assert (seen[lead], seen[other]) == ("other", None)


def test_users_that_are_for_administrators_alone_are_left_out(linked: System, server: Server, conn: Connection) -> None:
    server.is_admin = False
    account = connect(linked, server)

    ended = sync(linked, conn, account)

    assert ended["state"] == "succeeded"
    assert "users" not in ended["counts"] and ended["counts"]["pipelines"] == {"created": 1}


def test_a_removed_accounts_mirror_and_secrets_go(linked: System, server: Server, conn: Connection) -> None:
    fill(server)
    account = connect(linked, server)
    sync(linked, conn, account)
    sync(linked, conn, account, mode="backfill")
    with linked.database.transaction() as ours:
        assert accounts.remove(ours, ORGANIZATION, account.id)

    ended = sync(linked, conn, account)

    assert ended["skipped"] == "the account was removed" and ended["rows"] > 20
    tables = ("crm_accounts", "crm_streams", "crm_entities", "crm_events", "sync_runs")
    assert [value(conn, f"select count(*) from agentflow.{t}") for t in tables] == [0] * 5  # noqa: S608


def test_due_accounts_are_handed_in_once_and_come_again_after_their_interval(
    linked: System, server: Server, conn: Connection
) -> None:
    account = connect(linked, server)
    sync(linked, conn, account)
    conn.execute("update agentflow.crm_accounts set next_sync_at = now()")

    def tick() -> list[str]:
        with linked.transaction() as transaction:
            found = syncing.due(transaction.conn)
            for each in found:
                syncing.submit_due(transaction, each)
        return [each.mode for each in found]

    assert [tick(), tick()] == [["incremental"], []]
    away = value(conn, "select extract(epoch from next_sync_at - now())::float8 from agentflow.crm_accounts")
    assert 260 < away <= 330
    conn.execute("update agentflow.crm_accounts set next_sync_at = now(), next_reconcile_at = now()")
    assert [tick(), tick()] == [["reconcile"], []]
    jobs = rows(conn, "select payload->>'mode' as mode, priority from agentflow.jobs where fence = 0 order by id")
    assert [tuple(each) for each in jobs] == [("backfill", 2), ("incremental", 1), ("reconcile", 2)]


def hint(system: System, account_id: object, *leads: int) -> None:
    """As the handler of webhooks does it."""
    with system.database.connection() as conn:
        touched.note(conn, ORGANIZATION, account_id, [("leads", lead) for lead in leads])  # type: ignore[arg-type]


def test_texts_are_kept_as_they_are_but_for_what_postgres_cannot_store() -> None:
    kept = 'счёт "№ 7" \\ {a,b} \U0001f600'
    document = {"id": 7, "name": kept, "a\x00": ["\x00", "\ud83d", None, 1.5, True], "_links": {"self": "?page=1"}}

    found = thing(document)

    assert found.data == {"id": 7, "name": kept, "a\ufffd": ["\ufffd", "?", None, 1.5, True]}
    assert found.text == f'{{"a\ufffd":["\ufffd","?",null,1.5,true],"id":7,"name":"{escaped(kept)}"}}'
    assert thing({**document, "_links": {"self": "?page=2"}}).hash == found.hash


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def test_texts_come_back_from_the_mirror(linked: System, server: Server, conn: Connection) -> None:
    texts = ['"', "\\", "{}", "{a,NULL}", "", "NULL", "счёт", "\U0001f600", "a\nb"]
    for text in texts:
        server.add("leads", at=LONG_AGO, name=text, custom_fields_values=[{"values": [{"value": text}]}])
        server.note_event(text, "lead", 7)
    account = connect(linked, server)

    sync(linked, conn, account)
    sync(linked, conn, account, mode="backfill")

    assert differences(conn, account.id, server) == []
    assert value(conn, "select count(*) from agentflow.crm_events") == len(texts)


def test_a_page_reads_only_its_own_rows_while_the_planner_knows_nothing_of_the_account(
    linked: System, server: Server, conn: Connection
) -> None:
    account = connect(linked, server)
    conn.execute("alter table agentflow.crm_entities set (autovacuum_enabled = false)")
    things = [thing({"id": n, "updated_at": 5}) for n in range(2000)]
    given: dict[str, Any] = {"read_at": mirror.clock(conn), "version": 1}
    for first in range(0, 2000, 100):
        mirror.write(conn, ORGANIZATION, account.id, "leads", things[first : first + 100], **given)
    met = mirror._given(ORGANIZATION, account.id, "leads", things[:50], mirror.clock(conn))

    (explained,) = conn.execute(
        ("explain (analyze, format json) " + mirror._WRITE).encode(), {**met, "version": 2, "sweeping": True}
    ).fetchall()

    looks = [node for node in nodes(explained[0][0]["Plan"]) if node.get("Relation Name") == "crm_entities"]
    reads = [node for node in looks if "Scan" in node["Node Type"]]
    assert [round(node["Actual Rows"] * node["Actual Loops"]) for node in reads] == [50, 50]
    assert {node.get("Index Name") for node in reads} == {"crm_entities_pkey", None}
    assert all(not node.get("Rows Removed by Filter") for node in reads)
    assert value(conn, "select count(*) from agentflow.crm_entities where seen_at = %s", met["read_at"]) == 50


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(each for below in plan.get("Plans", []) for each in nodes(below))]
