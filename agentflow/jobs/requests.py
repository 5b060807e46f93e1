"""Requests for jobs: checked against their type, without the database."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from pydantic import ValidationError

from agentflow.ids import new_id
from agentflow.jobs import registry
from agentflow.jobs.model import HEAD_STARTS, PRIORITIES, HeadStart, Priority
from agentflow.jobs.text import is_storable
from agentflow.jobs.unique import MAX_PERIOD_S, Unique

MAX_THEN_DEPTH: Final = 8
MAX_THEN_JOBS: Final = 50
MAX_KEY_BYTES: Final = 1000


class InvalidJob(ValueError):
    """What was asked for cannot be a job. `field` is a path (`payload.sleep_ms`), `problem` says what would be right."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


@dataclass(frozen=True, slots=True)
class NewJob:
    """A request for a job; what is None comes from its type. `then` are requests for jobs to run after its success."""

    type: str
    payload: dict[str, Any]
    priority: Priority | None = None
    head_start_s: HeadStart | None = None
    run_at: datetime | None = None
    max_attempts: int | None = None
    time_limit_s: float | None = None
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    concurrency_limit: int | None = None
    correlation_id: str | None = None
    callback_url: str | None = None
    then: tuple[NewJob, ...] = ()
    retry_of: UUID | None = None
    unique: Unique | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request, as columns. Made without the database."""

    id: UUID
    new: NewJob
    queue: str
    priority: int
    payload: str
    max_attempts: int
    time_limit_s: float
    concurrency: tuple[str, int | None] | None
    then_jobs: str | None
    unique: Unique | None = None
    head_start_s: HeadStart = 0
    known_by: bytes | None = None

    @property
    def request_hash(self) -> bytes:
        """`known_by`; else of the request as checked, so that leaving a default out and naming it are the same one."""
        if self.known_by is not None:
            return self.known_by
        request = json.dumps({**dataclasses.asdict(self.new), "payload": self.payload}, sort_keys=True, default=str)
        return hashlib.sha256(request.encode()).digest()


def prepare(
    new: NewJob, *, organization_id: int, max_payload_bytes: int, public_only: bool = True, depth: int = 0
) -> Prepared:
    """Check a request against its type. Raises InvalidJob, UnknownType."""
    job_type = registry.get(new.type)
    if public_only and not job_type.public:
        raise registry.UnknownType(new.type)
    checked = _checked(job_type, new.payload)
    payload = _as_text(checked, max_payload_bytes)
    for name in ("idempotency_key", "correlation_id", "concurrency_key", "callback_url"):
        _storable(name, getattr(new, name))
        if name != "callback_url":
            _short(name, getattr(new, name))
    head_start_s = job_type.head_start_s if new.head_start_s is None else new.head_start_s
    if head_start_s not in HEAD_STARTS:
        raise InvalidJob("head_start_s", f"must be one of {', '.join(map(str, HEAD_STARTS))}")
    concurrency = job_type.concurrency(checked)
    if new.concurrency_key is not None:
        # A caller's keys are the organization's own; those of a type (a GPU, an account) are the system's.
        concurrency = (f"{organization_id}:{new.concurrency_key}", new.concurrency_limit or 1)
    wanted = new.unique or job_type.unique(checked)
    if wanted is not None:
        _check_unique(wanted, new)
    children = _children(new, organization_id, max_payload_bytes, public_only, depth)
    return Prepared(
        id=new_id(),
        new=new,
        queue=job_type.queue,
        priority=PRIORITIES.index(new.priority or job_type.priority),
        payload=payload,
        max_attempts=new.max_attempts or job_type.retry.max_attempts,
        time_limit_s=min(new.time_limit_s or job_type.time_limit_s, job_type.time_limit_s),
        concurrency=concurrency,
        then_jobs=json.dumps(children) if children else None,
        unique=wanted,
        head_start_s=head_start_s,
    )


def _check_unique(wanted: Unique, new: NewJob) -> None:
    _storable("unique.key", wanted.key)
    _short("unique.key", wanted.key)
    if not wanted.key:
        raise InvalidJob("unique.key", "is empty")
    if (wanted.mode == "keep") != (wanted.period_s is None):
        raise InvalidJob("unique.period_s", "belongs to throttle and debounce, which need it")
    for name, seconds in (("period_s", wanted.period_s), ("max_wait_s", wanted.max_wait_s)):
        if seconds is not None and not 0 < seconds <= MAX_PERIOD_S:
            raise InvalidJob(f"unique.{name}", f"must be more than 0 and at most {MAX_PERIOD_S:g} seconds")
    if wanted.max_wait_s is not None and wanted.mode != "debounce":
        raise InvalidJob("unique.max_wait_s", "belongs to debounce")
    if wanted.mode == "debounce" and new.run_at is not None:
        raise InvalidJob("run_at", "is what debounce sets: leave it out")


def _checked(job_type: registry.JobType, payload: dict[str, Any]) -> registry.Payload:
    try:
        return job_type.payload.model_validate_json(json.dumps(payload))
    except (TypeError, RecursionError) as error:
        raise InvalidJob("payload", f"is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidJob(".".join(["payload", *map(str, first["loc"])]), first["msg"]) from None


def _as_text(checked: registry.Payload, max_bytes: int) -> str:
    text = checked.model_dump_json()
    _storable("payload", text)
    if len(text.encode()) > max_bytes:
        raise InvalidJob("payload", f"is larger than {max_bytes} bytes; put large things in storage and send their key")
    return text


def _short(field: str, text: str | None) -> None:
    """What stands in an index: Postgres takes no entry beyond a third of a page."""
    if text is not None and len(text.encode(errors="replace")) > MAX_KEY_BYTES:
        raise InvalidJob(field, f"is longer than {MAX_KEY_BYTES} bytes")


def _storable(field: str, text: str | None) -> None:
    """Postgres stores no NUL and no lone surrogate, neither as text nor escaped inside JSON."""
    if text is not None and not is_storable(text):
        raise InvalidJob(field, "holds a NUL character or half of a surrogate pair, which cannot be stored")


def _children(
    new: NewJob, organization_id: int, max_payload_bytes: int, public_only: bool, depth: int
) -> list[dict[str, Any]]:
    """The `then` jobs as they will be inserted, with ids fixed now, so that a repeated finish cannot insert them twice."""
    if not new.then:
        return []
    if depth >= MAX_THEN_DEPTH:
        raise InvalidJob("then", f"is nested deeper than {MAX_THEN_DEPTH}")
    if len(new.then) > MAX_THEN_JOBS:
        raise InvalidJob("then", f"has more than {MAX_THEN_JOBS} jobs")
    children = []
    for index, child in enumerate(new.then):
        try:
            p = prepare(
                child,
                organization_id=organization_id,
                max_payload_bytes=max_payload_bytes,
                public_only=public_only,
                depth=depth + 1,
            )
        except InvalidJob as error:
            raise InvalidJob(f"then.{index}.{error.field}", error.problem) from None
        except registry.UnknownType as error:
            raise InvalidJob(f"then.{index}.type", str(error)) from None
        if child.run_at or child.idempotency_key or p.concurrency or p.unique or child.head_start_s:
            raise InvalidJob(
                f"then.{index}",
                "may not have run_at, a head start, an idempotency key, a concurrency key or a unique key",
            )
        children.append(
            {
                "id": str(p.id),
                "type": child.type,
                "queue": p.queue,
                "priority": p.priority,
                "payload": json.loads(p.payload),
                "max_attempts": p.max_attempts,
                "time_limit_s": p.time_limit_s,
                "callback_url": child.callback_url,
                "then": json.loads(p.then_jobs) if p.then_jobs else None,
            }
        )
    return children
