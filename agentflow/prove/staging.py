"""A system by its URL: load and checks over the API alone. Nothing is killed, and only the product's own `ping` is handed in."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import httpx2

import agentflow
from agentflow.prove import checker, report
from agentflow.prove.checker import ENDS, Evidence, Violation
from agentflow.prove.history import Row
from agentflow.prove.load import Load
from agentflow.prove.plan import Options
from agentflow.prove.requests import Requests
from agentflow.prove.run import CannotRun, Say

_PAGE: Final = 100
_QUIET_EVERY_S: Final = 1.0


def prove(options: Options, url: str, admin_key: str, say: Say = lambda _: None) -> dict[str, Any]:
    """Raises CannotRun when nobody answers there, or refuses the key."""
    options.out.mkdir(parents=True, exist_ok=True)
    headers = {"Authorization": f"Bearer {admin_key}"}
    with httpx2.Client(base_url=url, headers=headers, timeout=30) as client:
        try:
            answer = client.get("/api/job-types")
        except httpx2.TransportError as error:
            raise CannotRun(f"nobody answers at {url}: {error}") from error
        if answer.status_code != 200:
            raise CannotRun(f"{url} answered {answer.status_code}; is ADMIN_API_KEY its operator's key?")
        began = datetime.now(UTC)
        # Keys of earlier runs with the same seed are remembered there for a day.
        requests = Requests(options.seed, None, [], run=f"{began:%Y%m%dT%H%M%S}")
        load = Load(
            url,
            admin_key,
            requests,
            jobs_per_minute=options.jobs_per_minute,
            seconds=options.seconds,
            journal=options.out / "submissions.jsonl",
        )
        load.start()
        say(f"{options.jobs_per_minute:g} jobs a minute for {options.minutes:g} minutes")
        load.finish()
        ended = datetime.now(UTC)
        ids = sorted({promise.id for promise in load.accepted})
        say(f"{len(ids)} jobs accepted; waiting for their ends")
        rows = _wait_ended(client, ids, options.quiet_s, say)
        evidence = Evidence(
            rows=rows, batches=[], limits={}, accepted=load.accepted, deliveries=[], seen=load.violations
        )
        found = [*evidence.seen, *checker.check_promises(evidence), *_unended(evidence), *_chains(client, evidence)]
    counted = Counter(violation.field for violation in found)
    wrong = {name: counted[name] for name in ("lost", "stuck", "recorded_twice", "broken_rules")}
    states = Counter(row.state for row in rows.values())
    made = {
        "verdict": report.WRONG if any(wrong.values()) else report.OK,
        "version": agentflow.__version__,
        "url": url,
        "seed": options.seed,
        "minutes": options.minutes,
        "began": began.isoformat(timespec="seconds"),
        "accepted": len(ids),
        "requests_never_answered": load.unanswered,
        "jobs_per_minute": round(len(ids) / max((ended - began).total_seconds() / 60, 1e-9)),
        "finished": {state: states[state] for state in ("succeeded", "failed", "cancelled")},
        "wrong": wrong,
        "violations": report.by_rule(found),
    }
    (options.out / "report.json").write_text(json.dumps(made, indent=2) + "\n")
    return made


def _wait_ended(client: httpx2.Client, ids: Sequence[UUID], quiet_s: float, say: Say) -> dict[UUID, Row]:
    """The jobs as the API shows them, once all have ended or for `quiet_s` none more has."""
    rows: dict[UUID, Row] = {}
    left = list(ids)
    last_change = time.monotonic()
    while left and time.monotonic() - last_change < quiet_s:
        still = []
        for id_ in left:
            document = _get(client, f"/api/jobs/{id_}")
            if document is None:
                continue
            rows[id_] = _row(document)
            if rows[id_].state not in ENDS:
                still.append(id_)
        if len(still) < len(left):
            last_change = time.monotonic()
        left = still
        if left:
            say(f"waiting for quiet: {len(left)} jobs are open")
            time.sleep(_QUIET_EVERY_S)
    return rows


def _get(client: httpx2.Client, path: str) -> dict[str, Any] | None:
    """None: 404. Raises CannotRun after a minute without an answer."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            answer = client.get(path)
            if answer.status_code == 404:
                return None
            if answer.status_code == 200:
                return dict(answer.json())
        except httpx2.TransportError:
            pass
        time.sleep(0.5)
    raise CannotRun(f"{path} was not answered for a minute")


def _row(document: dict[str, Any]) -> Row:
    """A job as the API tells it; what it does not tell is not checked."""

    def moment(name: str) -> datetime | None:
        return datetime.fromisoformat(document[name]) if document[name] else None

    return Row(
        id=UUID(document["id"]),
        type=document["type"],
        state=document["state"],
        attempt=document["attempt"],
        max_attempts=document["max_attempts"],
        crashes=0,
        fence=0,
        parent_id=None,
        batch_id=UUID(document["batch_id"]) if document["batch_id"] else None,
        idempotency_key=None,
        has_callback=False,
        then_jobs=0,
        attempts_recorded=0,
        retries=0,
        created_at=datetime.fromisoformat(document["created_at"]),
        started_at=moment("started_at"),
        finished_at=moment("finished_at"),
        error=(document["error"] or {}).get("message"),
    )


def _unended(evidence: Evidence) -> list[Violation]:
    return [Violation("not ended", row.id, row.state) for row in evidence.rows.values() if row.state not in ENDS]


def _chains(client: httpx2.Client, evidence: Evidence) -> list[Violation]:
    """The load's chains have two next jobs each, and only after success."""
    found = []
    for id_ in {promise.id for promise in evidence.accepted if promise.kind == "chain"}:
        row = evidence.rows.get(id_)
        if row is None or row.state not in ENDS:
            continue
        listed = _get(client, f"/api/jobs?parent_id={id_}&limit={_PAGE}")
        count, wanted = len((listed or {"jobs": []})["jobs"]), 2 if row.state == "succeeded" else 0
        if count != wanted:
            found.append(Violation("a next job missing or too much", id_, f"{count} of {wanted} after it {row.state}"))
    return found
