"""Flight records: what led to what, before and after retention has deleted it, from any end, and never somebody else's."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import traces
from agentflow.flights import records as flights
from agentflow.flights.gathering import MOST_LEGS
from agentflow.flights.telling import Record
from agentflow.jobs import flights as legs
from agentflow.jobs import records
from agentflow.jobs.requests import NewJob
from agentflow.schedules.when import When
from agentflow.system import System
from agentflow.webhooks import events, replays
from tests import calendar_support, graph_support
from tests.calendar_support import cleaned_up
from tests.core_support import value
from tests.dashboard_support import put_job
from tests.flight_support import Flown, count_jobs, endpoint, fly, forget_events, forget_jobs, handle
from tests.web_support import claim, client, finish, submit

__all__ = ["client"]

Connection = psycopg.Connection


def tree(record: Record | None) -> list[tuple[int, str, str]]:
    assert record is not None
    return [(each.depth, each.kind, each.name) for each in record.entries]


def kept(record: Record | None) -> list[bool]:
    assert record is not None
    return [each.kept for each in record.entries]


@pytest.fixture
def flown(client: FlaskClient, system: System, conn: Connection) -> Flown:
    return fly(client, system, conn, endpoint(client))


FLIGHT = [(0, "event", "orders · issues"), (1, "job", "handle_webhook"), (2, "job", "web_echo")]


def test_from_every_leg_the_same_flight_is_told(conn: Connection, flown: Flown) -> None:
    found = [
        flights.of_event(conn, 1, flown.event_id),
        flights.of_job(conn, 1, flown.handle_id),
        flights.of_job(conn, None, flown.action_id),
    ]

    assert [tree(each) for each in found] == [FLIGHT] * 3
    assert [each.state for each in found[0].entries if found[0]] == ["done", "succeeded", "succeeded"]
    assert found[0] and found[0].flights == [flown.handle_id]


def test_it_is_told_as_before_when_retention_has_deleted_the_jobs_and_then_the_webhook(
    conn: Connection, flown: Flown
) -> None:
    forget_jobs(conn)

    assert count_jobs(conn) == 0
    for record in (flights.of_event(conn, 1, flown.event_id), flights.of_job(conn, 1, flown.action_id)):
        assert tree(record) == FLIGHT and kept(record) == [True, False, False]

    forget_events(conn)

    assert value(conn, "select count(*) from agentflow.webhook_events") == 0
    for record in (
        flights.of_event(conn, 1, flown.event_id),
        flights.of_job(conn, None, flown.handle_id),
        flights.of_job(conn, 1, flown.action_id),
    ):
        assert tree(record) == FLIGHT and kept(record) == [False, False, False]
        assert record is not None and [each.state for each in record.entries] == ["done", "succeeded", "succeeded"]


def test_what_is_remembered_is_forgotten_in_its_time(conn: Connection, flown: Flown, system: System) -> None:
    forget_jobs(conn)
    assert cleaned_up(system)["clean_up.flight_log"] == 0
    remembered = value(conn, "select count(*) from agentflow.flight_log")

    assert legs.delete_old(conn, days=-1, limit=1) == 1
    assert legs.delete_old(conn, days=-1) == remembered - 1 > 0

    assert flights.of_job(conn, 1, flown.action_id) is None
    assert tree(flights.of_event(conn, 1, flown.event_id)) == FLIGHT[:1]


def test_a_replay_and_what_is_made_of_it_belong_to_the_webhook(
    conn: Connection, client: FlaskClient, system: System, flown: Flown
) -> None:
    event = events.get(conn, 1, flown.event_id)
    assert event is not None
    with system.transaction() as transaction:
        again = replays.one(transaction, event)
    second = handle(system, conn, again.id)
    both = [*FLIGHT, (1, "job", "handle_webhook"), (2, "job", "web_echo")]

    for record in (
        flights.of_event(conn, 1, flown.event_id),
        flights.of_job(conn, 1, flown.action_id),
        flights.of_job(conn, 1, again.id),
        flights.of_job(conn, 1, second) if second else None,
    ):
        assert tree(record) == both
    finish(system, conn, claim(conn, str(second)))
    forget_jobs(conn)
    forget_events(conn)

    assert tree(flights.of_job(conn, 1, flown.action_id)) == both
    assert tree(flights.of_event(conn, 1, flown.event_id)) == both


def test_webhooks_that_share_a_job_do_not_share_their_flights(
    conn: Connection, client: FlaskClient, system: System, flown: Flown
) -> None:
    other = fly(client, system, conn, flown.endpoint, {"name": "Grace"})
    conn.execute(
        "update agentflow.webhook_events set action_job_id = %s where id = %s", (flown.action_id, other.event_id)
    )

    record = flights.of_event(conn, 1, other.event_id)

    assert record and str(flown.action_id) in {each.id for each in record.entries}
    assert str(flown.event_id) not in {each.id for each in record.entries}
    assert tree(flights.of_event(conn, 1, flown.event_id)) == FLIGHT


def test_a_trace_that_began_with_the_callers_request_hides_nothing(
    conn: Connection, client: FlaskClient, system: System
) -> None:
    client.environ_base["HTTP_TRACEPARENT"] = f"00-{'a' * 32}-{'b' * 16}-01"
    flown = fly(client, system, conn, endpoint(client))

    record = flights.of_job(conn, 1, flown.action_id)

    assert tree(record) == FLIGHT
    assert record and [each.hex for each in record.flights] == ["a" * 32]


def test_a_chain_with_its_callback_and_a_retry_are_one_flight(
    conn: Connection, client: FlaskClient, system: System
) -> None:
    first = submit(client, then=[{"type": "ping", "then": [{"type": "web_echo"}]}], callback_url="http://8.8.8.8/")
    finish(system, conn, claim(conn, first["id"]))
    (ping,) = [job.id for job in records.children(conn, UUID(first["id"])) if job.type == "ping"]
    finish(system, conn, claim(conn, ping), "failed", error={"code": "no", "message": "No."})
    retried = client.post(f"/api/jobs/{ping}/retry").json["id"]
    finish(system, conn, claim(conn, retried))
    (last,) = [job for job in records.children(conn, UUID(retried)) if job.type == "web_echo"]

    told = [
        (0, "job", "web_echo"),
        (1, "job", "deliver_callback"),
        (1, "job", "ping"),
        (2, "job", "ping"),
        (3, "job", "web_echo"),
    ]
    records_ = [flights.of_job(conn, 1, UUID(str(each))) for each in (first["id"], ping, retried, last.id)]
    assert [sorted(tree(each)) for each in records_] == [sorted(told)] * 4
    assert records_[0] and {each.code for each in records_[0].entries} == {None, "no"}


def test_files_and_the_edges_of_a_document_lead_back_to_what_made_them(
    conn: Connection, client: FlaskClient, system: System
) -> None:
    video_id = UUID(client.post("/api/videos", json={"url": "http://8.8.8.8/film.mp4?token=hunter2"}).json["video_id"])
    task = UUID(client.post("/api/videos/analyze", json={"video_id": str(video_id)}).json["task_id"])
    picture = f"o/1/videos/{video_id}/{task}/sheet.jpg"
    finish(system, conn, claim(conn, task), result={"sheets": [{"key": picture}], "other": {"key": "o/2/stolen.jpg"}})
    ids = graph_support.small_graph(conn, 1)
    document, edge = UUID(ids["document_id"]), UUID(ids["edge_id"])
    with system.transaction() as transaction, traces.following(task.hex):
        reading = transaction.submit(1, NewJob("generate_embeddings", {"document_id": str(document)})).job
    conn.execute(
        "update agentflow.documents set job_id = %s, chain_id = %s, video_id = %s, read_at = clock_timestamp() where id = %s",
        (reading.id, task, video_id, document),
    )
    finish(system, conn, claim(conn, reading.id))
    told = [
        (0, "video", "http://8.8.8.8/film.mp4"),
        (1, "job", "analyze_video"),
        (2, "artefact", "sheet.jpg"),
        (2, "job", "generate_embeddings"),
        (3, "document", "Protocol"),
        (4, "edge", "Acme Corporation — makes → Atlas 3"),
    ]

    before = [
        flights.of_artefact(conn, 1, picture),
        flights.of_edge(conn, 1, edge),
        flights.of_job(conn, 1, reading.id),
        flights.of_artefact(conn, None, f"o/1/videos/{video_id}/source.mp4"),
    ]
    assert [sorted(tree(each)) for each in before[:3]] == [sorted(told)] * 3
    assert sorted(tree(before[3])) == sorted([*told, (1, "artefact", "source.mp4")])

    forget_jobs(conn)

    after = flights.of_edge(conn, 1, edge)
    assert sorted(tree(after)) == sorted(each for each in told if each[1] != "artefact")
    assert after and {each.name for each in after.entries if not each.kept} == {"analyze_video", "generate_embeddings"}
    assert sorted(tree(flights.of_artefact(conn, 1, picture))) == sorted(told)  # the file itself is what is asked for


def test_what_a_schedule_set_off_says_so(conn: Connection, system: System) -> None:
    schedule = calendar_support.made(conn, When(every_s=3600), name="hourly")
    job = put_job(conn, correlation_id=f"schedule:{schedule.id}")

    assert tree(flights.of_job(conn, 1, job)) == [(0, "schedule", "hourly"), (1, "job", "ping")]
    forget_jobs(conn)
    assert tree(flights.of_job(conn, 1, job)) == [(0, "schedule", "hourly"), (1, "job", "ping")]


def test_a_flight_of_very_many_is_told_in_part_and_with_what_was_asked_for(conn: Connection) -> None:
    first = put_job(conn, age_s=900)
    conn.execute(
        "insert into agentflow.jobs (id, organization_id, type, queue, max_attempts, time_limit_s, wake_at, trace)"
        " select agentflow.uuid7_1(), 1, 'ping', 'default', 5, 60, clock_timestamp(), %s"
        " from generate_series(1, %s)",
        (first.hex, MOST_LEGS + 100),
    )
    last = put_job(conn, age_s=1, trace=first.hex)

    record = flights.of_job(conn, 1, last)

    assert record and record.truncated and len(record.entries) == MOST_LEGS
    assert {str(first), str(last)} <= {each.id for each in record.entries}
    assert {each.cause for each in record.entries} == {None, str(first)}


def test_ids_that_callers_made_up_break_nothing(conn: Connection) -> None:
    job = put_job(conn, payload={"event_id": "no id", "document_id": 7, "video_id": ["x"]}, correlation_id="schedule:x")
    forget_jobs(conn)

    assert tree(flights.of_job(conn, 1, job)) == [(0, "job", "ping")]


@pytest.mark.parametrize("forgotten", [False, True], ids=["kept", "forgotten"])
def test_another_organizations_flight_is_not_told(
    conn: Connection, client: FlaskClient, flown: Flown, forgotten: bool
) -> None:
    if forgotten:
        forget_jobs(conn)
        forget_events(conn)
    edge = UUID(graph_support.small_graph(conn, 1)["edge_id"])

    for sees, told in ((1, True), (None, True), (2, False)):
        found: list[Any] = [
            flights.of_event(conn, sees, flown.event_id),
            flights.of_job(conn, sees, flown.action_id),
            flights.of_edge(conn, sees, edge),
        ]
        assert [each is not None for each in found] == [told] * 3
    # A trace or an id that another organization's job names brings nothing of its own along.
    put_job(conn, organization_id=2, trace=flown.handle_id.hex, retry_of=flown.action_id)
    theirs = put_job(conn, organization_id=2, trace=flown.handle_id.hex, payload={"event_id": str(flown.event_id)})
    assert tree(flights.of_event(conn, 1, flown.event_id)) == FLIGHT
    record = flights.of_job(conn, 2, theirs)
    assert record and {each.kind for each in record.entries} == {"job"} and len(record.entries) == 2


def test_the_api_tells_the_same(conn: Connection, client: FlaskClient, flown: Flown) -> None:
    said = client.get(f"/api/webhook-events/{flown.event_id}/flight").json
    key = f"o/1/renders/{flown.action_id}/one.png"

    assert [(each["depth"], each["kind"], each["name"]) for each in said["entries"]] == FLIGHT
    assert said["entries"][1]["cause"] == str(flown.event_id) and said["traces"] == [flown.handle_id.hex]
    assert client.get(f"/api/jobs/{flown.action_id}/flight").json["entries"] == said["entries"]
    assert client.get(f"/api/artefacts/{key}/flight").json["entries"][-1]["id"] == key
    for path in (
        f"/api/jobs/{uuid4()}/flight",
        f"/api/jobs/{flown.event_id}/flight",
        f"/api/webhook-events/{flown.action_id}/flight",
        f"/api/graph/edges/{uuid4()}/flight",
        "/api/artefacts/o/1/nothing/flight",
        "/api/artefacts/passwd/flight",
        "/api/artefacts/o/1/%00/flight",
    ):
        assert client.get(path).status_code == 404, path
