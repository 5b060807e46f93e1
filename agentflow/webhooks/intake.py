"""A delivery becomes an event and its job: verified, then stored with its `handle_webhook` job in one transaction."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from agentflow import log, metrics
from agentflow.ids import new_id
from agentflow.jobs.requests import NewJob, Prepared
from agentflow.system import System
from agentflow.webhooks import content, keeping, places
from agentflow.webhooks.endpoints import Door, Endpoint
from agentflow.webhooks.keeping import Arrived
from agentflow.webhooks.sources import SOURCES, slack
from agentflow.webhooks.sources.delivery import Delivery, Forged, text_of

logger = log.get(__name__)

JOB_TYPE: Final = "handle_webhook"
#: Entities share this many keys of an endpoint: Postgres keeps a row for each key that there ever was. Two entities that fall
#: on one key wait for each other, no more.
_KEYS: Final = 256
#: Beyond this a number of time is one of milliseconds (in seconds it would be the year 5138).
_MS_FROM: Final = 1e11


@dataclass(frozen=True, slots=True)
class Received:
    """`event_id` None: nothing was kept, `challenge` is to be echoed."""

    event_id: UUID | None
    duplicate: bool = False
    challenge: str | None = None


def receive(system: System, door: Door, delivery: Delivery) -> Received:
    """Returns after the commit. Raises Forged, and what the database raises when it is away."""
    endpoint, source = door.endpoint, SOURCES[door.endpoint.source]
    headers = keeping.redacted(delivery.headers, (*source.hidden, endpoint.config.hmac.header.lower()))
    try:
        if source.secret != "none" and not door.secrets:  # noqa: S105 - no secret
            raise Forged("this endpoint has no live secret")
        source.verify(delivery, door.secrets, endpoint.config)
    except Forged as error:
        metrics.webhook_received(source.name, "refused")
        with system.database.connection() as conn:
            kept = keeping.refuse(conn, endpoint, headers, delivery.body, str(error))
        if kept:  # a flood of them fills neither the table nor the log
            logger.warning("a webhook was refused", endpoint=str(endpoint.id), source=source.name, reason=str(error))
        raise
    parsed = content.parse(delivery.body, delivery.headers.get("content-type", ""))
    if source is slack.SOURCE and (challenge := slack.challenge(parsed)) is not None:
        return Received(None, challenge=challenge)
    identity = source.identify(delivery, parsed, endpoint.config)
    entity = _entity(endpoint, parsed, delivery)
    arrived = Arrived(
        verdict="by_token" if source.secret == "none" else "verified",  # noqa: S105 - no secret
        headers=headers,
        body=delivery.body,
        delivery_id=identity.delivery_id,
        type=identity.type,
        entity=entity,
        version=_version(endpoint, parsed, delivery),
    )
    return _keep(system, endpoint, arrived)


def concurrency_key(endpoint_id: UUID, entity: str | None) -> str | None:
    """Jobs about one entity run one after the other, in the order in which they came."""
    if entity is None:
        return None
    return f"webhook:{endpoint_id}:{zlib.crc32(entity.encode(errors='replace')) % _KEYS}"


def _keep(system: System, endpoint: Endpoint, arrived: Arrived) -> Received:
    event_id = new_id()
    key = concurrency_key(endpoint.id, arrived.entity)
    new = NewJob(JOB_TYPE, {"event_id": str(event_id)}, concurrency_key=key)
    prepared = system.prepare(endpoint.organization_id, new, public_only=False)
    stored = _store(system, endpoint, arrived, event_id, prepared)
    verdict = arrived.verdict if stored.new else "conflict" if stored.conflict else "duplicate"
    metrics.webhook_received(endpoint.source, verdict)
    if stored.conflict:
        logger.warning(
            "a webhook has the id of another one, and another body: kept, not handled",
            event_id=str(stored.id),
            endpoint=str(endpoint.id),
        )
    return Received(stored.id, duplicate=not stored.new and not stored.conflict)


def _store(system: System, endpoint: Endpoint, arrived: Arrived, event_id: UUID, prepared: Prepared) -> keeping.Stored:
    """A new one takes one statement: senders wait, and each further one holds a connection of the few for another trip."""
    row = keeping.row_of(endpoint, arrived, event_id, prepared.id)
    with system.transaction(one_statement=True) as transaction:
        is_new = transaction.submit_with(keeping.INSERT, row, endpoint.organization_id, prepared)
    if is_new:
        return keeping.Stored(event_id, new=True)
    with system.transaction() as transaction:
        stored = keeping.store_known(transaction.conn, endpoint, arrived, event_id, prepared.id)
        if stored.new:
            transaction.submit_prepared(endpoint.organization_id, prepared)
    return stored


def _entity(endpoint: Endpoint, parsed: Any, delivery: Delivery) -> str | None:
    place = endpoint.config.entity
    return text_of(places.read(place, parsed, delivery.headers)) if place is not None else None


def _version(endpoint: Endpoint, parsed: Any, delivery: Delivery) -> datetime | None:
    place = endpoint.config.version
    return moment_of(places.read(place, parsed, delivery.headers)) if place is not None else None


def moment_of(value: Any) -> datetime | None:
    """A time as senders write it: Unix seconds or milliseconds, as a number or a text, or ISO 8601; None for anything else."""
    if isinstance(value, str):
        if len(value) > 40:
            return None
        try:
            value = float(value)
        except ValueError:
            try:
                moment = datetime.fromisoformat(value)
            except ValueError:
                return None
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            return moment if 1970 <= moment.year < 9000 else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e14:
        return None
    return datetime.fromtimestamp(value / 1000 if value > _MS_FROM else value, UTC)
