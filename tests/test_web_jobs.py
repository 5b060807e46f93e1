"""The operations on jobs, in this process, on the real database."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from flask.testing import FlaskClient

from agentflow import health, settings
from agentflow.jobs.requests import NewJob
from agentflow.live import Progress
from agentflow.system import System
from tests.web_support import claim, client, count, finish, problem, run, submit
from web import create_app

__all__ = ["client"]


def test_an_accepted_job_is_in_the_database_and_has_an_address(client: FlaskClient, conn: psycopg.Connection) -> None:
    answer = client.post(
        "/api/jobs",
        json={
            "type": "web_echo",
            "payload": {"text": "é"},
            "priority": "critical",
            "run_at": "2099-01-01T00:00:00Z",
            "max_attempts": 7,
            "time_limit_s": 9.5,
            "concurrency_key": "k",
            "concurrency_limit": 2,
            "correlation_id": "mine",
            "then": [{"type": "web_echo", "payload": {"text": "next"}}],
        },
    )

    assert answer.status_code == 202
    job = answer.json
    assert answer.headers["Location"] == f"/api/jobs/{job['id']}"
    row = conn.execute(
        "select payload, priority, max_attempts, time_limit_s, concurrency_key, correlation_id, then_jobs -> 0 ->> 'type'"
        " from agentflow.jobs where id = %s",
        (job["id"],),
    ).fetchone()
    assert row is not None
    assert row[0]["text"] == "é"
    assert row[1:] == (0, 7, 9.5, "1:k", "mine", "web_echo")
    assert (job["state"], job["concurrency_key"]) == ("queued", "k")
    shown = client.get(f"/api/jobs/{job['id']}").json
    assert shown["payload"]["text"] == "é"
    assert shown["run_at"] == "2099-01-01T00:00:00Z"


BAD_BODIES: dict[str, tuple[Any, int, str]] = {
    "no_body": (b"", 400, ""),
    "no_json": (b"{type", 400, ""),
    "no_utf8": (b'{"type": "\xff"}', 400, ""),
    "nan": (b'{"type": "web_echo", "payload": {"more": {"x": NaN}}}', 400, ""),
    "infinity_by_size": (b'{"type": "web_echo", "payload": {"more": {"x": 1e999}}}', 422, ""),
    "nested_without_end": (b"[" * 100_000, 400, ""),
    "text": (b'"web_echo"', 422, "body"),
    "json_in_a_text": (b'"{\\"type\\": \\"web_echo\\"}"', 422, "body"),
    "list": (b"[]", 422, "body"),
    "null": (b"null", 422, "body"),
    "no_type": ({"payload": {}}, 422, "type"),
    "unknown_type": ({"type": "nope"}, 422, "type"),
    "type_that_is_not_public": ({"type": "web_secret"}, 422, "type"),
    "unknown_field": ({"type": "web_echo", "prioritty": "low"}, 422, "prioritty"),
    "payload_of_the_wrong_type": ({"type": "web_echo", "payload": []}, 422, "payload"),
    "unknown_payload_field": ({"type": "web_echo", "payload": {"txet": ""}}, 422, "payload.txet"),
    "text_for_a_number": ({"type": "web_echo", "max_attempts": "3"}, 422, "max_attempts"),
    "true_for_a_number": ({"type": "web_echo", "max_attempts": True}, 422, "max_attempts"),
    "number_for_a_time": ({"type": "web_echo", "run_at": 0}, 422, "run_at"),
    "time_without_zone": ({"type": "web_echo", "run_at": "2030-01-01T00:00:00"}, 422, "run_at"),
    "too_many_attempts": ({"type": "web_echo", "max_attempts": 1001}, 422, "max_attempts"),
    "time_limit_of_nothing": ({"type": "web_echo", "time_limit_s": 1e-300}, 422, "time_limit_s"),
    "limit_without_key": ({"type": "web_echo", "concurrency_limit": 2}, 422, "concurrency_limit"),
    "nul_in_payload": ({"type": "web_echo", "payload": {"text": "a\x00"}}, 422, "payload"),
    "nul_in_a_key_of_the_payload": ({"type": "web_echo", "payload": {"more": {"\x00": 1}}}, 422, "payload"),
    "nul_in_correlation_id": ({"type": "web_echo", "correlation_id": "\x00"}, 422, "correlation_id"),
    "half_a_surrogate_pair": (b'{"type": "web_echo", "payload": {"text": "\\ud800"}}', 400, ""),
    "number_without_end": (b'{"type": "web_echo", "payload": {"more": {"n": ' + b"9" * 4200 + b"}}}", 422, ""),
    "oversized_payload": ({"type": "web_echo", "payload": {"text": "x" * (257 << 10)}}, 413, ""),
    "oversized_payload_of_a_follower": (
        {"type": "web_echo", "then": [{"type": "web_echo", "payload": {"text": "x" * (257 << 10)}}]},
        413,
        "",
    ),
    "oversized_body": (b'{"type": "' + b"x" * (5 << 20) + b'"}', 413, ""),
    "callback_to_this_machine": ({"type": "web_echo", "callback_url": "http://127.0.0.1/x"}, 422, "callback_url"),
    "callback_to_a_file": ({"type": "web_echo", "callback_url": "file:///etc/passwd"}, 422, "callback_url"),
    "bad_follower": ({"type": "web_echo", "then": [{"type": "nope"}]}, 422, "then.0.type"),
    "bad_callback_of_a_follower": (
        {"type": "web_echo", "then": [{"type": "web_echo", "callback_url": "http://[::1]/"}]},
        422,
        "then.0.callback_url",
    ),
}


def test_a_bad_body_is_refused_by_name_and_nothing_is_written(client: FlaskClient, conn: psycopg.Connection) -> None:
    wrong = []
    for name, (body, status, field) in BAD_BODIES.items():
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        answer = client.post("/api/jobs", data=data, content_type="application/json")

        if answer.status_code != status:
            wrong.append((name, answer.status_code, answer.text[:300]))
            continue
        said = problem(answer, status)
        if field and (said["errors"][0]["field"] != field or field not in said["detail"]):
            wrong.append((name, said["errors"], said["detail"]))
    assert wrong == []
    assert count(conn) == 0


def test_a_time_at_the_ends_of_the_calendar_or_in_an_odd_zone_is_taken(client: FlaskClient) -> None:
    for text, kept in (
        ("2030-01-01T00:00:00+18:08", "2029-12-31T05:52:00Z"),
        ("0001-01-01T00:00:00+14:00", "1970-01-02T00:00:00Z"),
        ("9999-12-31T23:59:59-14:00", "9998-01-01T00:00:00Z"),
    ):
        assert submit(client, run_at=text)["run_at"] == kept


def test_a_body_that_is_not_called_json_is_415(client: FlaskClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = client.post("/api/jobs", data=b'{"type": "web_echo"}', content_type=kind)

        problem(answer, 415)
        assert answer.headers["Accept"] == "application/json"


def test_without_the_key_there_is_401_before_anything_is_read(system: System) -> None:
    stranger = create_app(system).test_client()
    for value in (None, "Bearer wrong", "Bearer", "Basic YTpi", "Bearer \xe9", "wrong"):
        headers = {"Content-Length": str(1 << 40), "Content-Type": "application/json"}

        answer = stranger.post("/api/jobs", headers={**headers, **({"Authorization": value} if value else {})})

        problem(answer, 401)
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_the_same_idempotency_key_answers_the_same_job_and_another_request_409(
    client: FlaskClient, conn: psycopg.Connection
) -> None:
    def send(text: str) -> Any:
        return client.post(
            "/api/jobs", json={"type": "web_echo", "payload": {"text": text}}, headers={"Idempotency-Key": "k-1"}
        )

    first, again, other = send("a"), send("a"), send("b")

    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json["id"] == again.json["id"]
    assert "Idempotency-Replayed" not in first.headers and again.headers["Idempotency-Replayed"] == "true"
    problem(other, 409)
    assert count(conn) == 1


def test_an_idempotency_key_that_cannot_be_kept_is_422(client: FlaskClient) -> None:
    for key in ("", " x", "\xe9", "x" * 256):
        answer = client.post("/api/jobs", json={"type": "web_echo"}, headers={"Idempotency-Key": key})

        (fault,) = problem(answer, 422)["errors"]
        assert (fault["field"], fault["where"]) == ("Idempotency-Key", "header")


def test_a_query_that_is_wrong_doubled_or_unknown_is_422_by_name(client: FlaskClient) -> None:
    for query in (
        *("limit=1&limit=1", "limit=0", "limit=101", "limit=x", "state=done", "nope=1", "batch_id=1", "cursor=!"),
        "type=%00",
    ):
        answer = client.get(f"/api/jobs?{query}")

        assert problem(answer, 422)["errors"][0]["field"] == query.partition("=")[0]


def test_a_parameter_is_refused_where_none_is_known(client: FlaskClient) -> None:
    assert problem(client.get("/api/job-types?x=1"), 422)["errors"][0]["where"] == "query"


def test_a_list_is_paged_newest_first_without_payloads(client: FlaskClient) -> None:
    ids = [submit(client)["id"] for _ in range(5)]

    pages, cursor = [], ""
    while True:
        page = client.get(f"/api/jobs?limit=2{cursor}").json
        pages.append([job["id"] for job in page["jobs"]])
        assert all("payload" not in job and "result" not in job for job in page["jobs"])
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"

    assert pages == [ids[:2:-1], ids[2:0:-1], ids[:1]]


def test_a_list_is_filtered(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    done = submit(client, correlation_id="a")
    run(system, conn, done["id"])
    waiting = submit(client, correlation_id="b")
    batch = client.post("/api/jobs/batch", json={"jobs": [{"type": "ping"}]}).json

    def found(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"/api/jobs?{query}").json["jobs"]]

    assert found("state=succeeded") == [done["id"]]
    assert found("correlation_id=b") == [waiting["id"]]
    assert found("type=ping") == batch["ids"] == found(f"batch_id={batch['batch_id']}")
    assert found(f"parent_id={done['id']}") == []


def test_a_wait_ends_with_the_job(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    job = submit(client, payload={"text": "x"})
    threading.Timer(0.4, run, (system, conn, job["id"]), {"result": {"n": 1}}).start()

    began = time.monotonic()
    answer = client.get(f"/api/jobs/{job['id']}?wait=20")

    assert answer.json["state"] == "succeeded"
    assert answer.json["result"] == {"n": 1}
    assert 0.3 < time.monotonic() - began < 1.4


def test_a_wait_without_redis_ends_with_the_row(
    environment: dict[str, str], conn: psycopg.Connection, system: System
) -> None:
    lonely = System(settings.load({**environment, "REDIS_URL": "redis://127.0.0.1:1"}), "test")
    client = create_app(lonely).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {lonely.admin_key()}"
    job = submit(client)
    taken = claim(conn, job["id"])
    threading.Timer(0.5, finish, (system, conn, taken)).start()

    began = time.monotonic()
    answer = client.get(f"/api/jobs/{job['id']}?wait=20")

    assert answer.json["state"] == "succeeded"
    assert time.monotonic() - began < 6
    lonely.close()


def test_a_wait_is_over_when_its_time_is(client: FlaskClient) -> None:
    job = submit(client)

    began = time.monotonic()
    answer = client.get(f"/api/jobs/{job['id']}?wait=0.5")

    assert answer.json["state"] == "queued"
    assert 0.45 < time.monotonic() - began < 2
    problem(client.get(f"/api/jobs/{job['id']}?wait=26"), 422)
    problem(client.get(f"/api/jobs/{job['id']}?wait=nan"), 422)


def test_prefer_wait_answers_the_whole_job_when_it_ended_in_time(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    def soon() -> None:
        while (row := conn.execute("select id from agentflow.jobs").fetchone()) is None:
            time.sleep(0.01)
        run(system, conn, row[0], result={"n": 2})

    threading.Thread(target=soon).start()
    ended = client.post("/api/jobs", json={"type": "web_echo"}, headers={"Prefer": "respond-async, wait=10"})
    too_short = client.post("/api/jobs", json={"type": "web_echo"}, headers={"Prefer": "wait=1"})

    assert (ended.status_code, ended.json["result"]) == (200, {"n": 2})
    assert ended.headers["Preference-Applied"] == "wait=10"
    assert (too_short.status_code, too_short.json["state"]) == (202, "queued")


def test_beyond_its_share_of_threads_a_wait_is_answered_at_once(
    environment: dict[str, str], conn: psycopg.Connection, system: System
) -> None:
    small = System(settings.load({**environment, "WEB_THREADS": "4", "WEB_WAIT_SHARE": "0.5"}), "test")
    app = create_app(small)
    seats = app.extensions["agentflow"].seats
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {small.admin_key()}"
    job = submit(client)

    assert (seats.take(), seats.take(), seats.take()) == (True, True, False)
    began = time.monotonic()
    assert client.get(f"/api/jobs/{job['id']}?wait=20").json["state"] == "queued"
    prefer = client.post("/api/jobs", json={"type": "web_echo"}, headers={"Prefer": "wait=20"})
    stream = client.get(f"/api/jobs/{job['id']}/events")

    assert time.monotonic() - began < 15
    assert prefer.status_code == 202 and "Preference-Applied" not in prefer.headers
    problem(stream, 503)
    assert int(stream.headers["Retry-After"]) > 0
    seats.leave()
    assert client.get(f"/api/jobs/{job['id']}?wait=0.3").json["state"] == "queued"
    assert seats.take()  # the wait gave its seat back
    small.close()


def test_progress_is_live_while_redis_is_there_and_the_rows_otherwise(
    client: FlaskClient, system: System, conn: psycopg.Connection, environment: dict[str, str]
) -> None:
    job = submit(client)
    taken = claim(conn, job["id"])
    conn.execute("update agentflow.jobs set progress = 0.25, stage = 'reading' where id = %s", (taken.id,))

    from_row = client.get(f"/api/jobs/{job['id']}").json
    system.live.write_progress([((taken.id, taken.fence), Progress(0.5, "shots"))])
    from_redis = client.get(f"/api/jobs/{job['id']}").json
    lonely = System(settings.load({**environment, "REDIS_URL": "redis://127.0.0.1:1"}), "test")
    without = create_app(lonely).test_client()
    began = time.monotonic()
    fallen_back = without.get(f"/api/jobs/{job['id']}", headers={"Authorization": f"Bearer {lonely.admin_key()}"}).json

    assert (from_row["progress"], from_row["stage"]) == (0.25, "reading")
    assert (from_redis["progress"], from_redis["stage"]) == (0.5, "shots")
    assert (fallen_back["progress"], fallen_back["stage"]) == (0.25, "reading")
    assert time.monotonic() - began < 8
    lonely.close()


def test_cancel_says_what_became_of_the_job(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    queued, running, done = (submit(client)["id"] for _ in range(3))
    claim(conn, running)
    run(system, conn, done)

    first, again = (client.post(f"/api/jobs/{queued}/cancel") for _ in range(2))
    told = client.post(f"/api/jobs/{running}/cancel")

    assert (first.status_code, first.json["state"]) == (200, "cancelled")
    assert (again.status_code, again.json["state"]) == (200, "cancelled")
    assert (told.status_code, told.json["state"], told.json["cancel_requested"]) == (202, "running", True)
    problem(client.post(f"/api/jobs/{done}/cancel"), 409)
    problem(client.post(f"/api/jobs/{uuid4()}/cancel"), 404)


def test_a_job_that_succeeds_while_it_is_told_to_stop_is_not_called_cancelled(
    client: FlaskClient, system: System, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = claim(conn, submit(client)["id"])
    cancel = system.cancel

    def cancelled_too_late(*asked: Any) -> str | None:
        state = cancel(*asked)
        finish(system, conn, job)
        return state

    monkeypatch.setattr(system, "cancel", cancelled_too_late)

    document = problem(client.post(f"/api/jobs/{job.id}/cancel"), 409)

    assert "it succeeded" in document["detail"]


def test_retry_makes_a_new_job_of_a_dead_letter_only(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    failed, done = submit(client, payload={"text": "again"})["id"], submit(client)["id"]
    run(system, conn, failed, "failed", error={"message": "no"})
    run(system, conn, done)

    answer = client.post(f"/api/jobs/{failed}/retry")

    assert answer.status_code == 202
    assert answer.json["retry_of"] == failed != answer.json["id"]
    assert answer.headers["Location"] == f"/api/jobs/{answer.json['id']}"
    assert client.get(f"/api/jobs/{answer.json['id']}").json["payload"]["text"] == "again"
    assert client.get(f"/api/jobs/{failed}").json["error"] == {"message": "no"}
    problem(client.post(f"/api/jobs/{done}/retry"), 409)


def test_attempts_are_listed(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    job = submit(client)
    run(system, conn, job["id"], "retry", error={"message": "busy"})
    run(system, conn, job["id"], result={})

    listed = client.get(f"/api/jobs/{job['id']}/attempts").json["attempts"]

    assert [(a["attempt"], a["outcome"], a["error"]) for a in listed] == [
        (1, "retry", {"message": "busy"}),
        (2, "succeeded", None),
    ]
    problem(client.get(f"/api/jobs/{uuid4()}/attempts"), 404)


def test_a_batch_is_accepted_whole_and_counted(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    jobs = [{"type": "web_echo", "payload": {"number": n}} for n in range(3)]

    answer = client.post("/api/jobs/batch", json={"jobs": jobs}, headers={"Idempotency-Key": "b"})
    again = client.post("/api/jobs/batch", json={"jobs": jobs}, headers={"Idempotency-Key": "b"})
    other = client.post("/api/jobs/batch", json={"jobs": jobs[:2]}, headers={"Idempotency-Key": "b"})
    run(system, conn, answer.json["ids"][0])
    run(system, conn, answer.json["ids"][1], "failed")

    assert answer.status_code == 202
    assert [client.get(f"/api/jobs/{i}").json["payload"]["number"] for i in answer.json["ids"]] == [0, 1, 2]
    assert (again.status_code, again.json) == (202, answer.json)
    assert again.headers["Idempotency-Replayed"] == "true"
    problem(other, 409)
    assert count(conn) == 3
    seen = client.get(answer.headers["Location"]).json
    assert (seen["total"], seen["open"], seen["succeeded"], seen["failed"], seen["finished_at"]) == (3, 1, 1, 1, None)
    problem(client.get(f"/api/batches/{uuid4()}"), 404)


def test_a_batch_with_one_bad_job_is_refused_whole(client: FlaskClient, conn: psycopg.Connection) -> None:
    good = {"type": "web_echo"}

    bad_payload = client.post("/api/jobs/batch", json={"jobs": [good, {**good, "payload": {"number": "one"}}]})
    bad_type = client.post("/api/jobs/batch", json={"jobs": [good, good, {"type": "nope"}]})
    bad_callback = client.post("/api/jobs/batch", json={"jobs": [good, {**good, "callback_url": "ftp://a.example"}]})
    too_many = client.post("/api/jobs/batch", json={"jobs": [good] * 1001})
    none = client.post("/api/jobs/batch", json={"jobs": []})

    assert problem(bad_payload, 422)["errors"][0]["field"] == "jobs.1.payload.number"
    assert problem(bad_type, 422)["errors"][0]["field"] == "jobs.2.type"
    assert problem(bad_callback, 422)["errors"][0]["field"] == "jobs.1.callback_url"
    assert problem(too_many, 422)["errors"][0]["field"] == problem(none, 422)["errors"][0]["field"] == "jobs"
    assert count(conn) == count(conn, "batches") == 0


def test_public_types_are_listed_with_their_schemas(client: FlaskClient) -> None:
    types = {each["name"]: each for each in client.get("/api/job-types").json["job_types"]}

    assert types["web_echo"]["description"] == "Answer what was sent."
    assert types["web_echo"]["payload"]["properties"]["number"]["type"] == "integer"
    assert "ping" in types and "web_secret" not in types


MINE = {"X-Organization": "default"}


def test_another_organizations_rows_do_not_exist(client: FlaskClient, system: System) -> None:
    """For who acts for an organization; the operator without one sees all."""
    theirs = system.submit(2, NewJob("web_echo", {})).job.id

    for answer in (
        client.get(f"/api/jobs/{theirs}", headers=MINE),
        client.get(f"/api/jobs/{theirs}?wait=5", headers=MINE),
        client.get(f"/api/jobs/{theirs}/events", headers=MINE),
        client.get(f"/api/jobs/{theirs}/attempts", headers=MINE),
        client.post(f"/api/jobs/{theirs}/cancel", headers=MINE),
        client.post(f"/api/jobs/{theirs}/retry", headers=MINE),
        client.get(f"/api/videos/task/{theirs}/status", headers=MINE),
    ):
        problem(answer, 404)
    assert client.get("/api/jobs", headers=MINE).json["jobs"] == []


def test_artefacts_in_a_result_get_links_and_other_keys_do_not(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    job = submit(client)
    result = {
        "sheet": {"key": "o/1/sheet.png"},
        "shots": [{"keyframe": {"key": "o/1/a.jpg"}}],
        "theirs": {"key": "o/2/sheet.png"},
        "other": {"key": "o/1/../2/x"},
        "no_artefact": {"key": 5},
    }
    run(system, conn, job["id"], result=result)

    shown = client.get(f"/api/jobs/{job['id']}").json["result"]

    assert shown["sheet"]["url"].startswith("/artefacts/o/1/sheet.png?expires=")
    assert shown["shots"][0]["keyframe"]["url"].startswith("/artefacts/o/1/a.jpg?")
    assert all("url" not in shown[name] for name in ("theirs", "other", "no_artefact"))


def events_of(answer: Any) -> list[dict[str, str]]:
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in fields:
            found.append(fields)
    return found


def test_a_stream_tells_each_change_and_ends_with_the_job(
    client: FlaskClient, system: System, conn: psycopg.Connection
) -> None:
    job = submit(client)

    def live() -> None:
        time.sleep(0.5)
        taken = claim(conn, job["id"])
        system.live.write_progress([((taken.id, taken.fence), Progress(0.1, "reading"))])
        time.sleep(1.3)
        system.live.write_progress([((taken.id, taken.fence), Progress(0.9, "writing"))])
        time.sleep(1.3)
        finish(system, conn, taken, "failed", error={"message": "no"})

    threading.Thread(target=live).start()
    answer = client.get(f"/api/jobs/{job['id']}/events")

    assert answer.headers["Content-Type"].startswith("text/event-stream")
    told = [(e["event"], json.loads(e["data"])) for e in events_of(answer)]
    assert [(name, now["state"], now["stage"]) for name, now in told] == [
        ("state", "queued", None),
        ("state", "running", "reading"),
        ("progress", "running", "writing"),
        ("state", "failed", None),
    ]
    assert told[-1][1]["error"] == {"message": "no"}
    ids = [e["id"] for e in events_of(answer)]
    assert len(set(ids)) == 4
    assert client.get(f"/api/jobs/{job['id']}/events", headers={"Last-Event-ID": ids[-1]}).status_code == 204
    from_there = events_of(client.get(f"/api/jobs/{job['id']}/events", headers={"Last-Event-ID": ids[0]}))
    assert [e["id"] for e in from_there] == ids[-1:]


def test_a_stream_gives_its_seat_back(client: FlaskClient, system: System, conn: psycopg.Connection) -> None:
    seats = client.application.extensions["agentflow"].seats
    job = submit(client)
    run(system, conn, job["id"])

    for _ in range(seats.limit + 1):
        answer = client.get(f"/api/jobs/{job['id']}/events")
        assert answer.status_code == 200 and len(events_of(answer)) == 1
        answer.close()


def test_a_process_that_stops_ends_waits_and_takes_no_new_ones(client: FlaskClient, system: System) -> None:
    job = submit(client)
    threading.Timer(0.3, lambda: setattr(health.of(system), "draining", True)).start()

    began = time.monotonic()
    waited = client.get(f"/api/jobs/{job['id']}?wait=20").json
    stream = client.get(f"/api/jobs/{job['id']}/events")

    assert waited["state"] == "queued"
    assert time.monotonic() - began < 15
    problem(stream, 503)


@pytest.fixture
def away(environment: dict[str, str]) -> Callable[[], FlaskClient]:
    def make() -> FlaskClient:
        system = System(settings.load({**environment, "DATABASE_URL": "postgresql://x@127.0.0.1:1/x"}), "test")
        client = create_app(system).test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {system.admin_key()}"
        return client

    return make


def test_without_the_database_the_answer_is_503_with_retry_after(
    away: Callable[[], FlaskClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentflow.database.POOL_TIMEOUT_S", 0.3)
    client, some = away(), uuid4()

    for answer in (
        client.post("/api/jobs", json={"type": "web_echo"}),
        client.post("/api/jobs/batch", json={"jobs": [{"type": "web_echo"}]}),
        client.get("/api/jobs"),
        client.get(f"/api/jobs/{some}?wait=5"),
        client.get(f"/api/jobs/{some}/events"),
        client.post(f"/api/jobs/{some}/cancel"),
        client.post("/api/videos", data=b"x", content_type="video/mp4"),
        client.post("/api/videos/analyze", json={"video_id": str(some)}),
        client.get("/api/system/stats"),
        client.get("/api/system/queue-stats"),
    ):
        problem(answer, 503)
        assert int(answer.headers["Retry-After"]) > 0
    assert client.get("/health").json["database"]["connected"] is False
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 503
    assert client.get("/metrics").status_code == 200


def test_errors_of_routing_are_problems_too(client: FlaskClient) -> None:
    problem(client.get("/nothing/here"), 404)
    problem(client.get("/api/jobs/not-an-id"), 404)
    problem(client.get(f"/api/jobs/{uuid4()}"), 404)
    wrong_method = client.delete("/api/jobs")
    problem(wrong_method, 405)
    assert set(wrong_method.headers["Allow"].split(", ")) == {"GET", "HEAD", "POST"}


def test_an_error_that_nobody_foresaw_is_500_and_tells_no_secrets(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr("agentflow.jobs.records.search", fail)

    answer = client.get("/api/jobs")

    problem(answer, 500)
    assert "hunter2" not in answer.text
