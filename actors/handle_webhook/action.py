"""What an action is given, and what it says in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from agentflow.webhooks import places
from agentflow.webhooks.endpoints import Endpoint
from agentflow.webhooks.events import Event, Outcome


@dataclass(frozen=True, slots=True)
class Happened:
    """An event with what it carries. `content` is None where its body is neither JSON nor a form."""

    event: Event
    endpoint: Endpoint
    headers: Mapping[str, str]
    content: Any
    replay: bool
    even_if_stale: bool

    def read(self, place: str) -> Any:
        """The value at a place; agentflow.webhooks.places.MISSING for none."""
        event = self.event
        known = {
            "id": str(event.id),
            "type": event.type,
            "source": self.endpoint.source,
            "delivery_id": event.delivery_id,
            "received_at": event.received_at.isoformat(),
        }
        return places.read(place, self.content, self.headers, known)


@dataclass(frozen=True, slots=True)
class Done:
    """`job_id` is the job that was made of the event."""

    outcome: Outcome
    detail: str | None = None
    job_id: UUID | None = None
