"""A job as a stream of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any, Final

from flask import Response, stream_with_context

from agentflow.database import Unavailable
from agentflow.jobs.model import Job
from web.api import Call
from web.problems import away
from web.waiting import STEP_S, hung_up

#: Routers of the platforms cut connections that are silent for 55 to 60 s; a comment also finds callers who hung up.
HEARTBEAT_S: Final = 10.0
#: A stream ends after so long and the client comes back with Last-Event-ID: no thread is held for ever.
LONGEST_S: Final = 600.0
RETRY_MS: Final = 2000


def stream(call: Call, job: Job, last_event_id: str | None) -> Response:
    if job.terminal and last_event_id == _snapshot(call, job)[0]:
        return Response(status=204)
    if not call.services.seats.take():
        return away("too many are following or waiting now", retry_after_s=2)
    answer = Response(
        stream_with_context(_events(call, job, last_event_id)), content_type="text/event-stream; charset=utf-8"
    )
    # nginx would hold events back until its buffer is full.
    answer.headers.update({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
    answer.call_on_close(call.services.seats.leave)
    return answer


def _events(call: Call, job: Job, seen: str | None) -> Iterator[str]:
    seats, system = call.services.seats, call.system
    ends = time.monotonic() + LONGEST_S
    said_at = time.monotonic()
    before: dict[str, Any] = {}
    yield f"retry: {RETRY_MS}\n\n"
    while True:
        mark, now = _snapshot(call, job)
        if mark != seen:
            changed = any(before.get(name) != now[name] for name in ("state", "attempt", "cancel_requested"))
            name = "state" if changed else "progress"
            yield f"id: {mark}\nevent: {name}\ndata: {json.dumps(now, separators=(',', ':'))}\n\n"
            said_at = time.monotonic()
        elif time.monotonic() - said_at > HEARTBEAT_S:
            yield ": still here\n\n"
            said_at = time.monotonic()
        seen, before = mark, now
        if job.terminal or seats.draining or hung_up() or time.monotonic() > ends:
            return
        try:
            current = system.wait_finished(job, STEP_S)
        except Unavailable:
            yield ": the database cannot be reached\n\n"
            return  # the client comes back, and is told 503 then
        if current is None:
            return  # it was cleaned up: the client comes back and gets 404
        job = current


def _snapshot(call: Call, job: Job) -> tuple[str, dict[str, Any]]:
    """What a follower is told, and its id: the same for the same news, in every process."""
    progress = call.services.seats.progress(job)
    now: dict[str, Any] = {
        "id": str(job.id),
        "state": job.state,
        "attempt": job.attempt,
        "progress": progress.fraction if progress else None,
        "stage": progress.stage if progress else None,
        "cancel_requested": job.cancel_requested,
        "error": job.error,
    }
    digest = hashlib.sha256(json.dumps([job.fence, now], sort_keys=True).encode()).hexdigest()[:16]
    return f"{job.fence}-{digest}", now
