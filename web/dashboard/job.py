"""One job: why it waits and when it will start, its attempts on a time line, what went in and came out, and what can be done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from flask import Response, request

from agentflow.jobs import callbacks, lines, records
from agentflow.jobs.model import Attempt, Job
from web import jobs as api
from web import outlook
from web.dashboard import pictures, shown
from web.dashboard.frame import Pages, Visit
from web.dashboard.words import say
from web.problems import invalid

pages = Pages()

_MOST_CHILDREN: Final = 50
_WIDTH: Final = 1000.0
#: What the time line is drawn with, so that a short attempt among long waits is seen.
_LEAST_WIDTH: Final = 4.0


@dataclass(frozen=True, slots=True)
class Step:
    """A stretch of the job's life: it waited or ran, `why` and with what outcome. `x` and `width` of 1000, on the time line."""

    kind: str  # wait, run
    outcome: str
    why: str
    began: datetime
    seconds: float
    attempt: Attempt | None = None
    ongoing: bool = False
    x: float = 0.0
    width: float = 0.0


@pages.get("/jobs/<uuid:job_id>")
def job(visit: Visit, job_id: UUID) -> Response:
    found = api.find(visit, job_id)
    if request.args.get("part") == "log":
        return visit.part("job_log.html", job=found, **_log(visit, found))
    with visit.system.database.connection() as conn:
        attempts = records.attempts(conn, job_id, visit.sees)
    progress = visit.services.seats.progress(found)
    waiting, estimate = outlook.of(visit, found, progress.fraction if progress else None)
    values: dict[str, Any] = {
        "job": found,
        "progress": progress,
        "waiting": waiting,
        "estimate": estimate,
        "pause": visit.system.rules.now().pause_of(found.organization_id, found.queue, found.type) if waiting else None,
        "steps": steps(found, attempts, waiting.reason if waiting else None),
        "usage": _usage(attempts),
        "reason_in_words": reason_in_words,
    }
    if request.args.get("part") == "state":
        if found.terminal:  # there is more to show now than this part
            return Response(status=204, headers={"HX-Refresh": "true"})
        return visit.part("job_state.html", **values)
    result = api.with_links(visit, found.result, found.organization_id)
    return visit.page(
        "job.html",
        **values,
        **_around(visit, found),
        **_log(visit, found),
        result=result,
        pictures=pictures.of(visit, found),
        artefacts=shown.artefacts(result),
        curl=shown.curl(found),
    )


@pages.post("/jobs/<uuid:job_id>/cancel", scope="manage")
def cancel_job(visit: Visit, job_id: UUID) -> Response:
    answer = api.cancel(visit, job_id)
    said = say("The job is cancelled.") if answer.status == 200 else say("The job runs and was told to stop.")
    return visit.go("job", job_id=job_id, said=said)


@pages.post("/jobs/<uuid:job_id>/retry", scope="manage")
def retry_job(visit: Visit, job_id: UUID) -> Response:
    answer = api.retry(visit, job_id)
    new: Any = answer.model
    return visit.go("job", job_id=new.id, said=say("This is the new job, which does the work again."))


@pages.post("/jobs/<uuid:job_id>/run-now", scope="manage")
def run_job_now(visit: Visit, job_id: UUID) -> Response:
    api.run_now(visit, job_id)
    return visit.go("job", job_id=job_id, said=say("The job is due now."))


def _around(visit: Visit, job: Job) -> dict[str, Any]:
    """Its chain, its batch, and the jobs that were made of it."""
    with visit.system.database.connection() as conn:
        first = records.first_of_chain(conn, job)
        chain = records.chains(conn, visit.sees, [first]).get(first, [])
        batch = records.get_batch(conn, visit.sees, job.batch_id) if job.batch_id else None
        told = callbacks.of(conn, visit.sees, job.id)
        again = (
            records.search(conn, job.organization_id, records.Filter(retry_of=job.id), limit=_MOST_CHILDREN)
            if job.terminal
            else []
        )
    return {"chain": chain if len(chain) > 1 else [], "batch": batch, "callbacks": told, "retries": again}


def _log(visit: Visit, job: Job) -> dict[str, Any]:
    """What its code logged, from a level on. There are never more lines than a page holds."""
    asked = request.args.get("level", "info")
    level = next((each for each in lines.LEVELS if each == asked), None)
    if level is None:
        raise invalid("level", f"is one of {', '.join(lines.LEVELS)}", "query")
    with visit.system.database.connection() as conn:
        return {"lines": lines.of(conn, job, least=level), "level": level, "levels": list(lines.LEVELS)}


def _usage(attempts: list[Attempt]) -> dict[str, float]:
    total: dict[str, float] = {}
    for attempt in attempts:
        for name, amount in (attempt.usage or {}).items():
            total[name] = total.get(name, 0.0) + amount
    return total


# ---- the time line ----


def steps(job: Job, attempts: list[Attempt], reason: str | None) -> list[Step]:
    """What happened one after the other: waiting and running in turn, up to now."""
    found: list[Step] = []
    at, why = job.created_at, say("Waited for its turn")
    for attempt in attempts:
        if attempt.started_at is not None:
            found.append(Step("wait", "wait", why, at, (attempt.started_at - at).total_seconds()))
            ran_s = (attempt.ended_at - attempt.started_at).total_seconds()
            found.append(Step("run", attempt.outcome, outcome_in_words(attempt), attempt.started_at, ran_s, attempt))
        at, why = attempt.ended_at, _why_it_waited(attempt)
    now = shown.now()
    if job.state == "running" and job.started_at is not None:
        found.append(Step("wait", "wait", why, at, (job.started_at - at).total_seconds()))
        found.append(
            Step("run", "running", say("Runs"), job.started_at, (now - job.started_at).total_seconds(), ongoing=True)
        )
    elif job.state == "queued":
        text = reason_in_words(reason) if reason else why
        found.append(Step("wait", "waiting", text, at, (now - at).total_seconds(), ongoing=True))
    elif not found and job.finished_at is not None:  # cancelled before anybody took it
        found.append(
            Step("wait", "cancelled", say("Waited, and was cancelled"), at, (job.finished_at - at).total_seconds())
        )
    return _placed([step for step in found if step.seconds >= 0.0005 or step.kind == "run"])


def _placed(found: list[Step]) -> list[Step]:
    total = sum(max(0.0, step.seconds) for step in found) or 1.0
    widths = [max(_LEAST_WIDTH, _WIDTH * max(0.0, step.seconds) / total) for step in found]
    scale = _WIDTH / sum(widths) if widths else 1.0
    placed, x = [], 0.0
    for step, width in zip(found, widths, strict=True):
        placed.append(replace(step, x=round(x * scale, 2), width=round(width * scale, 2)))
        x += width
    return placed


def outcome_in_words(attempt: Attempt) -> str:
    return {
        "succeeded": say("Succeeded"),
        "failed": say("Failed for good"),
        "cancelled": say("Cancelled"),
        "retry": say("Failed, to be tried again"),
        "wait": say("Gave way, without spending an attempt"),
        "handback": say("Handed back: its worker was stopping"),
        "crashed": say("Its worker died or fell silent"),
    }.get(attempt.outcome, attempt.outcome)


def _why_it_waited(attempt: Attempt) -> str:
    code = str((attempt.error or {}).get("code") or "")
    if attempt.outcome == "wait":
        return say("Waited: {code}", code=code) if code else say("Waited for something outside")
    return {
        "retry": say("Waited longer after each failure, before the next try"),
        "handback": say("Waited for another worker"),
        "crashed": say("Waited before another worker took it"),
    }.get(attempt.outcome, say("Waited for its turn"))


def reason_in_words(reason: str) -> str:
    return {
        "due": say("It is due, and next when its turn comes"),
        "busy": say("As many run as may at once: of its key, its type or its organization"),
        "scheduled": say("It was asked to start later"),
        "retry": say("Its last attempt failed; the next one comes later"),
        "limit": say("A provider's limit of calls is used up for now"),
        "budget": say("The day's budget of the organization is used up"),
        "memory": say("No worker has the memory that it needs now"),
        "paused": say("It is paused, until somebody resumes it"),
        "unserved": say("No worker serves its queue"),
        "handback": say("Its worker was stopping; another one takes it"),
        "crashed": say("Its worker died; it is tried again after a pause"),
        "wait": say("It waits for something outside"),
    }.get(reason, say("It waits: {reason}", reason=reason))
