"""Where others tell us what happened. No key is asked for: the URL's token finds the endpoint, and its sender signs."""

from __future__ import annotations

import time
from typing import Any, Final
from uuid import UUID

from flask import Response, request
from pydantic import Field

from agentflow import log, metrics
from agentflow.secrets import Unreadable
from agentflow.settings import Settings
from agentflow.webhooks import intake
from agentflow.webhooks.sources import SOURCES
from agentflow.webhooks.sources.delivery import Delivery, Forged
from web.api import Answer, Call, Routes, View, read_bytes
from web.problems import Refused, away

logger = log.get(__name__)
routes = Routes("webhooks")

#: What WEBHOOK_MAX_BYTES may be at most.
_MOST_BYTES: Final[int] = next(m.le for m in Settings.model_fields["webhook_max_bytes"].metadata if hasattr(m, "le"))
_ANY_BODY: Final[dict[str, dict[str, Any]]] = {"*/*": {}}


class Received(View):
    event_id: UUID = Field(description="What it is known by here")
    duplicate: bool = Field(description="It had come before: nothing more is done with it")


@routes.post(
    "/webhooks/<source>/<token>",
    {200: Received},
    problems=(401, 404),
    other_bodies=_ANY_BODY,
    max_body_bytes=_MOST_BYTES,
    open=True,
    scope="webhooks",
)
def receive(call: Call, source: str, token: str) -> Answer | Response:
    """Take a webhook in.

    200 is sent after it was stored with the job that handles it; for one that had come before, too. 401: its signature is
    missing, wrong or more than 5 minutes old. 404: there is no such endpoint. 503: nothing was kept, send it again. Slack's
    `url_verification` is answered with its challenge as text.
    """
    known = SOURCES.get(source)
    try:
        door = call.system.webhook_doors.find(source, token) if known is not None else None
    except Unreadable as error:
        logger.error("a webhook's secret cannot be read", source=source, error=str(error))
        return away("the endpoint cannot verify anything now; nothing was kept")
    if door is None:
        metrics.webhook_received(source if known is not None else "unknown", "unknown")
        raise Refused(404, "nothing is served at this address")
    body = read_bytes(call.system.settings.webhook_max_bytes)
    if not body:
        raise Refused(400, "the body is missing: there is no webhook without one")
    headers = {name.lower(): value for name, value in request.headers.items()}
    try:
        received = intake.receive(call.system, door, Delivery(headers, body, time.time()))
    except Forged as error:
        raise Refused(401, f"this is not from the sender that it should be from: {error}") from None
    if received.event_id is None:
        return Response(received.challenge, content_type="text/plain; charset=utf-8")
    return Answer(Received(event_id=received.event_id, duplicate=received.duplicate))
