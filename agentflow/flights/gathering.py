"""What touches a thing: the jobs of its trace, retries and replays, webhooks, documents and videos, and what touches these."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from uuid import UUID

from agentflow import videos
from agentflow.database import Connection
from agentflow.jobs import flights
from agentflow.jobs.flights import Leg
from agentflow.knowledge import documents
from agentflow.knowledge.documents import Document
from agentflow.videos import Video
from agentflow.webhooks import events
from agentflow.webhooks.events import Event

#: What is asked about is found first; of what touches it so many.
MOST_LEGS: Final = 200
_MOST_ROUNDS: Final = 4


class Gathered:
    """What was found so far: of videos None where the row is gone. Every look is for the organization of the first thing."""

    def __init__(self, conn: Connection, organization_id: int) -> None:
        self.conn = conn
        self.organization_id = organization_id
        self.legs: dict[UUID, Leg] = {}
        self.events: dict[UUID, Event] = {}
        self.documents: dict[UUID, Document] = {}
        self.videos: dict[UUID, Video | None] = {}
        self.truncated = False
        self.flights: set[UUID] = set()
        self._others: set[UUID] = set()
        self._looked_at: set[UUID] = set()

    def follow(self, legs: Iterable[Leg]) -> None:
        """These, and what touches them, and what touches that."""
        new = self._keep(legs)
        for _ in range(_MOST_ROUNDS):
            if not new:
                return
            new = self._keep(self._near(new))
        self.truncated |= bool(new)

    def take(self, event: Event) -> list[Leg]:
        """A webhook: the jobs that handled it and the one that was made of it."""
        self.events[event.id] = event
        self._looked_at.add(event.id)
        found = self._by_ids(event.job_id, event.handled_by, event.action_job_id)
        if len(found) > 1:
            # One job may answer for many webhooks: the flight that it belongs to is another webhook's.
            own = {leg.flight for leg in found if leg.id != event.action_job_id}
            self._others |= {leg.flight for leg in found} - own
        return found

    def read(self, document_id: UUID) -> list[Leg]:
        """A document: the jobs that read it last."""
        self._looked_at.add(document_id)
        document = documents.get(self.conn, self.organization_id, document_id)
        if document is None:
            return []
        self.documents[document_id] = document
        found = self.watch(document.video_id) if document.video_id is not None else []
        return found + self._by_ids(document.job_id, document.chain_id)

    def watch(self, video_id: UUID) -> list[Leg]:
        """A video: the jobs that worked on it."""
        if video_id in self._looked_at:
            return []
        self._looked_at.add(video_id)
        found = flights.on_video(self.conn, self.organization_id, video_id, limit=MOST_LEGS)
        video = videos.get(self.conn, self.organization_id, video_id)
        if video is not None or found:
            self.videos[video_id] = video
        return found

    def _near(self, new: list[Leg]) -> list[Leg]:
        conn, of, ids = self.conn, self.organization_id, [leg.id for leg in new]
        found = self._by_ids(*{id_ for leg in new for id_ in (leg.parent_id, leg.retry_of)} - self.legs.keys())
        unknown = {leg.flight for leg in new} - self.flights - self._others
        self.flights |= unknown
        found += flights.of_flights(conn, of, unknown, limit=MOST_LEGS + 1)
        found += flights.retries(conn, of, ids, limit=MOST_LEGS)
        for leg in new:
            if leg.event_id is not None and leg.event_id not in self._looked_at:
                self._looked_at.add(leg.event_id)
                event = events.get(conn, of, leg.event_id)
                found += self.take(event) if event is not None else self._by_ids(leg.event_id)
            if leg.document_id is not None and leg.document_id not in self._looked_at:
                found += self.read(leg.document_id)
            if leg.video_id is not None:
                found += self.watch(leg.video_id)
        return found

    def _by_ids(self, *ids: UUID | None) -> list[Leg]:
        named = [id_ for id_ in ids if id_ is not None]
        return flights.by_ids(self.conn, self.organization_id, named, limit=MOST_LEGS)

    def _keep(self, legs: Iterable[Leg]) -> list[Leg]:
        """The new ones among them, as long as there is room."""
        new = []
        for leg in legs:
            if leg.id in self.legs:
                continue
            if len(self.legs) >= MOST_LEGS:
                self.truncated = True
                break
            self.legs[leg.id] = leg
            new.append(leg)
        return new
