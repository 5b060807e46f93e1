"""Why a job waits, where it stands, and when it will start and end: over HTTP, from rows as the system leaves them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow.jobs import callbacks, claims, forecasts, leases, records, rules, settlement, standing
from agentflow.jobs.estimates import Estimate
from agentflow.jobs.forecasts import Forecast
from agentflow.jobs.model import Job, Verdict
from agentflow.system import System
from agentflow.worker.observer import Observer, share_in_use
from tests.core_support import LEASE_S, settle, value, verdict
from tests.core_support import claim as core_claim
from tests.core_support import submit as submitted
from tests.web_support import claim, client, finish, submit

__all__ = ["client"]
Connection = psycopg.Connection
#: How far off a slow machine may be; all times that are told apart are further away from each other.
SLOW_S = 45.0


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look is a new one: a test goes on sooner than a second."""
    monkeypatch.setattr("agentflow.outlook._FRESH_S", 0.0)
    monkeypatch.setattr("agentflow.outlook._LOOKING_SHARE", 1e9)
    monkeypatch.setattr("agentflow.jobs.rules._FRESH_S", 0.0)


@pytest.fixture
def staff(conn: Connection) -> UUID:
    """A worker with eight threads, six of them for any job."""
    worker = uuid4()
    facts = {"kind": "worker", "host": "h", "pid": 1, "version": "0", "queues": ["default", "heavy"], "threads": 8}
    leases.announce_worker(conn, worker, {**facts, "demand": {}, "memory_bytes": None, "busy": 0}, lease_s=LEASE_S)
    return worker


def learned(conn: Connection, type_: str = "web_echo", seconds: float = 500.0) -> None:
    forecasts.note_durations(conn, {type_: [seconds] * 20})


def look(client: FlaskClient, job: dict[str, Any]) -> dict[str, Any]:
    answer = client.get(f"/api/jobs/{job['id']}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json)


def run_by(conn: Connection, worker: UUID, job: dict[str, Any]) -> Job:
    taken = claim(conn, job["id"])
    conn.execute("update agentflow.jobs set worker = %s where id = %s", (worker, job["id"]))
    return taken


def in_s(moment: str | None) -> float:
    assert moment is not None
    return (datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds()


# ---- the reasons ----


@pytest.mark.usefixtures("staff")
def test_a_due_job_waits_for_its_turn(client: FlaskClient, conn: Connection) -> None:
    learned(conn)
    jobs = [submit(client) for _ in range(3)]

    said = look(client, jobs[2])

    assert said["waiting"] == {"reason": "due", "position": 3, "position_exact": True, "before": 2, "until": None}
    assert in_s(said["estimate"]["start"]) == pytest.approx(0, abs=SLOW_S)
    assert in_s(said["estimate"]["end"]) == pytest.approx(500, abs=SLOW_S)
    assert said["estimate"]["start_range"] is None  # nothing to compare with yet


def test_without_a_worker_it_says_so(client: FlaskClient, conn: Connection) -> None:
    learned(conn)

    said = look(client, submit(client))

    assert said["waiting"]["reason"] == "unserved"
    assert said["estimate"]["start"] is None and said["estimate"]["end"] is None


@pytest.mark.usefixtures("staff")
def test_a_scheduled_job_starts_at_its_time(client: FlaskClient, conn: Connection) -> None:
    learned(conn)
    then = datetime.now(UTC) + timedelta(hours=1)

    said = look(client, submit(client, run_at=then.isoformat()))

    assert said["waiting"]["reason"] == "scheduled" and said["waiting"]["position"] is None
    assert datetime.fromisoformat(said["waiting"]["until"]) == then
    assert in_s(said["estimate"]["start"]) == pytest.approx(3600, abs=SLOW_S)


@pytest.mark.parametrize("reason", ["limit", "budget", "memory", "retry"])
@pytest.mark.usefixtures("staff")
def test_a_parked_job_names_what_it_was_parked_for(client: FlaskClient, conn: Connection, reason: str) -> None:
    learned(conn)
    job = submit(client)
    park(conn, claim(conn, job["id"]), reason, 600.0)

    said = look(client, job)

    assert said["waiting"]["reason"] == reason
    assert in_s(said["waiting"]["until"]) == pytest.approx(600, abs=SLOW_S)
    assert in_s(said["estimate"]["start"]) == pytest.approx(600, abs=SLOW_S)


@pytest.mark.parametrize("rule", [("queue", "default", 0), ("organization", "", 1), ("type", "web_echo", 0)])
@pytest.mark.usefixtures("staff")
def test_what_is_paused_has_no_time(client: FlaskClient, conn: Connection, rule: tuple[rules.Kind, str, int]) -> None:
    learned(conn)
    job = submit(client)
    rules.pause(conn, *rule)

    said = look(client, job)

    assert said["waiting"]["reason"] == "paused" and said["waiting"]["position"] == 1
    assert said["estimate"] == {"start": None, "start_range": None, "end": None, "end_range": None}


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.usefixtures("staff")
def test_who_is_over_a_budget_waits_until_midnight_whether_parked_or_passed_over(
    client: FlaskClient, conn: Connection, sent: bool
) -> None:
    learned(conn)
    job, told = submit(client), submit(client)
    conn.execute("update agentflow.jobs set type = %s where id = %s", (callbacks.TYPE, told["id"]))
    over_budget(conn)
    if not sent:
        conn.execute("update agentflow.jobs set sent_at = null, sends = 0, wake_at = run_at")

    said = look(client, job)
    of_callback = look(client, told)
    rules.set_budget(conn, 1, "usd", 2)
    raised = look(client, job)

    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    assert (said["state"], said["wait_reason"], said["waiting"]["reason"]) == ("queued", None, "budget")
    to_midnight_s = (today + timedelta(days=1) - datetime.now(UTC)).total_seconds()
    assert in_s(said["estimate"]["start"]) == pytest.approx(to_midnight_s, abs=SLOW_S)
    # Nobody is passed over who was rung for, and whoever is told of an end is let in.
    assert of_callback["waiting"]["reason"] == ("due" if sent else "budget")
    assert raised["waiting"]["reason"] == "due"


@pytest.mark.usefixtures("staff")
def test_a_pause_and_what_a_job_was_parked_for_go_before_the_budget(client: FlaskClient, conn: Connection) -> None:
    parked, paused = submit(client), submit(client)
    park(conn, claim(conn, parked["id"]), "retry", 600.0)
    over_budget(conn)

    retried = look(client, parked)
    rules.pause(conn, "organization", "", 1)

    assert retried["waiting"]["reason"] == "retry"
    assert look(client, paused)["waiting"]["reason"] == "paused"


def test_the_line_of_a_concurrency_key(client: FlaskClient, conn: Connection, staff: UUID) -> None:
    learned(conn)
    jobs = [submit(client, concurrency_key="account") for _ in range(4)]
    (running,) = claims.claim_keyed(conn, [UUID(jobs[0]["id"])], staff, LEASE_S)
    claims.claim_keyed(conn, [UUID(job["id"]) for job in jobs[1:]], staff, LEASE_S)
    age(conn, running, 200.0)

    said = [look(client, job) for job in jobs]

    assert [each["waiting"] and each["waiting"]["reason"] for each in said] == [None, "busy", "busy", "busy"]
    assert [each["waiting"]["position"] for each in said[1:]] == [1, 2, 3]
    assert [in_s(each["estimate"]["start"]) for each in said[1:]] == pytest.approx([300, 800, 1300], abs=SLOW_S)


@pytest.mark.parametrize("type_", ["", "web_echo"])
def test_the_cap_of_an_organization_or_type(client: FlaskClient, conn: Connection, staff: UUID, type_: str) -> None:
    learned(conn)
    rules.set_cap(conn, 1, type_, 2)
    jobs = [submit(client) for _ in range(4)]
    for job in jobs[:2]:
        age(conn, run_by(conn, staff, job), 250.0)
    conn.execute("update agentflow.jobs set sent_at = null, wake_at = run_at where state = 'queued'")

    said = [look(client, job) for job in jobs[2:]]

    assert [each["waiting"]["reason"] for each in said] == ["busy", "busy"]
    assert [in_s(each["estimate"]["start"]) for each in said] == pytest.approx([250, 250], abs=SLOW_S)


def test_where_threads_are_taken_a_job_waits_for_those_before_it(
    client: FlaskClient, conn: Connection, staff: UUID
) -> None:
    learned(conn)
    jobs = [submit(client) for _ in range(6 + 12 + 1)]  # six threads are for any job
    for job in jobs[:6]:
        run_by(conn, staff, job)

    said = look(client, jobs[-1])

    assert said["waiting"]["reason"] == "due" and said["waiting"]["before"] == 12
    assert in_s(said["estimate"]["start"]) == pytest.approx(1500, abs=SLOW_S)  # two rounds and the one that runs
    assert in_s(said["estimate"]["end"]) == pytest.approx(2000, abs=SLOW_S)


@pytest.mark.usefixtures("staff")
def test_others_take_turns_with_it_and_nothing_else_is_said_of_them(client: FlaskClient, conn: Connection) -> None:
    learned(conn)
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
    for _ in range(50):
        submitted(conn, 2)
    mine = [submit(client) for _ in range(5)][-1]
    conn.execute("update agentflow.jobs set sent_at = null, wake_at = run_at where state = 'queued'")

    said = look(client, mine)

    assert said["waiting"]["position"] == 5
    assert 8 <= said["waiting"]["before"] <= 10  # four of its own, and as many of the other's


@pytest.mark.parametrize(("when", "before"), [("lately", 9), ("before that", 4)])
def test_others_who_hand_in_again_and_again_are_expected_to_go_on(
    client: FlaskClient, conn: Connection, staff: UUID, monkeypatch: pytest.MonkeyPatch, when: str, before: int
) -> None:
    for module in ("standing", "waits"):  # however slow the machine is
        monkeypatch.setattr(f"agentflow.jobs.{module}.LATELY_S", 600.0)
    learned(conn)
    learned(conn, "test")  # what the others' jobs take that run, too: else they are thought to end soon
    conn.execute("insert into agentflow.organizations (id, slug, name) values (2, 'two', 'Two')")
    assert len(core_claim(conn, staff, *(submitted(conn, 2) for _ in range(30)))) == 30  # none of them waits now
    if when != "lately":
        conn.execute("update agentflow.jobs set id = overlay(id::text placing '00000000' from 1 for 8)::uuid")
    mine = [submit(client) for _ in range(5)][-1]
    conn.execute("update agentflow.jobs set sent_at = null, wake_at = run_at where state = 'queued'")

    said = look(client, mine)

    assert said["waiting"]["position"] == 5
    assert said["waiting"]["before"] == before  # four of its own, and five turns of the other's


@pytest.mark.usefixtures("staff")
def test_counting_is_bounded(client: FlaskClient, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "_MIX", 5)
    monkeypatch.setattr(standing, "MOST_AHEAD", 20)
    jobs = [submit(client) for _ in range(30)]
    conn.execute("update agentflow.jobs set sent_at = null, wake_at = run_at where state = 'queued'")

    near, far = look(client, jobs[12]), look(client, jobs[-1])

    assert (near["waiting"]["position"], near["waiting"]["position_exact"]) == (13, True)
    assert (far["waiting"]["position"], far["waiting"]["position_exact"]) == (21, False)


def test_a_running_job_ends_when_such_jobs_do(client: FlaskClient, conn: Connection, staff: UUID) -> None:
    learned(conn)
    job = submit(client)
    taken = run_by(conn, staff, job)
    age(conn, taken, 200.0)

    said = look(client, job)

    assert said["waiting"] is None and said["estimate"]["start"] is None
    assert in_s(said["estimate"]["end"]) == pytest.approx(300, abs=SLOW_S)
    conn.execute("update agentflow.jobs set progress = 0.8 where id = %s", (taken.id,))
    assert in_s(look(client, job)["estimate"]["end"]) == pytest.approx(0.8 * 50 + 0.2 * 300, abs=SLOW_S)


def test_of_an_ended_job_nothing_is_said(client: FlaskClient, conn: Connection, system: System) -> None:
    job = submit(client)
    finish(system, conn, claim(conn, job["id"]))

    said = look(client, job)

    assert said["waiting"] is None and said["estimate"] is None


@pytest.mark.usefixtures("staff")
def test_the_old_status_route_says_the_same(client: FlaskClient, conn: Connection) -> None:
    forecasts.note_durations(conn, {"analyze_video": [500.0] * 5})
    task = client.post("/api/videos/analyze", json={"url": "https://93.184.215.14/film.mp4"}).json

    said = client.get(f"/api/videos/task/{task['task_id']}/status").json

    assert said["status"] == "queued" and said["waiting"]["reason"] == "due"
    assert in_s(said["estimate"]["end"]) == pytest.approx(500, abs=SLOW_S)


# ---- what is learned ----


def test_a_worker_learns_from_what_it_was_wrong_about(
    client: FlaskClient, conn: Connection, system: System, staff: UUID
) -> None:
    """Jobs of this type always start three times as late as thought: after enough of them that is what is said, with a range."""
    learned(conn, seconds=100.0)
    observer = Observer(system.outlooks, system.rules, ["default"])
    jobs = [submitted(conn) for _ in range(60)]
    forecasts.record(conn, [forecast(job, 100.0, 95.0 + n % 10) for n, job in enumerate(jobs)])
    settle(conn, staff, *(verdict(job) for job in core_claim(conn, staff, *jobs)))
    conn.execute("update agentflow.forecasts set made_at = made_at - interval '300 s'")
    due = submit(client)

    observe(observer, system)
    said = look(client, due)

    assert value(conn, "select count(*) from agentflow.forecasts where closed") == 60
    estimate = said["estimate"]
    assert in_s(estimate["end"]) == pytest.approx(300, abs=SLOW_S)
    earliest, latest = in_s(estimate["end_range"]["earliest"]), in_s(estimate["end_range"]["latest"])
    assert 200 < earliest < latest < 400


def test_forecasts_of_jobs_that_took_another_way_teach_nothing(
    client: FlaskClient, conn: Connection, system: System
) -> None:
    jobs = [submit(client) for _ in range(3)]
    for job in jobs:
        made = records.get(conn, 1, UUID(job["id"]))
        assert made is not None
        forecasts.record(conn, [forecast(made, 1.0, 2.0)])
    park(conn, claim(conn, jobs[0]["id"]), "limit", 60.0)
    system.cancel(1, UUID(jobs[1]["id"]))
    claim(conn, jobs[2]["id"])

    forecasts.close(conn, "default")

    left = conn.execute("select job_id, started_s is not null, closed from agentflow.forecasts").fetchall()
    assert left == [(UUID(jobs[2]["id"]), True, False)]


def test_one_worker_at_a_time_looks_and_asks_nothing_while_nothing_happens(
    client: FlaskClient, conn: Connection, system: System, staff: UUID
) -> None:
    learned(conn)
    for _ in range(4):
        submit(client)
    first, second = (Observer(system.outlooks, system.rules, ["default"]) for _ in range(2))
    idle = Observer(system.outlooks, system.rules, ["default"], busy=lambda: False)

    observe(idle, system)
    assert value(conn, "select count(*) from agentflow.paces") == 0
    idle.ended("web_echo", 3.0)
    observe(idle, system)
    observe(first, system)
    once = value(conn, "select count(*) from agentflow.forecasts")
    observe(second, system)

    assert value(conn, "select seconds[21] from agentflow.durations where type = 'web_echo'") == 3.0
    assert 0 < once == value(conn, "select count(*) from agentflow.forecasts")


def test_what_is_said_is_remembered_now_and_then(client: FlaskClient, conn: Connection, staff: UUID) -> None:
    learned(conn)
    jobs = [submit(client) for _ in range(5)]

    for job in jobs:
        look(client, job)

    assert 1 <= value(conn, "select count(*) from agentflow.forecasts") <= 5


def test_durations_are_the_last_two_hundred(conn: Connection) -> None:
    for n in range(25):
        forecasts.note_durations(conn, {"a": [float(n)] * 10})

    assert value(conn, "select cardinality(seconds) from agentflow.durations") == 200
    assert value(conn, "select seconds[1] from agentflow.durations") == 5.0


def test_threads_in_use_are_counted_only_while_more_jobs_wait(conn: Connection, staff: UUID) -> None:
    def share(waiting: int, running: int) -> float | None:
        lane = standing.WaitingLane(1, 1, waiting, None, 0.0, 1.0)
        held = [standing.RunningJob(1, "a", None, 1.0, None, True)] * running
        return share_in_use(standing.Picture({0: 8, 1: 6, 2: 6}, 1, 1.0, None, held, [lane], {}, {}))

    assert share(waiting=3, running=6) is None
    assert share(waiting=100, running=6) == 1.0
    assert share(waiting=100, running=3) == 0.5


# ---- helpers ----


def over_budget(conn: Connection) -> None:
    rules.set_budget(conn, 1, "usd", 1)
    conn.execute(
        "insert into agentflow.usage_days (day, organization_id, measure, amount)"
        " values ((now() at time zone 'UTC')::date, 1, 'usd', 1)"
    )


def park(conn: Connection, taken: Job, reason: str, seconds: float) -> None:
    assert taken.worker is not None
    settled = settlement.settle(
        conn, [Verdict(taken.id, taken.fence, "wait", delay_s=seconds, reason=reason)], taken.worker, lease_s=LEASE_S
    )
    assert list(settled.states.values()) == ["queued"]


def age(conn: Connection, taken: Job, seconds: float) -> None:
    conn.execute(
        "update agentflow.jobs set started_at = started_at - make_interval(secs => %s) where id = %s",
        (seconds, taken.id),
    )


def forecast(job: Job, start_s: float, end_s: float) -> Forecast:
    start, end = Estimate(start_s, start_s), Estimate(end_s, end_s)
    return Forecast(job.id, job.organization_id, job.queue, job.type, "waiting", job.fence, start, end)


def observe(observer: Observer, system: System) -> None:
    with system.database.connect() as conn:
        observer.step(conn)
