"""What the tests of the job core share: jobs made without types, time that passes by command, and checks of the invariants
in SQL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from psycopg.rows import namedtuple_row

from agentflow import embedded
from agentflow.ids import new_id
from agentflow.jobs import claims, intake, records, settlement
from agentflow.jobs.model import Job, Outcome, Settled, State, Verdict
from agentflow.jobs.requests import NewJob, Prepared
from tests.conftest import new_database

ORGANIZATION = 1
LEASE_S = 30.0
MAX_CRASHES = 3


# ---- databases ----


@contextmanager
def database(stack: embedded.Embedded) -> Iterator[str]:
    """A database for many tests, which `Original` puts back in order between them: making one takes longer than a test."""
    with new_database(stack, f"shared_{uuid4().hex[:12]}") as url:
        yield url


class Original:
    """What a database looked like before a test changed it."""

    def __init__(self, url: str) -> None:
        self._url = url
        with psycopg.connect(url, autocommit=True) as conn:
            self._functions = [row[0] for row in conn.execute(_FUNCTIONS).fetchall()]
            self._constraints = conn.execute(_CONSTRAINTS).fetchall()
            self._indexes = conn.execute(_INDEXES).fetchall()
            self._tables = [row[0] for row in conn.execute(_TABLES).fetchall()]

    def restore(self) -> None:
        """Nobody is connected, no rows, the schema's own functions, constraints and indexes."""
        with psycopg.connect(self._url, autocommit=True) as conn:
            end_others(conn)
            conn.execute("; ".join(f"delete from {table}" for table in self._tables).encode())  # noqa: S608
            if [row[0] for row in conn.execute(_FUNCTIONS).fetchall()] != self._functions:
                for function in self._functions:
                    conn.execute(function.encode())
            for definition in set(self._constraints) - set(conn.execute(_CONSTRAINTS).fetchall()):
                conn.execute(" ".join(["alter table agentflow.jobs add constraint", *definition]).encode())
            for _, definition in set(self._indexes) - set(conn.execute(_INDEXES).fetchall()):
                conn.execute(definition.encode())


def end_others(conn: psycopg.Connection) -> None:
    """Cut all other connections to this database."""
    conn.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    )


_FUNCTIONS = """
select pg_get_functiondef(p.oid) from pg_proc p join pg_namespace n on n.oid = p.pronamespace
where n.nspname = 'agentflow' order by p.proname
"""
_CONSTRAINTS = (
    "select conname, pg_get_constraintdef(oid) from pg_constraint where conrelid = 'agentflow.jobs'::regclass"
)
_INDEXES = "select indexname, indexdef from pg_indexes where schemaname = 'agentflow' and tablename = 'jobs'"
_TABLES = """
select format('%I.%I', schemaname, tablename) from pg_tables where schemaname in ('agentflow', 'audit')
and tablename not in ('migrations', 'organizations') order by tablename <> 'jobs'
"""


# ---- jobs ----


def prepared(
    *,
    key: str | None = None,
    slots: int = 1,
    queue: str = "default",
    priority: int = 1,
    run_at: datetime | None = None,
    max_attempts: int = 5,
    callback_url: str | None = None,
    then: Sequence[dict[str, Any]] = (),
    idempotency_key: str | None = None,
    payload: str = "{}",
) -> Prepared:
    """A checked request as intake makes it, of a type that exists nowhere."""
    new = NewJob("test", {}, run_at=run_at, callback_url=callback_url, idempotency_key=idempotency_key)
    return Prepared(
        id=new_id(),
        new=new,
        queue=queue,
        priority=priority,
        payload=payload,
        max_attempts=max_attempts,
        time_limit_s=60.0,
        concurrency=(key, slots) if key else None,
        then_jobs=json.dumps(list(then)) if then else None,
    )


def child(*, callback_url: str | None = None, then: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """A `then` job as it stands in its parent's row."""
    return {
        "id": str(new_id()),
        "type": "test",
        "queue": "default",
        "priority": 1,
        "payload": {},
        "max_attempts": 5,
        "time_limit_s": 60.0,
        "callback_url": callback_url,
        "then": list(then) or None,
    }


def submit(conn: psycopg.Connection, organization_id: int = ORGANIZATION, **request: Any) -> Job:
    return intake.submit(conn, organization_id, prepared(**request)).job


def claim(conn: psycopg.Connection, worker: UUID, *wanted: Job | UUID, lease_s: float = LEASE_S) -> list[Job]:
    """Claim as a worker does: what has a key in a statement of its own."""
    found, keyed = claims.claim(conn, [w.id if isinstance(w, Job) else w for w in wanted], worker, lease_s)
    return found + (claims.claim_keyed(conn, keyed, worker, lease_s) if keyed else [])


def claimed(conn: psycopg.Connection, worker: UUID | None = None, **request: Any) -> Job:
    """A new job that runs."""
    (job,) = claim(conn, worker or uuid4(), submit(conn, **request))
    return job


def rescuer(conn: psycopg.Connection) -> UUID:
    """A worker whose heartbeats have come through for so long that it may rescue."""
    worker = uuid4()
    conn.execute(
        "insert into agentflow.workers (id, kind, host, pid, version, queues, threads, seen_at, well_since)"
        " values (%s, 'worker', 'h', 1, '0', '{}', 1, clock_timestamp() + interval '1 h', '-infinity')",
        (worker,),
    )
    return worker


def verdict(job: Job, outcome: Outcome = "succeeded", delay_s: float = 0.0, **more: Any) -> Verdict:
    return Verdict(job.id, job.fence, outcome, delay_s=delay_s, **more)


def settle(conn: psycopg.Connection, worker: UUID | None, *verdicts: Verdict) -> Settled:
    assert worker is not None
    return settlement.settle(conn, verdicts, worker, lease_s=LEASE_S, max_crashes=MAX_CRASHES)


def finish(conn: psycopg.Connection, job: Job, outcome: Outcome = "succeeded", delay_s: float = 0.0) -> State | None:
    """Write a job's end as its worker. None: it came too late."""
    return settle(conn, job.worker, verdict(job, outcome, delay_s)).states.get((job.id, job.fence))


def read(conn: psycopg.Connection, job: Job | UUID) -> Job:
    found = records.get(conn, None, job.id if isinstance(job, Job) else job)
    assert found is not None
    return found


def column(conn: psycopg.Connection, job: Job | UUID, name: str) -> Any:
    query = sql.SQL("select {} from agentflow.jobs where id = %s").format(sql.Identifier(name))
    return value(conn, query, job.id if isinstance(job, Job) else job)


def whole_row(conn: psycopg.Connection, job: Job | UUID) -> dict[str, Any] | None:
    id_ = job.id if isinstance(job, Job) else job
    found = conn.execute("select to_jsonb(j) from agentflow.jobs j where id = %s", (id_,)).fetchone()
    return found[0] if found else None


def value(conn: psycopg.Connection, query: Any, *parameters: Any) -> Any:
    row = conn.execute(query, parameters or None).fetchone()
    assert row is not None
    return row[0]


def rows(conn: psycopg.Connection, query: str, *parameters: Any) -> list[Any]:
    with conn.cursor(row_factory=namedtuple_row) as cursor:
        return cursor.execute(query, parameters or None).fetchall()


PASS_TIME = """
update agentflow.jobs set lease_until = lease_until - d, run_at = run_at - d, wake_at = wake_at - d, sent_at = sent_at - d,
    started_at = started_at - d, finished_at = finished_at - d, created_at = created_at - d
from (select make_interval(secs => %s) as d) t
"""


def pass_time(conn: psycopg.Connection, seconds: float) -> None:
    """Let so much time pass for all jobs, without waiting for it: every time in them is moved into the past."""
    conn.execute(PASS_TIME, (seconds,))


# ---- the invariants, as far as they can be read from the rows ----

AUDIT = """
create schema if not exists audit;
create table audit.changes (n bigserial primary key, id uuid, old_state text, new_state text, old_fence integer,
    new_fence integer);
create function audit.note() returns trigger language plpgsql as $$ begin
    insert into audit.changes (id, old_state, new_state, old_fence, new_fence)
    values (new.id, old.state, new.state, old.fence, new.fence);
    return null;
end $$;
create trigger note after update on agentflow.jobs for each row
    when (old.state is distinct from new.state or old.fence is distinct from new.fence
        or old.finished_at is null and new.finished_at is not null or old.worker is distinct from new.worker)
    execute function audit.note();
create index on audit.changes (id);
"""


def audit(conn: psycopg.Connection) -> None:
    """From now on each change of a job's state, fence or holder is written down."""
    conn.execute(AUDIT)


_BROKEN = {
    "1 a state left by an edge that does not exist": """
        select id from audit.changes where (old_state, new_state) not in (('queued', 'running'), ('queued', 'cancelled'),
            ('running', 'queued'), ('running', 'succeeded'), ('running', 'failed'), ('running', 'cancelled'))""",
    "2 more than one end": """
        select id from audit.changes where new_state in ('succeeded', 'failed', 'cancelled') group by id having count(*) > 1""",
    "3 a fence that moved otherwise than by one at a claim": """
        select id from audit.changes where new_fence - old_fence <> (old_state = 'queued' and new_state = 'running')::integer""",
    "4 columns that contradict the state": """
        select id from agentflow.jobs where (state = 'running') <> (worker is not null)
            or (state = 'running') <> (lease_until is not null) or (state = 'queued') <> (wake_at is not null)
            or (state in ('succeeded', 'failed', 'cancelled')) <> (finished_at is not null)
            or (state = 'running' and concurrency_key is not null) <> (slot is not null)
            or state <> 'queued' and (sent_at is not null or wait_reason is not null)""",
    "5 a waiting row that is not rung within five minutes of being due": """
        select id from agentflow.jobs where state = 'queued'
            and (not isfinite(wake_at) or wake_at > greatest(run_at, clock_timestamp()) + interval '300.1 s')""",
    "6 more running jobs of a key than it has slots": """
        select min(j.id::text)::uuid as id from agentflow.jobs j join agentflow.concurrency_keys k on k.key = j.concurrency_key
        where j.state = 'running' group by k.key, k.slots
        having count(*) > k.slots or count(distinct j.slot) <> count(*) or max(j.slot) >= k.slots""",
    "7 attempts that do not count the claims": """
        select j.id from agentflow.jobs j where j.fence - (j.state = 'running')::integer <>
            (select count(*) from agentflow.job_attempts a where a.job_id = j.id)""",
    "8 an attempt or a crash beyond the budget": """
        select id from agentflow.jobs where attempt not between 0 and max_attempts
            or state = 'queued' and (attempt >= max_attempts or crashes >= 3) or attempt > fence""",
    "9 a callback missing or too much": """
        select j.id from agentflow.jobs j where (j.finished_at is not null and j.callback_url is not null)::integer <>
            (select count(*) from agentflow.jobs c where c.parent_id = j.id and c.type = 'deliver_callback')""",
    "9 a next job missing or too much": """
        select j.id from agentflow.jobs j where j.then_jobs is not null
            and (j.state = 'succeeded')::integer * jsonb_array_length(j.then_jobs) <>
            (select count(*) from agentflow.jobs c where c.parent_id = j.id and c.type <> 'deliver_callback')""",
    "9 a batch that miscounts": """
        select b.id from agentflow.batches b left join agentflow.jobs j on j.batch_id = b.id group by b.id
        having b.succeeded <> count(*) filter (where j.state = 'succeeded')
            or b.failed <> count(*) filter (where j.state = 'failed')
            or b.cancelled <> count(*) filter (where j.state = 'cancelled')""",
    "14 a cancelled job that waits": """
        select id from agentflow.jobs where state = 'queued' and cancel_requested""",
}
BROKEN = " union all ".join(f"select '{name}', id from ({query}) x" for name, query in _BROKEN.items())  # noqa: S608


def broken(conn: psycopg.Connection) -> list[tuple[str, UUID]]:
    """Which invariants do not hold now, and for which job. Needs `audit`."""
    return conn.execute(BROKEN).fetchall()
