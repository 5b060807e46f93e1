"""The core behind a transaction pooler: the essential tests of worker, web, intake and schedule again, through PgBouncer, and
what a pooler does beside passing on statements.

Three server connections serve all processes of a test: nothing of ours may hold one while it waits for another.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from agentflow import embedded, schema, settings
from agentflow.database import Database
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.prove.ports import free_port
from agentflow.system import System
from tests import job_types  # noqa: F401 - registers the tests' job types
from tests.core_support import end_others
from tests.pgbouncer import PgBouncer, pooler
from tests.processes import BIN, ROOT, eventually, started, worker
from tests.test_intake import (  # noqa: F401 - run again here, through the pooler
    test_a_batch_has_an_idempotency_key_too,
    test_a_flood_leaves_the_rest_to_the_relay,
    test_a_ring_that_failed_is_taken_back,
    test_a_rolled_back_transaction_leaves_nothing_and_rings_nothing,
    test_eight_at_once_with_one_key_make_one_job,
    test_the_same_key_with_the_same_request_is_the_same_job,
)
from tests.test_kills import (  # noqa: F401 - run again here, through the pooler
    QUICK_LEASES,
    assert_each_ended_once,
    test_a_worker_gone_with_its_jobs_has_them_taken_over_within_the_lease,
    test_sigterm_hands_running_jobs_back_without_spending_an_attempt,
)
from tests.test_retention import (  # noqa: F401 - run again here, through the pooler
    test_a_row_that_somebody_holds_is_left_for_later,
    test_the_schedule_cleans_up_whole_backlogs,
)
from tests.test_web_jobs import (  # noqa: F401 - run again here, through the pooler
    client,
    test_a_batch_is_accepted_whole_and_counted,
    test_a_list_is_paged_newest_first_without_payloads,
    test_a_stream_tells_each_change_and_ends_with_the_job,
    test_a_wait_ends_with_the_job,
    test_an_accepted_job_is_in_the_database_and_has_an_address,
    test_cancel_says_what_became_of_the_job,
    test_retry_makes_a_new_job_of_a_dead_letter_only,
    test_the_same_idempotency_key_answers_the_same_job_and_another_request_409,
)
from tests.test_worker import (  # noqa: F401 - run again here, through the pooler
    ended,
    outcomes,
    read,
    running_worker,
    test_a_concurrency_key_lets_so_many_run_at_once_and_nobody_waits_for_the_safety_time,
    test_a_doubled_a_stale_and_a_malformed_message_change_nothing,
    test_a_failing_attempt_is_tried_again_after_a_back_off,
    test_a_job_out_of_attempts_fails_and_a_retry_of_it_is_a_new_job_that_points_to_it,
    test_a_ping_succeeds_and_its_result_is_in_the_row_and_in_dramatiqs_backend,
    test_a_running_job_is_cancelled_within_seconds,
    test_progress_is_seen_while_a_job_runs,
    test_then_jobs_run_after_success_only_and_carry_the_chain,
)

pytestmark = pytest.mark.timeout(180)
POOL = 3
RUNNING = "select count(*) from agentflow.jobs where state = 'running'"


@pytest.fixture(scope="module")
def pgbouncer_of_the_module(stack: embedded.Embedded) -> Iterator[PgBouncer]:
    with pooler(stack.database_url, size=POOL) as started_:
        yield started_


@pytest.fixture
def pgbouncer(pgbouncer_of_the_module: PgBouncer) -> PgBouncer:
    if not pgbouncer_of_the_module.answers():  # a test killed it
        pgbouncer_of_the_module.start()
    return pgbouncer_of_the_module


@pytest.fixture
def direct_url(database_url: str) -> str:
    """Past the pooler: for the operator's and the fate's statements."""
    return database_url


@pytest.fixture
def environment(environment: dict[str, str], direct_url: str, pgbouncer: PgBouncer) -> dict[str, str]:
    return {**environment, "DATABASE_URL": pgbouncer.url_of(direct_url), "DIRECT_DATABASE_URL": direct_url}


@pytest.fixture
def conn(database_url: str, pgbouncer: PgBouncer) -> Iterator[psycopg.Connection]:
    with psycopg.connect(pgbouncer.url_of(database_url), autocommit=True, prepare_threshold=None) as connection:
        yield connection


@pytest.fixture
def connect(database_url: str, pgbouncer: PgBouncer) -> Iterator[Callable[[], psycopg.Connection]]:
    opened: list[psycopg.Connection] = []

    def one() -> psycopg.Connection:
        url = pgbouncer.url_of(database_url)
        opened.append(psycopg.connect(url, autocommit=True, prepare_threshold=None))
        return opened[-1]

    yield one
    for connection in opened:
        connection.close()


def mixed(system: System, count: int) -> list[Job]:
    """Pings, keyed jobs, chains and retries."""
    kinds: list[Callable[[int], NewJob]] = [
        lambda n: NewJob("ping", {"sleep_ms": n % 40}),
        lambda n: NewJob("test_keyed", {"key": f"k{n % 3}", "slots": 2, "sleep_ms": 5}),
        lambda n: NewJob("ping", {}, then=(NewJob("ping", {}),)),
        lambda n: NewJob("ping", {"fail_attempts": int(n % 8 == 3)}),
    ]
    with ThreadPoolExecutor(8) as callers:
        return list(callers.map(lambda n: system.submit(1, kinds[n % len(kinds)](n)).job, range(count)))


def all_succeeded(url: str, jobs: int) -> Callable[[], bool]:
    def check() -> bool:
        with psycopg.connect(url, autocommit=True) as direct:
            states = direct.execute("select state, count(*) from agentflow.jobs group by 1").fetchall()
        return dict(states).get("succeeded", 0) >= jobs and len(states) == 1

    return check


def test_two_server_connections_carry_three_processes(
    stack: embedded.Embedded, environment: dict[str, str], direct_url: str, tmp_path: Path
) -> None:
    """Each worker has nine client connections and more threads than that: nobody may hold one and wait for the next."""
    with pooler(stack.database_url, size=2) as narrow:
        environment["DATABASE_URL"] = narrow.url_of(direct_url)
        system = System.start(settings.load(environment), "test")
        with worker(environment, tmp_path / "one.log"), worker(environment, tmp_path / "two.log"):
            jobs = mixed(system, 160)
            eventually(all_succeeded(direct_url, len(jobs)), within_s=90)
        system.close()
        servers = [s for s in narrow.ask("show pools") if s["database"] in direct_url]

    assert len(servers) == 1
    with psycopg.connect(direct_url, autocommit=True) as direct:
        assert_each_ended_once(direct, [job.id for job in jobs])


@pytest.mark.parametrize("fate", ["pooler killed", "server connections cut"])
def test_a_pooler_that_breaks_in_the_middle_loses_nothing(
    environment: dict[str, str], direct_url: str, pgbouncer: PgBouncer, tmp_path: Path, fate: str
) -> None:
    environment.update(QUICK_LEASES)
    system = System.start(settings.load(environment), "test")
    with worker(environment, tmp_path / "worker.log"), psycopg.connect(direct_url, autocommit=True) as direct:
        jobs = mixed(system, 60)
        for _ in range(3):
            jobs += [system.submit(1, NewJob("ping", {"sleep_ms": 300})).job for _ in range(8)]
            eventually(lambda: direct.execute(RUNNING).fetchone() != (0,))
            if fate == "pooler killed":
                pgbouncer.kill()
                pgbouncer.start()
            else:
                end_others(direct)
            eventually(lambda: _reachable(system))
        eventually(all_succeeded(direct_url, len(jobs)), within_s=90)
        system.close()

        ends = direct.execute(
            "select job_id, count(*) filter (where outcome = 'succeeded') from agentflow.job_attempts group by 1"
        ).fetchall()
        assert {succeeded for _, succeeded in ends} == {1}
        assert {job.id for job in jobs} <= {job_id for job_id, _ in ends}


def _reachable(system: System) -> bool:
    try:
        with system.database.connection() as conn:
            conn.execute("select 1")
        return True
    except psycopg.Error:
        return False


def test_every_connection_says_whose_it_is_through_a_pooler_too(
    environment: dict[str, str], system: System, conn: psycopg.Connection, pgbouncer: PgBouncer, tmp_path: Path
) -> None:
    with worker(environment, tmp_path / "worker.log") as process:
        clients = [c for c in pgbouncer.ask("show clients") if c["database"] in environment["DATABASE_URL"]]
        names = {c.get("application_name") for c in clients}
        assert {name.split(" ")[1] for name in names if name} >= {"worker"}
        assert process.popen.poll() is None

    with system.database.connection() as ours:
        found = ours.execute("select current_setting('application_name')").fetchone()
    assert found and found[0] == system.application_name


def test_prepared_statements_are_off_and_their_absence_is_what_makes_a_pooler_work(
    direct_url: str, pgbouncer: PgBouncer
) -> None:
    """The same statements with psycopg's default fail: the pooler is a real one."""
    url = pgbouncer.url_of(direct_url)
    database = Database(url, application_name="test", pool_size=2)

    def ask(connection: psycopg.Connection) -> None:
        for _ in range(12):
            connection.execute("select %s::int", (1,))

    with ThreadPoolExecutor(6) as threads:
        connections = [database.connect() for _ in range(6)]
        list(threads.map(ask, connections))
        preparing = [psycopg.connect(url, autocommit=True) for _ in range(6)]
        with pytest.raises(psycopg.Error, match="prepared statement"):
            list(threads.map(ask, preparing))
    for connection in [*connections, *preparing]:
        connection.close()


def test_migrations_go_by_the_direct_url_while_a_worker_is_behind_the_pooler(
    stack: embedded.Embedded, environment: dict[str, str], direct_url: str, pgbouncer: PgBouncer
) -> None:
    with psycopg.connect(direct_url, autocommit=True) as direct:
        direct.execute("drop schema agentflow cascade")
        run = subprocess.run(
            [sys.executable, "-m", "migrations"],
            env={**environment, "PATH": str(BIN)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        assert run.returncode == 0, run.stderr
        schema.check(direct)
    assert not [c for c in pgbouncer.ask("show clients") if "migrations" in str(c.get("application_name"))]
    with psycopg.connect(pgbouncer.url_of(direct_url), autocommit=True, prepare_threshold=None) as pooled:
        assert schema.migrate(pooled) == []  # behind it they work as well, where nothing else can be had


def test_workers_with_the_old_and_the_next_stored_functions_share_the_work(
    environment: dict[str, str], direct_url: str, tmp_path: Path
) -> None:
    """A deploy: the migration has added the next functions, the last workers of the old version still run."""
    with psycopg.connect(direct_url, autocommit=True) as direct:
        direct.execute("create sequence agentflow.settled_by_the_next")
        for (definition,) in direct.execute(
            "select pg_get_functiondef(p.oid) from pg_proc p where pronamespace = 'agentflow'::regnamespace order by p.oid"
        ).fetchall():
            text = re.sub(r"\bagentflow\.(\w+_\d+)\(", r"agentflow.\g<1>00(", definition)
            if "agentflow.settle_100(" in text.partition("$")[0]:
                text = re.sub(r"\bbegin\b", "begin perform nextval('agentflow.settled_by_the_next');", text, count=1)
            direct.execute(text.encode())
        system = System.start(settings.load(environment), "test")
        arguments = [str(BIN / "dramatiq"), "tests.next_version", "--processes", "1", "--path", str(ROOT)]
        following = {"PORT": str(free_port()), **environment}
        with worker(environment, tmp_path / "old.log"), started(arguments, following, tmp_path / "new.log") as new:
            new.wait_for("Worker process is ready for action")
            jobs = mixed(system, 120)
            eventually(all_succeeded(direct_url, len(jobs)), within_s=90)
        system.close()

        assert_each_ended_once(direct, [job.id for job in jobs])
        workers = direct.execute("select count(distinct worker) from agentflow.job_attempts").fetchone()
        by_next = direct.execute("select is_called from agentflow.settled_by_the_next").fetchone()
    assert workers == (2,)
    assert by_next == (True,)
