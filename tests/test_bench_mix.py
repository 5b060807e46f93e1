"""The parts of ops/bench/mix.py: what it hands in, how it says what became of it, and who hands it in."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4
from xml.etree import ElementTree

import psycopg
import pytest

import actors  # noqa: F401 - registers the job types
from agentflow import embedded, settings
from agentflow.prove.clip import write_clip
from agentflow.system import System
from ops.bench import mix
from ops.bench.mixing import judging, letters, system
from ops.bench.mixing.letters import Customer
from ops.bench.mixing.load import Load, Plan, Span
from ops.bench.mixing.system import Child
from tests import core_support, http_server
from tests.http_server import Reply, Request
from web import create_app

CUSTOMER = Customer("key", str(uuid4()), (1, 2), ("/bot", "s1"), ("/pay", "s2"), ("/on", "s3"), "/crm")
NOTHING_DONE: dict[str, Any] = Counter()


@pytest.fixture(scope="module")
def url(stack: embedded.Embedded) -> Iterator[str]:
    with core_support.database(stack) as made:
        yield made


@pytest.fixture(scope="module")
def accepted(
    url: str, stack: embedded.Embedded, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, list[str]]]:
    """A letter of each kind, handed in by the API's own ways with the outside services there: the ids by kind."""
    folder = tmp_path_factory.mktemp("mix")
    vendors = Child("ops.bench.mixing.vendors", str(folder), "1", "1", log=folder / "vendors.log")
    try:
        places = vendors.read(60)
        crm = places["kommo"][0]
        environment = {
            "AGENTFLOW_ENV": "test",
            "AGENTFLOW_HOME": str(folder),
            "DATABASE_URL": url,
            "REDIS_URL": stack.redis_url,
            "STORAGE_URL": (folder / "storage").as_uri(),
            "STORAGE_SHARED": "true",
            "JOB_QUEUE_NAME": f"mix-{uuid4().hex[:8]}",
            "ADMIN_API_KEY": system.ADMIN_KEY,
            "ENCRYPTION_KEY": uuid4().hex,
            "OPENROUTER_API_KEY": "sk-or-v1-0123456789abcdef0123456789abcdef",
            "OPENROUTER_BASE_URL": places["openrouter"],
            "FETCH_ALLOW": f"{crm['host']},{places['receiver_host']}",
        }
        started = System.start(settings.load(environment), "web")
        client = create_app(started).test_client()

        def make(path: str, slug: str, body: dict[str, Any]) -> dict[str, Any]:
            headers = {"Authorization": f"Bearer {system.ADMIN_KEY}", **({"X-Organization": slug} if slug else {})}
            answer = client.post(path, json=body, headers=headers)
            assert answer.status_code == 201, answer.text
            return dict(answer.json)

        def post(path: str, body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
            answer = client.post(path, data=body, headers={"Content-Type": "application/json", **headers})
            assert answer.status_code in (200, 201, 202), (path, answer.text)
            return dict(answer.json)

        customer = system.customer("customer-1", crm, places["receiver"], make)
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("delete from agentflow.jobs")  # the account's first sync
        clip = write_clip(folder / "clip.mp4", 1).read_bytes()
        yield {
            kind.name: letters.hand_in(kind.name, number, customer, clip, post)
            for number, kind in enumerate(letters.KINDS)
        }
        started.close()
    finally:
        vendors.close()


def journal(folder: Path, accepted: Mapping[str, list[str]]) -> Path:
    path = folder / "journal"
    what = {kind.name: "event" if kind.events else "job" for kind in letters.KINDS}
    path.write_text("".join(f"{kind}\t{what[kind]}\t{id_}\n" for kind, ids in accepted.items() for id_ in ids))
    return path


# ---- what comes in ----


def test_rates_make_the_jobs_that_are_asked_for_and_most_of_them_are_short() -> None:
    made = Counter[str]()
    for name, per_s in letters.rates(116).items():
        made.update({type_: per_s * count for type_, count in letters.BY_NAME[name].makes.items()})  # type: ignore[misc]

    assert sum(made.values()) == pytest.approx(116)
    assert set(made) == {
        "handle_webhook", "ping", "forward_webhook", "write_crm", "generate_embeddings", "extract_graph", "comfy_render",
        "analyze_video",
    }  # fmt: skip
    assert made["handle_webhook"] + made["ping"] + made["forward_webhook"] > 0.9 * 116
    assert letters.shares()["ping"] == pytest.approx(made["ping"] / 116)


def test_the_surge_is_in_the_middle_and_rates_follow_it() -> None:
    options = Namespace(minutes=60, surge_minutes=15, rate=116.0, surge=4.0)
    found = mix.spans(options)

    assert [span.end_s / 60 for span in found] == [22, 37, 60]
    assert found[1].rates["short job"] == pytest.approx(4 * found[0].rates["short job"])
    assert found[0].rates == found[2].rates


def test_each_kind_is_taken_in_by_the_api_and_makes_the_jobs_that_it_says(
    accepted: dict[str, list[str]], url: str
) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        types = dict(conn.execute("select id::text, type from agentflow.jobs").fetchall())
        events = dict(conn.execute("select id::text, job_id::text from agentflow.webhook_events").fetchall())

    for kind in letters.KINDS:
        ids = accepted[kind.name]
        first = [types[events[id_]] if kind.events else types[id_] for id_ in ids]
        # What follows is made by the first ones: by an event's job, or after a document was read.
        assert first == [next(iter(kind.makes))] * (len(ids) if kind.name == "batch" else 1), kind.name
    assert len(accepted["batch"]) == letters.BATCH


# ---- who hands in ----


def plan(folder: Path, port: int, rates: dict[str, float], seconds: float) -> Plan:
    (folder / "clip").write_bytes(b"")
    for name in ("journal", "figures"):
        (folder / name).touch()
    paths = {name: str(folder / name) for name in ("clip", "journal", "figures")}
    return Plan(port, time.time() + 0.2, [Span(seconds, rates)], [CUSTOMER], **paths)


def test_who_hands_in_repeats_what_was_not_taken_and_says_what_was_refused(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def take(request: Request) -> Reply:
        key = request.headers["idempotency-key"]
        seen[key] += 1
        if key.endswith("3"):
            return Reply(422, b"a wrong type")
        return Reply(503) if seen[key] == 1 and key.endswith("5") else Reply(202, json.dumps({"id": key}).encode())

    with http_server.serve() as server:
        server.on("/api/jobs", take)
        made = plan(tmp_path, server.port, {"short job": 40.0}, 1.5)
        Load(made).run()

    (said,) = [json.loads(line) for line in (tmp_path / "figures").read_text().splitlines()]
    lines = [line.split("\t") for line in (tmp_path / "journal").read_text().splitlines()]
    refused = [key for key in seen if key.endswith("3")]
    again = [key for key in seen if key.endswith("5")]
    assert refused and again and len(seen) > 20
    assert {line[2] for line in lines} == seen.keys() - set(refused) and len(lines) == len(seen) - len(refused)
    assert {tuple(line[:2]) for line in lines} == {("short job", "job")}
    assert said["given_up"] == {"short job": len(refused)} and "a wrong type" in said["refused"][0]
    assert said["troubles"] == {"422": len(refused), "503": len(again)} and all(seen[key] == 2 for key in again)
    assert said["jobs"] == len(lines) and said["accept_ms"]["max"] >= 500 > 0 < said["accept_ms"]["p50"]


# ---- what became of it ----


def test_what_has_not_ended_or_is_not_there_is_lost(accepted: dict[str, list[str]], url: str, tmp_path: Path) -> None:
    gone = {**accepted, "short job": [str(uuid4())], "payment event": [str(uuid4())]}
    with psycopg.connect(url, autocommit=True) as conn:
        lost = judging.audit(conn, journal(tmp_path, gone), NOTHING_DONE)["lost"]

    assert "short job: 1 of 1 were accepted and are not there" in lost
    assert "payment event: 1 of 1 were accepted and are not there" in lost
    assert "batch: 50 jobs (ping) are queued still" in lost
    assert "CRM event: 1 events have the outcome none, and their job is queued" in lost
    assert "document with graph: 1 of 1 graphs were not made" in lost


def test_what_ended_once_is_well_and_what_ended_twice_is_not(
    accepted: dict[str, list[str]], url: str, tmp_path: Path
) -> None:
    done = {"notes": 1, "renders": 1, "forwarded": 1, "notes_twice": 0, "renders_twice": 0}
    with psycopg.connect(url) as conn:  # rolled back
        end_all(conn, accepted)
        well = judging.audit(conn, journal(tmp_path, accepted), done)
        conn.execute("drop table accepted")
        conn.execute(
            "insert into agentflow.attempts (job_id, fence, attempt, outcome) values (%s, 2, 1, 'failed')",
            (accepted["render"][0],),
        )
        conn.execute("delete from agentflow.jobs where id = any (%s::uuid[])", (accepted["batch"][:3],))
        twice = judging.audit(conn, journal(tmp_path, accepted), {**done, "renders": 0, "notes_twice": 2})
        conn.rollback()

    assert well["lost"] == [] and well["failures"] == []
    assert all(each["succeeded"] == each["accepted"] for each in well["accepted"].values())
    assert sorted(twice["lost"]) == [
        "batch: 3 of 50 were accepted and are not there",
        "notes: 2 were done twice",
        "of 1 jobs not each claim has one end, or they ended twice",
        "render: 1 of 1 are done by their rows, and 0 outside",
    ]


def end_all(conn: psycopg.Connection[Any], accepted: Mapping[str, list[str]]) -> None:
    """As workers would have left it."""
    made = (
        "insert into agentflow.jobs (id, organization_id, type, queue, max_attempts, time_limit_s, wake_at, parent_id)"
        " values (%s, 1, %s, 'default', 5, 60, now(), %s)"
    )
    for kind, type_ in (("bot message", "ping"), ("forwarded event", "forward_webhook")):
        action = uuid4()
        conn.execute(made, (action, type_, None))
        conn.execute(
            "update agentflow.webhook_events set action_job_id = %s where id = %s", (action, accepted[kind][0])
        )
    conn.execute(made, (uuid4(), "extract_graph", accepted["document with graph"][0]))
    conn.execute(
        "update agentflow.jobs set state = 'succeeded', wake_at = null, attempt = 1, fence = 1, started_at = now(),"
        " finished_at = now()"
    )
    conn.execute("update agentflow.webhook_events set outcome = 'done', handled_at = now()")


# ---- targets ----


def figures(minutes: int, *, growth: float = 0.0, pickup_ms: float = 20.0) -> dict[str, Any]:
    def sample(minute: int) -> dict[str, Any]:
        mb = {"pss_mb": 100 + growth * minute, "filled_mb": 60 + growth * minute}
        short = {"p50": 3.0, "p95": 9.0, "p99": pickup_ms if minute == 7 else 20.0}
        return {
            "minute": minute,
            "processes": {
                "web": mb,
                "worker 1": dict(mb),
                "worker 1, encoder": {"pss_mb": minute, "filled_mb": minute},
            },
            "servers": {"postgres": 50.0, "valkey": 5.0, "rabbitmq": 90.0},
            "cpu": {"web": 0.5, "others": 0.1},
            "connections": {"agentflow web": 3},
            "tables": {"jobs": {"dead": 7}},
            "jobs": {"short_pickup_ms": short, "by_type": {"ping": {"ended": 60}}},
        }

    accept = {"p50": 5.0, "p95": 8.0, "p99": 30.0}
    load = [
        {"minute": m, "jobs": 7000, "accept_ms": accept, "behind_ms": {"p99": 1.0}, "unsent": 0, "given_up": {}}
        for m in range(minutes)
    ]
    audit = {"lost": [], "rows": {"ping": {"succeeded": 9}}, "accepted": {"batch": {"accepted": 9, "succeeded": 9}}}
    return {
        "samples": [sample(m) for m in range(minutes)],
        "load": load,
        "audit": audit,
        "minutes": minutes,
        "planned": 7000 * minutes,
    }


def test_targets_are_judged_by_every_minute_and_memory_by_its_ends() -> None:
    well, slow, grown = (
        judging.verdict(each) for each in (figures(40), figures(40, pickup_ms=1500), figures(40, growth=0.3))
    )
    short = judging.verdict(figures(3))
    cut = judging.verdict({**figures(40), "audit": None})
    less = judging.verdict({**figures(40), "planned": 400_000})

    assert all(well["kept"].values()) and not well["memory"]["web"]["grown"]
    assert [name for name, kept in slow["kept"].items() if not kept] == [
        "pick-up of short jobs, p99 below 1000 ms in every minute"
    ]
    assert slow["worst"]["pick-up"] == {"minute": 7, "p99_ms": 1500}
    assert not grown["kept"]["memory is flat"] and "worker 1, encoder" not in grown["memory"]
    assert short["kept"]["memory is flat"] is None
    assert not cut["kept"]["nothing lost"]
    assert not less["kept"]["as much was handed in as was planned"]


def test_a_run_is_drawn_and_told() -> None:
    made = figures(30)
    made["verdict"] = judging.verdict(made)

    drawn = ElementTree.fromstring(mix.chart(made))  # noqa: S314 - our own
    said = "\n".join(judging.table(made))

    points = [len(line.attrib["points"].split()) for line in drawn.iter("{http://www.w3.org/2000/svg}polyline")]
    assert {"handed in", "p99", "web", "worker 1", "postgres"} <= {"".join(each.itertext()) for each in drawn}
    assert len(points) == 2 + 3 + 3 + 3 + 3 + 2 + 1 + 1 and set(points) == {30}
    assert "batch" in said and "nothing lost" in said and "NOT KEPT" not in said
