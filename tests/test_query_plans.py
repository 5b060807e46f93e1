"""The hot statements find their rows by index, on an empty, a small and a large table: the plans as the server really ran them,
those of the statements inside the functions, too."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from agentflow import embedded
from agentflow.jobs import (
    backlog,
    claims,
    dispatch,
    flights,
    intake,
    leases,
    records,
    retention,
    staffing,
    statistics,
    usage,
)
from agentflow.jobs.leases import Held
from agentflow.jobs.model import Job, Verdict
from agentflow.jobs.records import Filter
from agentflow.jobs.retention import Keep
from agentflow.jobs.usage import Usage
from agentflow.webhooks import browsing, events
from tests import core_support
from tests.core_support import LEASE_S, MAX_CRASHES, ORGANIZATION, prepared, rescuer, settle, submit
from tests.mutations import mutate_function

Connection = psycopg.Connection

#: Finished rows, waiting rows over 20 organizations (a fifth sent, a tenth with a key, a fifth not due yet), running rows.
SIZES = {"empty": (0, 0, 0), "small": (60, 30, 10), "large": (200_000, 20_000, 200)}

# One row a millisecond up to now, with ids as they are made over such a time.
FILL = """
insert into agentflow.jobs (id, organization_id, type, queue, priority, state, max_attempts, attempt, fence, time_limit_s,
    run_at, wake_at, sent_at, sends, concurrency_key, slot, worker, lease_until, finished_at, finished_by)
select (lpad(to_hex((extract(epoch from now()) * 1000)::bigint - %(total)s + n), 12, '0') || '7'
        || substr(md5(n::text), 1, 19))::uuid,
    1 + n %% 20, 'test', 'default', 1 + (n / 20) %% 2, state, 5, claimed, claimed, 60, now() - interval '1 s' * n,
    case when queued then case when n %% 5 = 1 then now() + interval '1 h' else now() - interval '1 s' end end,
    case when queued and n %% 5 = 0 then now() end, (queued and n %% 5 = 0)::integer, key,
    case when running and key is not null then n %% 1000 end, case when running then %(worker)s::uuid end,
    case when running then now() + interval '30 s' end, case when not (queued or running) then now() end,
    case when not (queued or running) then %(worker)s::uuid end
from generate_series(1, %(total)s) n
cross join lateral (select n > %(finished)s and n <= %(taken)s, n > %(taken)s,
    case when n %% 10 = 3 then 'k' || n %% 4 end) a(queued, running, key)
cross join lateral (select case when queued then 'queued' when running then 'running' else 'succeeded' end,
    (not queued)::integer) b(state, claimed)
"""


@dataclass(frozen=True)
class Table:
    conn: Connection
    size: str


@pytest.fixture(scope="module", params=SIZES)
def table(request: pytest.FixtureRequest, stack: embedded.Embedded) -> Iterator[Table]:
    """A connection to a table of that size, whose session plans as a worker's does: nothing is set in it."""
    finished, waiting, running = SIZES[request.param]
    with core_support.database(stack) as url:
        with psycopg.connect(url, autocommit=True, options="-c synchronous_commit=off") as conn:
            counts = {"finished": finished, "taken": finished + waiting, "total": finished + waiting + running}
            # Or it is looked at in the middle of the tests, where they take longer than a minute.
            conn.execute("alter table agentflow.jobs set (autovacuum_enabled = false)")
            conn.execute(FILL, {**counts, "worker": uuid4()})
            conn.execute("insert into agentflow.concurrency_keys select 'k' || n, 1000 from generate_series(0, 3) n")
            if request.param == "large":  # an empty table is planned as it is, before anybody looked at it
                conn.execute("analyze agentflow.jobs")
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as conn:
            yield Table(conn, request.param)


class Plans:
    """The nodes of the plans that ran while it listened."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []

    def hear(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        found = re.match(r"duration: .*?plan:\s*(\{.*)", diagnostic.message_primary or "", re.DOTALL)
        if found:
            self._collect(json.loads(found[1])["Plan"])

    def _collect(self, node: dict[str, Any]) -> None:
        self.nodes.append(node)
        for below in node.get("Plans", []):
            self._collect(below)

    @property
    def _scans(self) -> list[dict[str, Any]]:
        """Those of jobs' indexes that look for something: of no id at all the planner takes any index, and reads nothing."""
        nothing = "(id = ANY (NULL::uuid[]))"
        scans = [node for node in self.nodes if node.get("Index Name", "").startswith("jobs_")]
        return [node for node in scans if node.get("Index Cond") != nothing]

    @property
    def indexes(self) -> set[str]:
        return {node["Index Name"] for node in self._scans}

    @property
    def scanned(self) -> list[str]:
        """Tables read from one end to the other, that may be large."""
        large = ("jobs", "attempts", "idempotency_keys", "usage", "usage_days", "webhook_events", "flight_log")
        return [n["Relation Name"] for n in self.nodes if n["Node Type"] == "Seq Scan" and n["Relation Name"] in large]

    @property
    def read_whole(self) -> set[str]:
        """Indexes read from one end to the other: without a condition on their columns."""
        return {node["Index Name"] for node in self._scans if "Index Cond" not in node}


@contextmanager
def plans(conn: Connection) -> Iterator[Plans]:
    heard = Plans()
    conn.execute("load 'auto_explain'")
    for name, setting in (("log_min_duration", "0"), ("log_nested_statements", "on"), ("log_format", "json")):
        conn.execute(f"set auto_explain.{name} = {setting}".encode())
    conn.execute("set client_min_messages = log")
    conn.add_notice_handler(heard.hear)
    try:
        yield heard
        conn.execute("select %s", (1,))  # the plan of the last one is told when its portal is closed
    finally:
        conn.remove_notice_handler(heard.hear)
        conn.execute("reset client_min_messages; set auto_explain.log_min_duration = -1")


def ids_of(conn: Connection, where: str, limit: int = 20) -> list[UUID]:
    query = f"select id from agentflow.jobs where {where} order by id limit {limit}"  # noqa: S608
    return [row[0] for row in conn.execute(query.encode()).fetchall()] or [uuid4()]


Act = Callable[[], Any]


def _claim(conn: Connection) -> Act:
    ids = ids_of(conn, "state = 'queued' and concurrency_key is null")
    return lambda: claims.claim(conn, ids, uuid4(), LEASE_S)


def _claim_keyed(conn: Connection) -> Act:
    ids = ids_of(conn, "state = 'queued' and concurrency_key is not null")
    return lambda: claims.claim_keyed(conn, ids, uuid4(), LEASE_S)


def _held(conn: Connection, **request: Any) -> tuple[UUID, list[Job]]:
    worker = uuid4()
    return worker, core_support.claim(conn, worker, *(submit(conn, **request) for _ in range(5)))


def _settle(conn: Connection) -> Act:
    worker, jobs = _held(conn, callback_url="http://x.example")
    return lambda: settle(conn, worker, *(Verdict(job.id, job.fence, "succeeded") for job in jobs))


def _settle_keyed(conn: Connection) -> Act:
    worker, jobs = _held(conn, key="k1", slots=1000)
    return lambda: settle(conn, worker, *(Verdict(job.id, job.fence, "retry", 1.0) for job in jobs))


def _heartbeat(conn: Connection) -> Act:
    worker, jobs = _held(conn)
    return lambda: leases.renew(conn, worker, [Held(job.id, job.fence) for job in jobs], LEASE_S)


def _rescue(conn: Connection) -> Act:
    _, jobs = _held(conn)
    conn.execute("update agentflow.jobs set lease_until = now() where id = %s", (jobs[0].id,))
    worker = rescuer(conn)
    return lambda: leases.rescue(conn, worker, limit=100, lease_s=LEASE_S, max_crashes=MAX_CRASHES)


def _cancel(conn: Connection) -> Act:
    job = submit(conn, key="k2", slots=1000, callback_url="http://x.example")
    return lambda: records.cancel(conn, ORGANIZATION, job.id)


def _submit(conn: Connection) -> Act:
    new = prepared(key="k0", slots=1000, idempotency_key="i")
    return lambda: intake.submit(conn, ORGANIZATION, new)


def _submit_many(conn: Connection) -> Act:
    return lambda: intake.submit_many(conn, ORGANIZATION, [prepared() for _ in range(50)])


def _poll(conn: Connection) -> Act:
    submit(conn)
    return lambda: dispatch.poll(conn, "default", 8, 2, ["test"])


def _poll_again(conn: Connection) -> Act:
    """Nothing of the queue is due, and some of it was sent long ago."""
    conn.execute(
        "update agentflow.jobs set queue = 'gpu', wake_at = clock_timestamp() + interval '1 h',"
        " sent_at = clock_timestamp() - interval '1 h' where id in"
        " (select id from agentflow.jobs where state = 'queued' and sent_at is not null order by id limit 200)"
    )
    return lambda: dispatch.poll(conn, "gpu", 8, 2, ["test"])


def _take_back(conn: Connection) -> Act:
    ids = ids_of(conn, "state = 'queued' and sent_at is not null")
    return lambda: dispatch.take_back(conn, ids, 1.0)


def _relay(conn: Connection) -> Act:
    return lambda: dispatch.pick_due(conn, "default")


def _some_ahead(conn: Connection) -> None:
    """Of each class some have a head start, others are back from the line of a limit, and there is a budget to be held."""
    conn.execute(
        "update agentflow.jobs set head_start_s = 60 where id in"
        " (select id from agentflow.jobs where state = 'queued' and sent_at is null order by id desc limit 300)"
    )
    conn.execute(
        "update agentflow.jobs set wait_reason = 'limit' where id in"
        " (select id from agentflow.jobs where state = 'queued' and sent_at is null order by id limit 300)"
    )
    conn.execute("insert into agentflow.budgets (organization_id, measure, per_day) values (0, 'usd', 1)")
    conn.execute(
        "insert into agentflow.usage_days select (now() at time zone 'UTC')::date - d, o, 'usd', 1"
        " from generate_series(0, 20) d, generate_series(2, 200) o"
    )


def _relay_ahead(conn: Connection) -> Act:
    _some_ahead(conn)
    return _relay(conn)


def _poll_ahead(conn: Connection) -> Act:
    _some_ahead(conn)
    return _poll(conn)


def _record_usage(conn: Connection) -> Act:
    _some_ahead(conn)
    _, jobs = _held(conn)
    return lambda: usage.record(conn, [Usage(job.id, job.fence, {"usd": 0.1, "tokens_in": 5}) for job in jobs])


def _get(conn: Connection) -> Act:
    (id_,) = ids_of(conn, "true", 1)
    return lambda: records.get(conn, ORGANIZATION, id_)


def _attempts(conn: Connection) -> Act:
    (id_,) = ids_of(conn, "true", 1)
    return lambda: records.attempts(conn, id_)


def _children(conn: Connection) -> Act:
    (id_,) = ids_of(conn, "true", 1)
    return lambda: records.children(conn, id_)


def _list(conn: Connection) -> Act:
    before = ids_of(conn, "true")[-1]
    return lambda: records.search(conn, 3, Filter(), before=before)


def _retention(conn: Connection) -> Act:
    return lambda: retention.delete_jobs(conn, succeeded=True, keep=Keep(0, 100))


def _shares(conn: Connection) -> Act:
    return lambda: backlog.shares(conn)


def _stuck(conn: Connection) -> Act:
    return lambda: backlog.stuck(conn)


def _failed_lately(conn: Connection) -> Act:
    return lambda: backlog.failed_lately(conn)


def _kinds(conn: Connection) -> Act:
    return lambda: staffing.kinds(conn, {"default": 20_000, "heavy": 0})


def _line(conn: Connection) -> Act:
    return lambda: records.line(conn, None, ["k0", "k1"], limit=11)


def _line_of_one(conn: Connection) -> Act:
    return lambda: records.line(conn, 3, ["k0", "k1"], limit=11)


def _running(conn: Connection) -> Act:
    return lambda: (statistics.running_by_type(conn, 3), statistics.running_by_organization(conn, [1, 2, 3]))


def _failed_by_code(conn: Connection) -> Act:
    return lambda: (statistics.failed_by_code(conn, None, 3600), statistics.failed_by_code(conn, 3, 3600))


PKEY, LINE, SLOT, READY, SENT = "jobs_pkey", "jobs_line", "jobs_slot", "jobs_ready", "jobs_sent"
LIST, RUNNING, PARENT, AHEAD, BACK = "jobs_list", "jobs_running", "jobs_parent", "jobs_ahead", "jobs_back"
FAILED = "jobs_failed"
#: statement -> how it is made, whether its plans are kept (in a function) or made each time, and the indexes that they may use.
#: Of a key the running jobs are few, and found by the index of all running ones as well as by that of the slots.
HOT: dict[str, tuple[Callable[[Connection], Act], bool, set[str]]] = {
    "claim": (_claim, True, {PKEY}),
    "claim with a key": (_claim_keyed, True, {PKEY, LINE, SLOT, RUNNING}),
    "finish": (_settle, True, {PKEY}),
    "finish with a key": (_settle_keyed, True, {PKEY, LINE, SLOT, RUNNING}),
    "heartbeat": (_heartbeat, True, {PKEY, RUNNING}),
    "relay": (_relay, True, {PKEY, READY, SENT, AHEAD, BACK}),
    "relay with head starts and budgets": (_relay_ahead, True, {PKEY, READY, SENT, AHEAD, BACK}),
    "poll": (_poll, True, {PKEY, READY, SENT, AHEAD, BACK}),
    "poll with head starts and budgets": (_poll_ahead, True, {PKEY, READY, SENT, AHEAD, BACK}),
    "usage": (_record_usage, True, {PKEY}),
    "poll for what nobody claimed": (_poll_again, True, {PKEY, READY, SENT, AHEAD, BACK}),
    "rescue": (_rescue, True, {PKEY, RUNNING}),
    "submit": (_submit, True, {READY, SENT}),
    "submit many": (_submit_many, True, {READY, SENT}),
    "take back": (_take_back, False, {PKEY}),
    "cancel": (_cancel, True, {PKEY, LIST, LINE, SLOT, RUNNING}),
    "get": (_get, False, {PKEY, LIST}),
    "attempts": (_attempts, False, {PKEY}),
    "children": (_children, False, {PARENT}),
    "list": (_list, False, {LIST, PKEY}),
    "metrics: what waits and runs": (_shares, False, {READY, SENT, AHEAD, BACK, RUNNING, SLOT}),
    "metrics: what is stuck": (_stuck, False, {RUNNING, SLOT}),
    "metrics: what failed lately": (_failed_lately, False, {FAILED}),
    "page: a line": (_line, False, {LINE}),
    "page: what waits of one in a line": (_line_of_one, False, {LINE}),
    "page: what runs": (_running, False, {RUNNING, SLOT}),
    "page: what failed, by its codes": (_failed_by_code, False, {FAILED, "jobs_ended", "jobs_dead"}),
    "retention": (_retention, False, {LIST, PARENT, PKEY}),
    "workers wanted": (_kinds, False, {READY, SENT, AHEAD, BACK, RUNNING, SLOT}),
}


@pytest.mark.parametrize("statement", HOT)
def test_a_hot_statement_finds_its_rows_by_index(table: Table, statement: str) -> None:
    arrange, kept, allowed = HOT[statement]
    with table.conn.transaction(force_rollback=True):
        act = arrange(table.conn)

        with plans(table.conn) as heard:
            act()

    assert heard.nodes, "no plan was heard of"
    # A plan that is made each time may well read the one page of a table that has no more.
    if kept or table.size == "large":
        assert heard.scanned == []
        assert heard.indexes <= allowed
    if kept:
        assert heard.read_whole <= {RUNNING, SLOT}


def test_the_plans_that_a_session_keeps_from_an_empty_table_are_good_for_a_large_one(stack: embedded.Embedded) -> None:
    """A worker may have planned its statements when the database was new."""
    with core_support.database(stack) as url, psycopg.connect(url, autocommit=True, prepare_threshold=None) as conn:
        for _ in range(10):  # from the sixth time on a plan may be kept
            for arrange, kept, _ in HOT.values():
                with conn.transaction(force_rollback=True):
                    if kept:
                        arrange(conn)()
        counts = {"finished": 20_000, "taken": 40_000, "total": 40_200}
        with psycopg.connect(url, autocommit=True, options="-c synchronous_commit=off") as other:
            other.execute(FILL, {**counts, "worker": uuid4()})

        for statement, (arrange, kept, _) in HOT.items():
            with conn.transaction(force_rollback=True):
                act = arrange(conn)
                started = time.monotonic()
                if kept:
                    act()
                assert time.monotonic() - started < 0.5, statement


# Of forty endpoints of ten organizations, one a millisecond up to now; every second one is remembered alone.
FILL_WEBHOOKS = """
with endpoints as (
    insert into agentflow.webhook_endpoints (id, organization_id, source, name)
    select gen_random_uuid(), o, 'generic', 'e' || o from generate_series(1, 10) o, generate_series(1, 4)
    returning id, organization_id
), numbered as (
    select id, organization_id, row_number() over () - 1 as number from endpoints
), made as (
    select (lpad(to_hex((extract(epoch from now()) * 1000)::bigint - 40000 + n), 12, '0') || '7'
        || substr(md5(n::text), 1, 19))::uuid as id, e.id as endpoint_id, e.organization_id, n
    from generate_series(1, 40000) n join numbered e on e.number = n % 40
), events as (
    insert into agentflow.webhook_events (id, organization_id, endpoint_id, verdict, delivery_key, body_hash, type, headers,
        body, size_bytes)
    select id, organization_id, endpoint_id, 'verified', sha256(n::text::bytea), sha256('x'), 'test', '{}', 'x', 1 from made
)
insert into agentflow.flight_log (id, organization_id, flight, kind, type, state, attempts, created_at)
select id, organization_id, id, 'event', 'test', 'done', 0, now() from made where n % 2 = 0
"""


def test_webhooks_and_flights_are_found_by_index_among_very_many(stack: embedded.Embedded) -> None:
    with core_support.database(stack) as url, psycopg.connect(url, autocommit=True, prepare_threshold=None) as conn:
        conn.execute("set synchronous_commit = off")
        conn.execute(
            "insert into agentflow.organizations (slug, name) select 'o' || n, '' from generate_series(2, 10) n"
        )
        conn.execute(FILL_WEBHOOKS)
        conn.execute(FILL, {"finished": 20_000, "taken": 20_100, "total": 20_200, "worker": uuid4()})
        conn.execute("update agentflow.jobs set trace = md5((id::text < '8')::text) where concurrency_key is not null")
        for table in ("jobs", "webhook_events", "webhook_endpoints", "flight_log"):
            conn.execute(f"analyze agentflow.{table}".encode())
        ids = ids_of(conn, "true", 5)
        (event_id, endpoint_id) = conn.execute(
            "select id, endpoint_id from agentflow.webhook_events limit 1"
        ).fetchone()  # type: ignore[misc]
        looks: dict[str, Act] = {
            "an organization's webhooks": lambda: browsing.browse(conn, 3, events.Filter(type="none"), limit=50),
            "everybody's": lambda: browsing.browse(
                conn, None, events.Filter(outcome="failed"), before=event_id, limit=50
            ),
            "an endpoint's": lambda: browsing.browse(conn, 1, events.Filter(endpoint_id=endpoint_id), limit=50),
            "how endpoints do": lambda: browsing.standings(conn, None, [endpoint_id]),
            "the sender's id": lambda: browsing.delivered_as(conn, None, "7"),
            "legs by id": lambda: flights.by_ids(conn, 1, ids, limit=200),
            "one leg": lambda: flights.get(conn, None, event_id),
            "legs of flights": lambda: flights.of_flights(conn, 1, ids, limit=200),
            "retries": lambda: flights.retries(conn, 1, ids, limit=200),
            "a video's": lambda: flights.on_video(conn, 1, ids[0], limit=200),
            "files": lambda: flights.files(conn, 1, ids, most=10),
            "what is forgotten": lambda: flights.delete_old(conn, days=30),
        }
        scanned = {}
        for name, act in looks.items():
            with plans(conn) as heard:
                act()
            assert heard.nodes, name
            scanned[name] = heard.scanned
    assert {name: tables for name, tables in scanned.items() if tables} == {}


@pytest.mark.parametrize(
    ("function", "rest", "statement"),
    [
        ("wake_line_1", "and j.wait_reason = 'busy'", "finish with a key"),
    ],
)
def test_a_state_that_tempts_the_planner_off_the_primary_key_is_noticed(
    stack: embedded.Embedded, function: str, rest: str, statement: str
) -> None:
    with core_support.database(stack) as url, psycopg.connect(url, autocommit=True, prepare_threshold=None) as conn:
        change = (f"j.state || '' = 'queued' {rest}", f"j.state = 'queued' {rest}")
        mutate_function(conn, function, change)

        with pytest.raises(AssertionError):
            test_a_hot_statement_finds_its_rows_by_index(Table(conn, "empty"), statement)
