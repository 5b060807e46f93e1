"""Jobs of any type: hand in, look, wait, list, cancel, try again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from urllib.parse import urlsplit
from uuid import UUID

from flask import Response
from pydantic import AfterValidator, AwareDatetime, BeforeValidator, ConfigDict, Field, Strict

from agentflow.errors import Permanent
from agentflow.jobs import batches, records, registry, requests, unique
from agentflow.jobs.model import HeadStart, Job, Priority, State
from agentflow.jobs.requests import InvalidJob, NewJob
from agentflow.jobs.text import is_storable
from agentflow.settings import Settings
from web import events, outlook
from web.api import Answer, Body, Call, Media, Query, Routes, View
from web.cursors import cursor_of, read_cursor
from web.problems import Refused, invalid

routes = Routes("jobs")

MAX_BATCH: Final = 1000
#: 1000 jobs with small payloads; larger ones go in several batches or by key through storage.
MAX_BATCH_BYTES: Final = 16 << 20
#: Each origin costs a look-up of its name.
MAX_CALLBACK_ORIGINS: Final = 20
_FIRST, _LAST = datetime(1970, 1, 2, tzinfo=UTC), datetime(9998, 1, 1, tzinfo=UTC)


def storable(text: str) -> str:
    if not is_storable(text):
        raise ValueError("holds a NUL character or half of a surrogate pair, which cannot be stored")
    return text


Word = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(storable)]


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic takes false for the 0 of a Literal
        raise ValueError("must be a number")
    return value


class UniqueRequest(Body):
    """Of many requests with one key, of one type, few become jobs; the others answer the job that is there."""

    key: Word = Field(description="What it is about, such as `contact:17`")
    mode: unique.Mode = Field(
        "keep",
        description="`keep`: none while one is queued or running; `throttle`: at most one in `period_s`; `debounce`: one when"
        " nothing came for `period_s`, with the newest request's payload",
    )
    period_s: Annotated[float, Field(gt=0, le=unique.MAX_PERIOD_S)] | None = Field(
        None, description="Seconds, for `throttle` and `debounce`"
    )
    max_wait_s: Annotated[float, Field(gt=0, le=unique.MAX_PERIOD_S)] | None = Field(
        None,
        description="For `debounce`: start so many seconds after the first request at the latest (a day if left out)",
    )


class JobRequest(Body):
    """A request for a job. What is left out comes from its type."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"type": "ping", "payload": {"sleep_ms": 100}, "correlation_id": "mine-1"}]}
    )

    type: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="One of `GET /api/job-types`")
    payload: dict[str, Any] = Field({}, description="The arguments, as the type's schema says")
    priority: Priority | None = None
    head_start_s: Annotated[HeadStart, BeforeValidator(_number)] | None = Field(
        None, description="Comes before your other jobs of its priority as if due so many seconds sooner"
    )
    run_at: Annotated[AwareDatetime, Strict()] | None = Field(None, description="Not before this moment")
    max_attempts: Annotated[int, Field(ge=1, le=1000)] | None = None
    time_limit_s: Annotated[float, Field(ge=0.1, le=86_400)] | None = Field(
        None, description="Seconds for one attempt; at most what the type allows"
    )
    concurrency_key: Word | None = Field(None, description="Jobs with the same key do not run together …")
    concurrency_limit: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="… or at most so many of them (1 if left out)"
    )
    correlation_id: Word | None = Field(None, description="Yours, to find the job by; `then` jobs inherit it")
    callback_url: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="Gets a POST when the job has ended; http(s), a public address"
    )
    unique: UniqueRequest | None = None
    then: Annotated[list[JobRequest], Field(max_length=requests.MAX_THEN_JOBS)] = Field(
        [], description="Jobs to run after this one succeeded"
    )


class BatchRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"jobs": [{"type": "ping"}, {"type": "ping"}]}]})

    jobs: Annotated[list[JobRequest], Field(min_length=1, max_length=MAX_BATCH)]
    callback_url: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None,
        description="Gets one POST with the counts when all jobs of the batch have ended; http(s), a public address",
    )


class SubmitHeaders(Query):
    idempotency_key: Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,253}[!-~])?$")] | None = Field(
        None, alias="Idempotency-Key", description="The same key and request again answer the same job (for a day)"
    )
    prefer: Annotated[str, Field(max_length=200)] | None = Field(
        None, alias="Prefer", description="`wait=10`: answer 200 when the job ends within so many seconds (25 at most)"
    )


class BatchHeaders(Query):
    idempotency_key: Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,253}[!-~])?$")] | None = Field(
        None, alias="Idempotency-Key", description="The same key and request again answer the same batch (for a day)"
    )


class WaitQuery(Query):
    wait: Annotated[float, Field(ge=0, le=25)] = Field(
        0.0, description="Seconds to wait for the job's end; answered at once when too many are waiting"
    )


class ListQuery(Query):
    state: State | None = None
    type: Word | None = None
    correlation_id: Word | None = None
    batch_id: UUID | None = None
    parent_id: UUID | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = Field(None, description="`next_cursor` of the page before")


class StreamHeaders(Query):
    last_event_id: Annotated[str, Field(max_length=200)] | None = Field(
        None, alias="Last-Event-ID", description="The last event that was seen; it is not sent again"
    )


class JobError(View):
    code: str | None = None
    message: str


class JobSummary(View):
    """A job without its payload and result."""

    id: UUID
    organization_id: int
    type: str
    state: State
    queue: str
    priority: Priority
    head_start_s: HeadStart
    attempt: int
    max_attempts: int
    progress: float | None = Field(description="0 to 1")
    stage: str | None
    wait_reason: str | None = Field(description="Why a queued job waits")
    cancel_requested: bool
    error: dict[str, Any] | None
    time_limit_s: float
    run_at: datetime
    concurrency_key: str | None
    correlation_id: str | None
    callback_url: str | None
    parent_id: UUID | None = Field(description="The job (of a batch's callback: the batch) whose end made this one")
    retry_of: UUID | None
    batch_id: UUID | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobView(JobSummary):
    payload: dict[str, Any]
    waiting: outlook.WaitingView | None = Field(description="Why it waits and where it stands, while it is queued")
    estimate: outlook.EstimateView | None = Field(description="When it will start and end, until it has ended")
    result: Any = Field(description="An artefact in it (an object with a `key`) has a `url` that is good for minutes")


class JobList(View):
    jobs: list[JobSummary] = Field(description="The newest first")
    next_cursor: str | None


class AttemptView(View):
    attempt: int
    outcome: str
    worker: UUID | None
    started_at: datetime | None
    ended_at: datetime
    error: dict[str, Any] | None
    usage: dict[str, float] | None = Field(
        description="What it used up: `usd` and `tokens_in`, `tokens_out` as reported, `audio_s` and the like"
    )


class AttemptList(View):
    attempts: list[AttemptView] = Field(description="Those that have ended, the first one first")


class BatchCreated(View):
    batch_id: UUID
    total: int
    ids: list[UUID] = Field(
        description="In the order of the request; of a repeated Idempotency-Key the batch's own that are still kept"
    )


class BatchView(View):
    id: UUID
    total: int
    open: int
    progress: float = Field(description="0 to 1: how many have ended")
    succeeded: int
    failed: int
    cancelled: int
    callback_url: str | None
    created_at: datetime
    finished_at: datetime | None


class JobTypeView(View):
    name: str
    description: str
    queue: str
    priority: Priority
    head_start_s: HeadStart
    max_attempts: int
    time_limit_s: float
    payload: dict[str, Any] = Field(description="JSON Schema of the payload")


class JobTypeList(View):
    job_types: list[JobTypeView]


@routes.post(
    "/api/jobs",
    {202: JobSummary, 200: JobView},
    body=JobRequest,
    headers=SubmitHeaders,
    problems=(409,),
    scope="submit",
)
def submit(call: Call, body: JobRequest, headers: SubmitHeaders) -> Answer:
    """Hand in a job.

    Answered when it is in the database. With `Prefer: wait` and a job that ends in time: 200 and the whole job.
    A payload larger than JOB_PAYLOAD_BYTES is 413. Where another job answers for the request's `unique` key it is answered in its
    place, with the header `Unique`: kept, throttled or debounced.
    """
    _check_callbacks([body], call.system.settings)
    new = _new_job(body, call.system.settings, idempotency_key=headers.idempotency_key)
    submitted = call.system.submit(call.organization_id, new, public_only=True)
    job = submitted.job
    said = {"Location": f"/api/jobs/{job.id}"}
    if submitted.found is not None:
        said["Unique"] = submitted.found
    elif not submitted.created:
        said["Idempotency-Replayed"] = "true"
    seconds = _preferred_wait(headers.prefer)
    if seconds:
        ended, seated = call.services.seats.wait(job, seconds)
        if seated:
            said["Preference-Applied"] = f"wait={seconds}"
        if ended is not None and ended.terminal:
            return Answer(whole(call, ended), 200, said)
        job = ended or job
    return Answer(summary(call, job), 202, said)


@routes.get("/api/jobs", {200: JobList}, query=ListQuery)
def search(call: Call, query: ListQuery) -> JobList:
    """List jobs, the newest first."""
    before = read_cursor(query.cursor) if query.cursor is not None else None
    wanted = records.Filter(query.state, query.type, query.correlation_id, query.batch_id, query.parent_id)
    with call.system.database.connection() as conn:
        jobs = records.search(conn, call.sees, wanted, before=before, limit=query.limit + 1)
    page = jobs[: query.limit]
    return JobList(
        jobs=[summary(call, job, live=False) for job in page],
        next_cursor=cursor_of(page[-1].id) if len(jobs) > query.limit else None,
    )


@routes.get("/api/jobs/<uuid:job_id>", {200: JobView}, query=WaitQuery, problems=(404,))
def show(call: Call, job_id: UUID, query: WaitQuery) -> JobView:
    """Look at a job, or wait for its end."""
    job, _ = call.services.seats.wait(find(call, job_id), query.wait)
    if job is None:
        raise _unknown(job_id)
    return whole(call, job)


@routes.get("/api/jobs/<uuid:job_id>/attempts", {200: AttemptList}, problems=(404,))
def attempts(call: Call, job_id: UUID) -> AttemptList:
    """The attempts of a job that have ended."""
    find(call, job_id)
    with call.system.database.connection() as conn:
        found = records.attempts(conn, job_id, call.sees)
    return AttemptList(
        attempts=[
            AttemptView(
                attempt=a.attempt,
                outcome=a.outcome,
                worker=a.worker,
                started_at=a.started_at,
                ended_at=a.ended_at,
                error=a.error,
                usage=a.usage,
            )
            for a in found
        ]
    )


@routes.post("/api/jobs/<uuid:job_id>/cancel", {200: JobSummary, 202: JobSummary}, scope="manage", problems=(404, 409))
def cancel(call: Call, job_id: UUID) -> Answer:
    """Cancel a job.

    200: it is cancelled; 202: it is running and was told to stop; 409: it has ended otherwise.
    """
    if call.system.cancel(find(call, job_id).organization_id, job_id) is None:
        raise _unknown(job_id)
    job = find(call, job_id)  # as it is now: one that was told to stop may have come to its end by itself
    if job.state in ("succeeded", "failed"):
        raise Refused(409, f"the job has ended already: it {job.state}")
    return Answer(summary(call, job), 200 if job.state == "cancelled" else 202)


@routes.post("/api/jobs/<uuid:job_id>/retry", {202: JobSummary}, scope="manage", problems=(404, 409))
def retry(call: Call, job_id: UUID) -> Answer:
    """Try a failed or cancelled job again, as a new job that points to it by `retry_of`."""
    job = find(call, job_id)
    try:
        with call.system.transaction() as transaction:
            submitted = records.retry(transaction.conn, job, max_payload_bytes=call.system.settings.job_payload_bytes)
            transaction.rings.extend(submitted.rings)
    except records.NotRetryable as error:
        raise Refused(409, str(error)) from None
    new = submitted.job
    return Answer(summary(call, new), 202, {"Location": f"/api/jobs/{new.id}"})


@routes.post("/api/jobs/<uuid:job_id>/run-now", {200: JobSummary}, scope="manage", problems=(404, 409))
def run_now(call: Call, job_id: UUID) -> JobSummary:
    """Let a job that waits for a time (scheduled, a retry, a limit) start now. Pauses, caps and keys hold it as before."""
    organization_id = find(call, job_id).organization_id
    with call.system.transaction() as transaction:
        ring = records.run_now(transaction.conn, organization_id, job_id)
        if ring is None:
            raise Refused(409, "the job does not wait for a time")
        transaction.rings.append(ring)
    return summary(call, find(call, job_id))


@routes.get(
    "/api/jobs/<uuid:job_id>/events",
    {200: Media("text/event-stream", "Events, until the job has ended"), 204: "The end was seen already"},
    headers=StreamHeaders,
    problems=(404,),
)
def stream(call: Call, job_id: UUID, headers: StreamHeaders) -> Response:
    """Follow a job: server-sent events.

    `state` when its state or attempt changes, `progress` when its progress or stage does; each carries both. The stream ends
    after the last state. Reconnecting with `Last-Event-ID` sends what is new since; 204 ends a browser's EventSource.
    503 with Retry-After when too many are following.
    """
    return events.stream(call, find(call, job_id), headers.last_event_id)


@routes.post(
    "/api/jobs/batch",
    {202: BatchCreated},
    body=BatchRequest,
    headers=BatchHeaders,
    problems=(409,),
    scope="submit",
    max_body_bytes=MAX_BATCH_BYTES,
)
def submit_batch(call: Call, body: BatchRequest, headers: BatchHeaders) -> Answer:
    """Hand in up to 1000 jobs: all or none.

    A job that answers for a `unique` key stands among `ids`, but is not counted in the batch.
    """
    _check_callbacks(body.jobs, call.system.settings, "jobs.")
    if body.callback_url is not None:
        check_url(body.callback_url, "callback_url", call.system.settings)
    prepared = []
    for index, each in enumerate(body.jobs):
        try:
            prepared.append(call.system.prepare(call.organization_id, _new_job(each, call.system.settings)))
        except InvalidJob as error:
            raise InvalidJob(f"jobs.{index}.{error.field}", error.problem) from None
        except registry.UnknownType as error:
            raise InvalidJob(f"jobs.{index}.type", str(error)) from None
    with call.system.transaction() as transaction:
        batch = batches.submit(
            transaction.conn,
            call.organization_id,
            prepared,
            idempotency_key=headers.idempotency_key,
            idempotency_hours=call.system.settings.retain_idempotency_hours,
            callback_url=body.callback_url,
        )
        transaction.rings.extend(batch.rings)
    said = {"Location": f"/api/batches/{batch.id}"}
    if not batch.created:
        said["Idempotency-Replayed"] = "true"
    return Answer(BatchCreated(batch_id=batch.id, total=batch.total, ids=batch.ids), 202, said)


@routes.get("/api/batches/<uuid:batch_id>", {200: BatchView}, problems=(404,))
def show_batch(call: Call, batch_id: UUID) -> BatchView:
    """How many jobs of a batch have ended, and how."""
    with call.system.database.connection() as conn:
        batch = records.get_batch(conn, call.sees, batch_id)
    if batch is None:
        raise Refused(404, f"there is no batch {batch_id}")
    done = batch.succeeded + batch.failed + batch.cancelled
    progress = done / batch.total if batch.total else 1.0
    return BatchView(**dataclasses.asdict(batch), open=batch.total - done, progress=progress)


@routes.get("/api/job-types", {200: JobTypeList})
def types(_call: Call) -> JobTypeList:
    """The kinds of jobs that may be handed in, with the schemas of their payloads."""
    return JobTypeList(
        job_types=[
            JobTypeView(
                name=each.name,
                description=each.description,
                queue=each.queue,
                priority=each.priority,
                head_start_s=each.head_start_s,
                max_attempts=each.retry.max_attempts,
                time_limit_s=each.time_limit_s,
                payload=each.payload.model_json_schema(),
            )
            for each in sorted(registry.public(), key=lambda t: t.name)
        ]
    )


def find(call: Call, job_id: UUID) -> Job:
    """Raises Refused with 404."""
    with call.system.database.connection() as conn:
        job = records.get(conn, call.sees, job_id)
    if job is None:
        raise _unknown(job_id)
    return job


def _unknown(job_id: UUID) -> Refused:
    return Refused(404, f"there is no job {job_id}")


def _new_job(body: JobRequest, settings: Settings, *, idempotency_key: str | None = None) -> NewJob:
    text = json.dumps(body.payload, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode(errors="surrogatepass")) > settings.job_payload_bytes:
        raise Refused(
            413,
            f"a payload is larger than {settings.job_payload_bytes} bytes; put large things in storage and send their key",
        )
    if body.concurrency_limit is not None and body.concurrency_key is None:
        raise invalid("concurrency_limit", "needs a concurrency_key")
    return NewJob(
        type=body.type,
        payload=body.payload,
        priority=body.priority,
        head_start_s=body.head_start_s,
        run_at=within_calendars(body.run_at),
        max_attempts=body.max_attempts,
        time_limit_s=body.time_limit_s,
        idempotency_key=idempotency_key,
        concurrency_key=body.concurrency_key,
        concurrency_limit=body.concurrency_limit,
        correlation_id=body.correlation_id,
        callback_url=body.callback_url,
        then=tuple(_new_job(child, settings) for child in body.then),
        unique=unique.Unique(**body.unique.model_dump()) if body.unique else None,
    )


def within_calendars(moment: datetime | None) -> datetime | None:
    """Postgres' and Python's calendars end at different years, and their zones at different hours."""
    return min(max(moment, _FIRST), _LAST).astimezone(UTC) if moment else None


def _check_callbacks(jobs: Iterable[JobRequest], settings: Settings, prefix: str = "") -> None:
    """422 for a callback that the guard would refuse. Each origin is looked at once."""
    from agentflow import fetch  # with its TLS and HTTP modules only where a callback is named

    guard: fetch.Guard | None = None
    seen: set[tuple[str, str]] = set()
    waiting = [(f"{prefix}{index}." if prefix else "", each) for index, each in enumerate(jobs)]
    while waiting:
        path, job = waiting.pop()
        waiting.extend((f"{path}then.{index}.", child) for index, child in enumerate(job.then))
        if job.callback_url is None:
            continue
        guard = guard or fetch.Guard(allow=settings.fetch_allow)
        check_url(job.callback_url, f"{path}callback_url", settings, guard, seen)


def check_url(
    url: str, field: str, settings: Settings, guard: Any = None, seen: set[tuple[str, str]] | None = None
) -> None:
    """422 where a job would refuse to go to `url`. `seen` holds the origins that passed in this request."""
    from agentflow import fetch  # with its TLS and HTTP modules only where a URL is given

    if not is_storable(url):
        raise invalid(field, "holds a NUL character or half of a surrogate pair")
    try:
        origin = urlsplit(url).scheme, urlsplit(url).netloc
    except ValueError:
        raise invalid(field, "is not a URL") from None
    if seen is not None:
        if origin in seen and url.isprintable() and " " not in url:
            return
        if len(seen) >= MAX_CALLBACK_ORIGINS:
            raise invalid(field, f"is of more than {MAX_CALLBACK_ORIGINS} different hosts in one request")
    try:
        fetch.check_url(url, guard or fetch.Guard(allow=settings.fetch_allow))
    except Permanent as error:
        raise invalid(field, str(error)) from None
    if seen is not None:
        seen.add(origin)


def _preferred_wait(prefer: str | None) -> int:
    """RFC 7240: what cannot be understood or done is passed over."""
    match = re.search(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?:$|[,;])", prefer or "", re.IGNORECASE)
    return min(int(match.group(1)), 25) if match else 0


def summary(call: Call, job: Job, *, live: bool = True) -> JobSummary:
    return JobSummary(**_columns(call, job, JobSummary, live=live))


def whole(call: Call, job: Job) -> JobView:
    values = _columns(call, job, JobView, live=True)
    values["waiting"], values["estimate"] = outlook.of(call, job, values["progress"])
    values["result"] = with_links(call, job.result, job.organization_id)
    return JobView(**values)


def _columns(call: Call, job: Job, view: type[JobSummary], *, live: bool) -> dict[str, Any]:
    values = {name: getattr(job, name) for name in view.model_fields if name not in ("waiting", "estimate")}
    if job.concurrency_key is not None:
        values["concurrency_key"] = job.concurrency_key.removeprefix(f"{job.organization_id}:")
    if live and job.state == "running" and (progress := call.services.seats.progress(job)) is not None:
        values["progress"], values["stage"] = progress
    return values


def with_links(call: Call, value: Any, organization_id: int) -> Any:
    """A copy of a result in which each stored artefact of that organization has a link; other keys are left alone."""
    if isinstance(value, list):
        return [with_links(call, each, organization_id) for each in value]
    if not isinstance(value, dict):
        return value
    copy = {name: with_links(call, each, organization_id) for name, each in value.items()}
    for name, link in (("key", "url"), ("thumbnail_key", "thumbnail_url")):
        key = value.get(name)
        if isinstance(key, str) and key.startswith(f"o/{organization_id}/"):
            with suppress(ValueError):  # not a key after all
                copy[link] = call.system.links.sign(key)
    return copy
