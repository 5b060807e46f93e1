"""Callbacks: signed as `standardwebhooks` verifies them, tried along the ladder, logged, replayed; a batch's one."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from flask.testing import FlaskClient
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

import actors  # noqa: F401 - declares the product's types
from actors import deliver_callback as actor
from agentflow import settings, signing
from agentflow.errors import Permanent, Transient
from agentflow.jobs import batches, callbacks, records, registry, retention, settlement, unique
from agentflow.jobs.model import Job, Verdict
from agentflow.jobs.requests import NewJob
from agentflow.secrets import Sealer, Unreadable
from agentflow.system import System
from tests.core_support import ORGANIZATION, claim, pass_time, value
from tests.http_server import Reply, Request, Server, serve
from tests.web_support import AUTH, client, problem
from web import create_app

__all__ = ["client"]

Connection = psycopg.Connection
LADDER_S = (5, 300, 1800, 7200, 18_000, 36_000, 36_000, 36_000, 36_000)


@pytest.fixture
def receiver(environment: dict[str, str]) -> Iterator[Server]:
    with serve() as server:
        environment["FETCH_ALLOW"] = server.netloc
        server.on("/done", Reply(200, b"thanks"))
        yield server


@pytest.fixture
def sender(receiver: Server, environment: dict[str, str]) -> Iterator[System]:
    """A system that may call the receiver."""
    system = System(settings.load(environment), "test")
    yield system
    system.close()


def ended(
    system: System, conn: Connection, url: str, outcome: Any = "succeeded", organization_id: int = ORGANIZATION
) -> Job:
    """A job with a callback that has ended."""
    job = system.submit(organization_id, NewJob("ping", {}, callback_url=url, correlation_id="c")).job
    end(conn, job, outcome)
    return job


def end(conn: Connection, job: Job, outcome: Any = "succeeded") -> None:
    (running,) = claim(conn, uuid4(), job)
    said = (
        {"result": '{"n": 1}'}
        if outcome == "succeeded"
        else {"error": '{"code": "no", "message": "No.", "traceback": "x"}'}
    )
    assert running.worker is not None
    settlement.settle(conn, [Verdict(job.id, running.fence, outcome, **said)], running.worker, lease_s=30.0)


def callback_of(conn: Connection, subject: UUID) -> Job:
    return records.children(conn, subject)[-1]


def attempt(system: System, conn: Connection, callback: Job) -> Exception | None:
    """What a worker does with a due callback: claim it, run its function, write how it went. Returns its error."""
    (running,) = claim(conn, uuid4(), callback)
    assert running.worker is not None
    context: Any = SimpleNamespace(job=running, system=system, check=lambda: None)
    payload = actor.DeliverCallback.model_validate_json(json.dumps(running.payload))
    delay_s = registry.get(running.type).retry.delay_s(running.attempt, random.random())
    failed: Exception | None = None
    try:
        actor.deliver_callback(context, payload)
        verdict = Verdict(running.id, running.fence, "succeeded")
    except Transient as error:
        failed = error
        delay_s = max(delay_s, error.retry_after_s or 0.0)
        verdict = Verdict(running.id, running.fence, "retry", delay_s=delay_s, reason="retry", error="{}")
    except Permanent as error:
        failed = error
        verdict = Verdict(running.id, running.fence, "failed", error="{}")
    settlement.settle(conn, [verdict], running.worker, lease_s=30.0)
    return failed


def verified(request: Request, secret: str) -> Any:
    return Webhook(secret).verify(request.body, dict(request.headers))


def new_secret(conn: Connection, system: System, organization_id: int = ORGANIZATION, **more: Any) -> str:
    with conn.transaction():
        return signing.create_secret(conn, organization_id, system.sealer, **more)[1]


# ---- signatures ----


def test_signatures_are_those_of_the_specification() -> None:
    """The vector of Standard Webhooks' own documentation, and one whose body is not ASCII."""
    for secret, message_id, timestamp, body, signature in (
        (
            *("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330),
            *(b'{"test": 2432232314}', "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="),
        ),
        (
            *("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "msg_2KWPBgLlAfxdpx2AI54pPJ85f4W", 1674087231),
            *('{"name":"Zoë","n":1.0, "ok":true}'.encode(), "v1,FtOA5xapocblipebmQndbR7hor8EWxttze9JMBovCaw="),
        ),
    ):
        said = signing.headers(message_id, timestamp, body, [secret])

        assert said == {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}
    both = signing.headers("m", 1, b"", ["whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX", secret])["webhook-signature"].split()
    assert len(both) == 2 and all(each.startswith("v1,") for each in both)


def test_a_callback_verifies_and_says_what_became_of_the_job(
    sender: System, conn: Connection, receiver: Server
) -> None:
    secret = new_secret(conn, sender)
    good, bad = ended(sender, conn, receiver.url("/done")), ended(sender, conn, receiver.url("/done"), "failed")

    for job in (good, bad):
        assert attempt(sender, conn, callback_of(conn, job.id)) is None

    first, second = receiver.requests
    said = verified(first, secret)
    assert said["type"] == "job.succeeded"
    assert said["data"]["id"] == str(good.id) and said["data"]["result"] == {"n": 1}
    assert said["data"]["correlation_id"] == "c" and said["timestamp"] == said["data"]["finished_at"]
    said = verified(second, secret)
    assert (said["type"], said["data"]["error"]) == ("job.failed", {"code": "no", "message": "No."})
    assert first.headers["webhook-id"] != second.headers["webhook-id"]
    with pytest.raises(WebhookVerificationError):
        verified(first, "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX")
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(first.body.replace(b"succeeded", b"cancelled"), dict(first.headers))


def test_two_secrets_sign_until_the_older_one_ends(sender: System, conn: Connection, receiver: Server) -> None:
    old = new_secret(conn, sender)
    new = new_secret(conn, sender, grace_s=3600)
    attempt(sender, conn, callback_of(conn, ended(sender, conn, receiver.url("/done")).id))
    verified(receiver.requests[0], old)
    verified(receiver.requests[0], new)

    conn.execute("update agentflow.callback_secrets set expires_at = expires_at - interval '1 h'")
    attempt(sender, conn, callback_of(conn, ended(sender, conn, receiver.url("/done")).id))

    verified(receiver.requests[1], new)
    with pytest.raises(WebhookVerificationError):
        verified(receiver.requests[1], old)
    newest = new_secret(conn, sender, grace_s=3600)
    newer = new_secret(conn, sender, grace_s=3600)
    assert signing.live_secrets(conn, ORGANIZATION, sender.sealer) == [newer, newest]  # never more than two


def test_without_a_secret_of_its_organization_a_callback_is_not_signed(
    sender: System, conn: Connection, receiver: Server
) -> None:
    new_secret(conn, sender, 1)
    attempt(sender, conn, callback_of(conn, ended(sender, conn, receiver.url("/done"), organization_id=2).id))

    (request,) = receiver.requests
    assert "webhook-signature" not in request.headers and request.headers["webhook-id"].startswith("msg_")


def test_stored_secrets_are_encrypted_where_there_is_a_key(conn: Connection, environment: dict[str, str]) -> None:
    system = System(settings.load({**environment, "ENCRYPTION_KEY": "k" * 32}), "test")
    secret = new_secret(conn, system)
    (row,) = conn.execute("select sealed, organization_id, id from agentflow.callback_secrets").fetchall()

    assert secret not in row[0] and secret.removeprefix("whsec_") not in row[0] and row[0].startswith("v1.")
    assert signing.live_secrets(conn, ORGANIZATION, system.sealer) == [secret]
    with pytest.raises(Unreadable, match="ENCRYPTION_KEY is not set"):
        signing.live_secrets(conn, ORGANIZATION, Sealer(None))
    with pytest.raises(Unreadable, match="is encrypted under the key"):
        signing.live_secrets(conn, ORGANIZATION, Sealer(b"x" * 32))
    conn.execute("update agentflow.callback_secrets set organization_id = 1, id = gen_random_uuid()")
    with pytest.raises(Unreadable, match="another row"):
        signing.live_secrets(conn, ORGANIZATION, system.sealer)
    assert (
        Sealer(b"k" * 32).open(Sealer(None).seal("x", context="c"), context="c") == "x"
    )  # from before there was a key


def test_a_secret_that_cannot_be_read_sends_nothing_unsigned(
    sender: System, conn: Connection, receiver: Server, environment: dict[str, str]
) -> None:
    new_secret(conn, System(settings.load({**environment, "ENCRYPTION_KEY": "k" * 32}), "test"))

    failed = attempt(sender, conn, callback_of(conn, ended(sender, conn, receiver.url("/done")).id))

    assert isinstance(failed, Transient) and failed.code == "secret_unreadable"
    assert receiver.requests == []


# ---- the ladder ----


def test_a_receiver_that_is_down_for_two_hours_gets_everything_on_the_steps_of_the_ladder(
    sender: System, conn: Connection, receiver: Server
) -> None:
    secret = new_secret(conn, sender)
    receiver.on("/done", Reply(503, b"down for repairs"))
    jobs = [ended(sender, conn, receiver.url("/done"), outcome) for outcome in ("succeeded", "failed") * 3]
    told = {callback_of(conn, job.id).id: job.id for job in jobs}
    passed_s, tries = 0.0, dict.fromkeys(told, 0)

    while any(not callback.terminal for callback in (records.get(conn, 1, i) for i in told) if callback):
        if passed_s >= 7200:
            receiver.on("/done", Reply(204))
        for callback_id in told:
            callback = records.get(conn, ORGANIZATION, callback_id)
            assert callback is not None
            if callback.terminal or callback.run_at > value(conn, "select clock_timestamp()"):
                continue
            before = value(conn, "select clock_timestamp()")
            failed = attempt(sender, conn, callback)
            tries[callback_id] += 1
            after = records.get(conn, ORGANIZATION, callback_id)
            assert after is not None
            if failed is not None:
                step = LADDER_S[tries[callback_id] - 1]
                waits = after.run_at - before
                assert timedelta(seconds=step) <= waits <= timedelta(seconds=step * 1.1 + 30), (tries, waits)
        due = conn.execute(
            "select extract(epoch from min(run_at) - clock_timestamp())::float8 from agentflow.jobs where state = 'queued'"
        ).fetchone()
        assert due is not None
        if due[0] is not None:
            skipped = max(0.0, due[0]) + 0.01
            pass_time(conn, skipped)
            passed_s += skipped
        assert passed_s < 20_000, "it should be over by now"

    # 0 s, 5 s, 5 min, 30 min and 2 h after that: the first step beyond the two hours.
    assert set(tries.values()) == {5} and passed_s > 9300
    received = receiver.requests[-len(jobs) :]
    assert {verified(r, secret)["data"]["id"] for r in received} == {str(job.id) for job in jobs}
    for callback_id, job_id in told.items():
        (callback_view,) = callbacks.of(conn, ORGANIZATION, job_id)
        assert callback_view.id == callback_id and callback_view.state == "succeeded"
        assert [(a.attempt, a.status) for a in callback_view.attempts] == [(n, 503) for n in range(1, 5)] + [(5, 204)]
        assert callback_view.attempts[0].response == "down for repairs"
        assert callback_view.attempts[0].error == "the callback URL answered 503"
    ids = {r.headers["webhook-id"] for r in receiver.requests}
    assert len(ids) == len(jobs)  # the same on each attempt


def test_the_ladder_is_gone_down_once_and_ends() -> None:
    retry = registry.get("deliver_callback").retry

    assert retry.max_attempts == len(LADDER_S) + 1 == 10
    assert tuple(retry.delay_s(n, 0.0) for n in range(1, 10)) == LADDER_S
    assert retry.delay_s(1, 1.0) == pytest.approx(5.5)


@pytest.mark.parametrize(
    ("status", "error", "delay_s"),
    [
        (200, None, 0),
        (204, None, 0),
        (302, Transient, 5),
        (404, Transient, 5),
        (410, Permanent, 0),
        (500, Transient, 5),
    ],
)
def test_what_an_answer_means(
    sender: System, conn: Connection, receiver: Server, status: int, error: type[Exception] | None, delay_s: float
) -> None:
    receiver.on("/done", Reply(status, headers={"Location": receiver.url("/elsewhere")}))
    callback = callback_of(conn, ended(sender, conn, receiver.url("/done")).id)

    failed = attempt(sender, conn, callback)

    assert type(failed) is (error or type(None))
    assert [r.path for r in receiver.requests] == ["/done"]  # a redirect is not followed
    state = "queued" if error is Transient else "failed" if error is Permanent else "succeeded"
    assert callbacks.of(conn, ORGANIZATION, callback.payload["job_id"])[0].state == state


def test_a_receiver_may_ask_for_more_time(sender: System, conn: Connection, receiver: Server) -> None:
    receiver.on("/done", Reply(429, headers={"Retry-After": "120"}))
    callback = callback_of(conn, ended(sender, conn, receiver.url("/done")).id)

    attempt(sender, conn, callback)

    after = records.get(conn, ORGANIZATION, callback.id)
    assert after is not None and after.run_at - value(conn, "select now()") > timedelta(seconds=100)


def test_an_answer_is_kept_as_text_and_cut(sender: System, conn: Connection, receiver: Server) -> None:
    receiver.on("/done", Reply(500, b"\x00\xff" + b"x" * (1 << 20)))
    job = ended(sender, conn, receiver.url("/done"))

    attempt(sender, conn, callback_of(conn, job.id))

    response = callbacks.of(conn, ORGANIZATION, job.id)[0].attempts[0].response
    assert response == "��" + "x" * (callbacks.RESPONSE_CHARACTERS - 2)


def test_the_guard_stands_between_a_callback_and_our_network(system: System, conn: Connection) -> None:
    with serve() as inside:  # nobody allowed it
        job = ended(system, conn, inside.url("/done"))

        failed = attempt(system, conn, callback_of(conn, job.id))

    assert isinstance(failed, Permanent) and inside.requests == [] and inside.connections == 0
    (said,) = callbacks.of(conn, ORGANIZATION, job.id)[0].attempts
    assert said.status is None and said.error == "127.0.0.1 is not a public address"


# ---- the log and replays over HTTP ----


def test_a_replay_says_the_same_under_the_same_id(
    sender: System, conn: Connection, receiver: Server, environment: dict[str, str]
) -> None:
    secret = new_secret(conn, sender)
    http = create_app(sender).test_client()
    http.environ_base["HTTP_AUTHORIZATION"] = AUTH["Authorization"]
    receiver.on("/done", Reply(410))
    job = ended(sender, conn, receiver.url("/done"))
    attempt(sender, conn, callback_of(conn, job.id))
    (first,) = http.get(f"/api/jobs/{job.id}/callbacks").json["callbacks"]
    assert first["state"] == "failed" and first["attempts"][0]["status"] == 410 and first["replay_of"] is None

    receiver.on("/done", Reply(200, b"ok"))
    answer = http.post(f"/api/jobs/{job.id}/callbacks/{first['id']}/replay")
    assert answer.status_code == 202 and answer.json["replay_of"] == first["id"]
    assert attempt(sender, conn, callback_of(conn, job.id)) is None
    again = http.post(f"/api/jobs/{job.id}/callbacks/{answer.json['id']}/replay").json
    assert attempt(sender, conn, callback_of(conn, job.id)) is None

    listed = http.get(f"/api/jobs/{job.id}/callbacks").json["callbacks"]
    assert [c["id"] for c in listed] == [first["id"], answer.json["id"], again["id"]]
    assert [c["state"] for c in listed] == ["failed", "succeeded", "succeeded"]
    assert len({r.headers["webhook-id"] for r in receiver.requests}) == 1 and len(receiver.requests) == 3
    assert verified(receiver.requests[2], secret) == verified(receiver.requests[1], secret)
    problem(http.post(f"/api/jobs/{job.id}/callbacks/{uuid4()}/replay"), 404)
    other = ended(sender, conn, receiver.url("/done"))
    problem(http.post(f"/api/jobs/{other.id}/callbacks/{first['id']}/replay"), 404)  # not that job's
    problem(http.get(f"/api/jobs/{uuid4()}/callbacks"), 404)


def test_a_secret_is_shown_once(client: FlaskClient, conn: Connection, system: System) -> None:
    made = client.post("/api/callback-secrets", json={})
    second = client.post("/api/callback-secrets", json={"grace_s": 60})

    assert (made.status_code, second.status_code) == (201, 201)
    assert made.json["secret"].startswith("whsec_") and made.json["expires_at"] is None
    listed = client.get("/api/callback-secrets")
    assert [s["id"] for s in listed.json["secrets"]] == [second.json["id"], made.json["id"]]
    assert made.json["secret"] not in listed.text and "secret" not in listed.json["secrets"][0]
    assert signing.live_secrets(conn, ORGANIZATION, system.sealer) == [second.json["secret"], made.json["secret"]]


# ---- batches ----


@contextmanager
def batch_of(sender: System, url: str, number: int) -> Iterator[tuple[Any, list[Job]]]:
    prepared = [sender.prepare(ORGANIZATION, NewJob("ping", {})) for _ in range(number)]
    with sender.database.transaction() as conn:
        batch = batches.submit(conn, ORGANIZATION, prepared, callback_url=url)
    with sender.database.connection() as conn:
        yield batch, [job for job in (records.get(conn, ORGANIZATION, i) for i in batch.ids) if job]


def test_a_batch_calls_back_once_at_its_end_with_the_counts(sender: System, conn: Connection, receiver: Server) -> None:
    secret = new_secret(conn, sender)
    http = create_app(sender).test_client()
    http.environ_base["HTTP_AUTHORIZATION"] = AUTH["Authorization"]
    body = {"jobs": [{"type": "ping"}] * 4, "callback_url": receiver.url("/done")}
    batch = http.post("/api/jobs/batch", json=body).json
    url = f"/api/batches/{batch['batch_id']}"
    jobs = [record for record in (records.get(conn, ORGANIZATION, UUID(i)) for i in batch["ids"]) if record]
    end(conn, jobs[0])
    end(conn, jobs[1], "failed")
    sender.cancel(ORGANIZATION, jobs[2].id)
    half = http.get(url).json
    assert (half["open"], half["progress"], half["finished_at"]) == (1, 0.75, None)
    assert half["callback_url"] == receiver.url("/done")
    assert http.get(f"{url}/callbacks").json == {"callbacks": []}

    end(conn, jobs[3])

    assert http.get(url).json["progress"] == 1.0
    (told,) = http.get(f"{url}/callbacks").json["callbacks"]
    assert attempt(sender, conn, callback_of(conn, UUID(batch["batch_id"]))) is None
    (request,) = receiver.requests
    said = verified(request, secret)
    assert said["type"] == "batch.finished"
    counts = {"total": 4, "succeeded": 2, "failed": 1, "cancelled": 1}
    assert {**said["data"], "created_at": ""} == {"id": batch["batch_id"], "created_at": "", **counts}
    replayed = http.post(f"{url}/callbacks/{told['id']}/replay").json
    assert replayed["replay_of"] == told["id"]
    problem(http.get(f"/api/batches/{uuid4()}/callbacks"), 404)


def test_a_batch_whose_jobs_end_in_one_statement_calls_back_once(sender: System, conn: Connection) -> None:
    with batch_of(sender, "http://caller.example/", 5) as (batch, jobs):
        worker = uuid4()
        running = claim(conn, worker, *jobs)
        verdicts = [Verdict(job.id, job.fence, "succeeded") for job in running]
        settlement.settle(conn, verdicts, worker, lease_s=30.0)
        settlement.settle(conn, verdicts, worker, lease_s=30.0)

    assert [c.type for c in records.children(conn, batch.id)] == ["deliver_callback"]


def test_a_batch_of_nothing_new_calls_back_at_once(sender: System, conn: Connection) -> None:
    new = NewJob("ping", {}, unique=unique.Unique("k"))
    sender.submit(ORGANIZATION, new)
    with sender.database.transaction() as c:
        batch = batches.submit(
            c, ORGANIZATION, [sender.prepare(ORGANIZATION, new)], callback_url="http://caller.example/"
        )

    assert len(records.children(conn, batch.id)) == 1


def test_a_batch_is_kept_until_its_callback_was_told(sender: System, conn: Connection, receiver: Server) -> None:
    with batch_of(sender, receiver.url("/done"), 1) as (batch, jobs):
        end(conn, jobs[0])
    conn.execute("update agentflow.batches set finished_at = finished_at - interval '30 days'")
    assert retention.delete_batches(conn, hours=1) == 0
    assert attempt(sender, conn, callback_of(conn, batch.id)) is None

    assert retention.delete_batches(conn, hours=1) == 1


def test_a_callback_whose_job_is_gone_is_no_error(sender: System, conn: Connection, receiver: Server) -> None:
    job = ended(sender, conn, receiver.url("/done"))
    callback = callback_of(conn, job.id)
    conn.execute("delete from agentflow.jobs where id = %s", (job.id,))

    assert attempt(sender, conn, callback) is None
    assert receiver.requests == []


def test_the_time_of_signing_is_that_of_the_attempt(sender: System, conn: Connection, receiver: Server) -> None:
    """A receiver refuses what was signed minutes ago: each attempt is signed anew."""
    secret = new_secret(conn, sender)
    receiver.on("/done", Reply(500), Reply(200))
    callback = callback_of(conn, ended(sender, conn, receiver.url("/done")).id)
    attempt(sender, conn, callback)
    first = int(receiver.requests[0].headers["webhook-timestamp"])
    pass_time(conn, 6)
    while int(time.time()) == first:
        time.sleep(0.05)

    attempt(sender, conn, callback)

    assert int(receiver.requests[1].headers["webhook-timestamp"]) > first
    verified(receiver.requests[1], secret)
