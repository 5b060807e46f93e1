"""Callbacks as their receivers' owners see them: the log of deliveries, replays, and the secrets that sign them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final
from uuid import UUID

from pydantic import Field

from agentflow import signing
from agentflow.jobs import callbacks, records
from agentflow.jobs.model import State
from web import jobs
from web.api import Answer, Body, Call, Routes, View
from web.problems import Refused

routes = Routes("callbacks")

MAX_GRACE_S: Final = 30 * 86_400.0


class DeliveryView(View):
    attempt: int
    at: datetime
    duration_ms: int
    status: int | None = Field(description="What the receiver answered; null: nothing")
    error: str | None = Field(description="Null: it was delivered")
    response: str | None = Field(description="How the answer's body began")


class CallbackView(View):
    id: UUID
    url: str
    state: State = Field(description="queued: it is tried (again) at `next_at`; succeeded: delivered; failed: given up")
    replay_of: UUID | None
    created_at: datetime
    next_at: datetime | None
    finished_at: datetime | None
    attempts: list[DeliveryView] = Field(description="The first one first")


class CallbackList(View):
    callbacks: list[CallbackView] = Field(description="The first one first; replays follow")


class SecretRequest(Body):
    grace_s: Annotated[float, Field(ge=0, le=MAX_GRACE_S)] = Field(
        signing.ROTATION_GRACE_S, description="Seconds for which the secret before this one signs along"
    )


class SecretView(View):
    id: UUID
    created_at: datetime
    expires_at: datetime | None = Field(description="Null: until another is made")


class SecretList(View):
    secrets: list[SecretView] = Field(description="Those that sign now, the newest first")


class SecretCreated(SecretView):
    secret: str = Field(description="`whsec_…`: shown now, and never again")


@routes.get("/api/jobs/<uuid:job_id>/callbacks", {200: CallbackList}, problems=(404,))
def of_job(call: Call, job_id: UUID) -> CallbackList:
    """The callbacks of a job, with every attempt to deliver them."""
    jobs.find(call, job_id)
    return _list(call, job_id)


@routes.get("/api/batches/<uuid:batch_id>/callbacks", {200: CallbackList}, problems=(404,))
def of_batch(call: Call, batch_id: UUID) -> CallbackList:
    """The callback of a batch and its replays, with every attempt to deliver them."""
    with call.system.database.connection() as conn:
        if records.get_batch(conn, call.sees, batch_id) is None:
            raise Refused(404, f"there is no batch {batch_id}")
    return _list(call, batch_id)


@routes.post(
    "/api/jobs/<uuid:job_id>/callbacks/<uuid:callback_id>/replay",
    {202: CallbackView},
    scope="webhooks",
    problems=(404,),
)
def replay_of_job(call: Call, job_id: UUID, callback_id: UUID) -> Answer:
    """Tell it once more: the same message under the same `webhook-id`, as a callback of its own."""
    return _replay(call, job_id, callback_id)


@routes.post(
    "/api/batches/<uuid:batch_id>/callbacks/<uuid:callback_id>/replay",
    {202: CallbackView},
    scope="webhooks",
    problems=(404,),
)
def replay_of_batch(call: Call, batch_id: UUID, callback_id: UUID) -> Answer:
    """Tell it once more: the same message under the same `webhook-id`, as a callback of its own."""
    return _replay(call, batch_id, callback_id)


@routes.get("/api/callback-secrets", {200: SecretList}, scope="webhooks")
def secrets(call: Call) -> SecretList:
    """The secrets that callbacks are signed with now; without the secrets themselves."""
    with call.system.database.connection() as conn:
        found = signing.secrets_of(conn, call.organization_id)
    return SecretList(secrets=[SecretView(id=s.id, created_at=s.created_at, expires_at=s.expires_at) for s in found])


@routes.post("/api/callback-secrets", {201: SecretCreated}, body=SecretRequest, scope="webhooks")
def create_secret(call: Call, body: SecretRequest) -> Answer:
    """Make a secret to sign callbacks with.

    The one before it signs along for `grace_s`, so that receivers can change over. Without any, callbacks go out unsigned.
    """
    with call.system.database.transaction() as conn:
        made, secret = signing.create_secret(conn, call.organization_id, call.system.sealer, grace_s=body.grace_s)
    view = SecretCreated(id=made.id, created_at=made.created_at, expires_at=made.expires_at, secret=secret)
    return Answer(view, 201)


def _list(call: Call, subject_id: UUID) -> CallbackList:
    with call.system.database.connection() as conn:
        found = callbacks.of(conn, call.sees, subject_id)
    return CallbackList(
        callbacks=[
            CallbackView(
                id=each.id,
                url=each.url,
                state=each.state,
                replay_of=each.replay_of,
                created_at=each.created_at,
                next_at=each.next_at,
                finished_at=each.finished_at,
                attempts=[
                    DeliveryView(
                        attempt=a.attempt,
                        at=a.at,
                        duration_ms=a.duration_ms,
                        status=a.status,
                        error=a.error,
                        response=a.response,
                    )
                    for a in each.attempts
                ],
            )
            for each in found
        ]
    )


def _replay(call: Call, subject_id: UUID, callback_id: UUID) -> Answer:
    with call.system.transaction() as transaction:
        job = callbacks.replay(transaction.conn, call.sees, subject_id, callback_id)
        if job is None:
            raise Refused(404, f"there is no callback {callback_id} here")
        transaction.rings.append(callbacks.ring_for(job))
    view = CallbackView(
        id=job.id,
        url=job.payload["url"],
        state=job.state,
        replay_of=job.retry_of,
        created_at=job.created_at,
        next_at=job.run_at,
        finished_at=None,
        attempts=[],
    )
    return Answer(view, 202, {"Location": f"/api/jobs/{job.id}"})
