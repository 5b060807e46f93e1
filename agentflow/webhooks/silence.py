"""Endpoints that have gone quiet: a sender that stops is an outage that makes no error anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from agentflow import log
from agentflow.database import Connection

logger = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Watch:
    """An endpoint that is to be heard of every `silence_after_s`. `quiet_s`: since its last event, or since it is watched."""

    endpoint_id: UUID
    organization_id: int
    source: str
    name: str
    silence_after_s: float
    quiet_s: float
    silent_since: datetime | None

    @property
    def is_silent(self) -> bool:
        return self.quiet_s > self.silence_after_s


def watches(conn: Connection) -> list[Watch]:
    """All endpoints that are watched, by id."""
    rows = conn.execute(
        "select e.id, e.organization_id, e.source, e.name, e.silence_after_s,"
        " extract(epoch from clock_timestamp() - greatest(e.watched_since, v.received_at))::float8, e.silent_since"
        " from agentflow.webhook_endpoints e left join lateral (select v.received_at from agentflow.webhook_events v"
        " where v.endpoint_id = e.id and v.verdict <> 'refused' order by v.id desc limit 1) v on true"
        " where e.silence_after_s is not null and e.disabled_at is null order by e.id"
    ).fetchall()
    return [Watch(*row) for row in rows]


def silent(conn: Connection) -> list[Watch]:
    """Those that are silent now. What has changed since the last call is written and logged: each silence once, and its end."""
    found = watches(conn)
    for watch in found:
        if watch.is_silent == (watch.silent_since is not None):
            continue
        changed = conn.execute(
            "update agentflow.webhook_endpoints set silent_since = case when %(silent)s then clock_timestamp() end"
            " where id = %(id)s and organization_id = %(organization)s and (silent_since is null) = %(silent)s",
            {"silent": watch.is_silent, "id": watch.endpoint_id, "organization": watch.organization_id},
        ).rowcount
        if changed:
            _tell(watch)
    return [watch for watch in found if watch.is_silent]


def _tell(watch: Watch) -> None:
    said = {"endpoint": str(watch.endpoint_id), "source": watch.source, "endpoint_name": watch.name}
    if watch.is_silent:
        logger.error(
            "no webhook has come for longer than the endpoint allows",
            quiet_s=round(watch.quiet_s),
            silence_after_s=watch.silence_after_s,
            **said,
        )
    else:
        logger.info("webhooks come again", **said)
