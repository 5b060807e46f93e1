"""Flight records: everything that led to a job, a webhook, a file or an edge of the graph, and everything that came of it.

A record begins with what is asked about and gathers what touches it: the jobs of the same trace, what was tried again or handled
once more, the webhook or schedule behind them, the documents and videos that they worked on, and the files and edges of these.
Jobs and webhooks that retention has deleted are told of by their slim rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import PurePosixPath
from typing import Final, Literal
from uuid import UUID

from agentflow import videos
from agentflow.database import Connection
from agentflow.jobs import files, flights
from agentflow.jobs.flights import Leg
from agentflow.knowledge import documents, graph_queries
from agentflow.knowledge.documents import Document
from agentflow.schedules import records as schedules
from agentflow.videos import Video
from agentflow.webhooks import endpoints, events
from agentflow.webhooks.events import Event

Kind = Literal["event", "schedule", "job", "video", "document", "artefact", "edge"]

#: What is looked at from is found first; of what touches it so many.
MOST_LEGS: Final = 200
_MOST_ROUNDS: Final = 4
_MOST_FILES: Final = 12
_MOST_EDGES: Final = 12
_MOST_DOCUMENTS: Final = 10
_ROOT: Final = re.compile(r"o/(\d{1,18})/")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened, `depth` steps below what caused it (`cause`: that one's id). `id` is a storage key for a file.

    `kept` is False where only a slim row tells of it.
    """

    kind: Kind
    id: str
    cause: str | None
    name: str
    began_at: datetime
    ended_at: datetime | None = None
    state: str | None = None
    code: str | None = None
    attempts: int = 0
    kept: bool = True
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """`entries` in the order of a tree, what was caused below its cause. `truncated`: there is more than is told."""

    kind: Kind
    id: str
    organization_id: int
    flights: list[UUID]
    entries: list[Entry]
    truncated: bool


def of_job(conn: Connection, sees: int | None, job_id: UUID) -> Record | None:
    """None: there is no such job, and none is remembered."""
    leg = flights.get(conn, sees, job_id)
    if leg is None or leg.kind != "job":
        return None
    gathered = _Gathered(conn, leg.organization_id)
    gathered.follow([leg])
    return gathered.record("job", str(job_id))


def of_event(conn: Connection, sees: int | None, event_id: UUID) -> Record | None:
    """None: there is no such webhook, and none is remembered."""
    event = events.get(conn, sees, event_id)
    if event is not None:
        gathered = _Gathered(conn, event.organization_id)
        gathered.follow(gathered.take(event))
        return gathered.record("event", str(event_id))
    leg = flights.get(conn, sees, event_id)
    if leg is None or leg.kind != "event":
        return None
    gathered = _Gathered(conn, leg.organization_id)
    gathered.follow([leg])
    return gathered.record("event", str(event_id))


def of_edge(conn: Connection, sees: int | None, edge_id: UUID) -> Record | None:
    """By the documents that say it. None: there is no such edge."""
    found = graph_queries.edge(conn, sees, edge_id)
    if found is None:
        return None
    edge, one, other = found
    gathered = _Gathered(conn, one.organization_id)
    behind = dict.fromkeys(each.document_id for each in graph_queries.evidence(conn, one.organization_id, edge))
    for document_id in list(behind)[:_MOST_DOCUMENTS]:
        gathered.follow(gathered.read(document_id))
    gathered.truncated |= len(behind) > _MOST_DOCUMENTS
    cause = next((str(each) for each in behind if each in gathered.documents), None)
    began_at = min((each.read_at or each.created_at for each in gathered.documents.values()), default=None)
    if began_at is not None:
        gathered.add(Entry("edge", str(edge.id), cause, _said(edge, one.name, other.name), began_at))
    return gathered.record("edge", str(edge_id))


def of_artefact(conn: Connection, sees: int | None, key: str) -> Record | None:
    """By the job, video or document that the file belongs to. None: nothing is known of any."""
    match = _ROOT.match(key)
    organization_id = int(match[1]) if match else None
    if organization_id is None or sees not in (None, organization_id):
        return None
    gathered = _Gathered(conn, organization_id)
    owner = files.owner_of(key)
    began_at, cause = None, None
    if owner is None:
        document = documents.with_file(conn, organization_id, key)
        if document is not None:
            gathered.follow(gathered.read(document.id))
            began_at, cause = document.created_at, str(document.id)
    elif owner.table == "jobs":
        leg = flights.get(conn, organization_id, owner.id)
        if leg is not None:
            gathered.follow([leg])
            began_at, cause = leg.ended_at or leg.created_at, str(leg.id)
    else:
        gathered.follow(gathered.watch(owner.id))
        if video := gathered.videos.get(owner.id):
            began_at, cause = video.began_at, video.id
    if began_at is None:
        return None
    gathered.add(Entry("artefact", key, cause, PurePosixPath(key).name, began_at))
    return gathered.record("artefact", key)


class _Gathered:
    """What was found so far. Every look is for the one organization that the first thing belongs to."""

    def __init__(self, conn: Connection, organization_id: int) -> None:
        self.conn = conn
        self.organization_id = organization_id
        self.legs: dict[UUID, Leg] = {}
        self.events: dict[UUID, Event] = {}
        self.documents: dict[UUID, Document] = {}
        self.videos: dict[UUID, Entry] = {}
        self.truncated = False
        self._more: dict[str, Entry] = {}
        self._endpoints: dict[UUID | None, str | None] = {}
        self._flights: set[UUID] = set()
        self._looked_at: set[UUID] = set()

    # ---- finding ----

    def follow(self, legs: Iterable[Leg]) -> None:
        """These, and what touches them, and what touches that."""
        new = self._keep(legs)
        for _ in range(_MOST_ROUNDS):
            if not new:
                return
            new = self._keep(self._near(new))
        self.truncated |= bool(new)

    def add(self, entry: Entry) -> None:
        self._more.setdefault(entry.id, entry)

    def take(self, event: Event) -> list[Leg]:
        """A webhook: the jobs that handled it and that were made of it."""
        self.events[event.id] = event
        self._looked_at.add(event.id)
        ids = [id_ for id_ in (event.job_id, event.handled_by) if id_ is not None]
        if event.action_job_id is not None:
            # It may be one that many webhooks share: what led to it is the flight of another.
            self._keep(flights.by_ids(self.conn, self.organization_id, [event.action_job_id], limit=1))
        return flights.by_ids(self.conn, self.organization_id, ids, limit=MOST_LEGS)

    def read(self, document_id: UUID) -> list[Leg]:
        """A document: the jobs that read it last."""
        self._looked_at.add(document_id)
        document = documents.get(self.conn, self.organization_id, document_id)
        if document is None:
            return []
        self.documents[document_id] = document
        found = self.watch(document.video_id) if document.video_id is not None else []
        ids = [id_ for id_ in (document.job_id, document.chain_id) if id_ is not None]
        return found + flights.by_ids(self.conn, self.organization_id, ids, limit=MOST_LEGS)

    def watch(self, video_id: UUID) -> list[Leg]:
        """A video: the jobs that worked on it."""
        if video_id in self._looked_at:
            return []
        self._looked_at.add(video_id)
        found = flights.on_video(self.conn, self.organization_id, video_id, limit=MOST_LEGS)
        video = videos.get(self.conn, self.organization_id, video_id)
        if video is not None:
            self.videos[video_id] = Entry("video", str(video_id), None, _called(video), video.created_at)
        elif found:
            self.videos[video_id] = Entry("video", str(video_id), None, "", found[0].created_at, kept=False)
        return found

    def _near(self, new: list[Leg]) -> list[Leg]:
        conn, of, ids = self.conn, self.organization_id, [leg.id for leg in new]
        named = {id_ for leg in new for id_ in (leg.parent_id, leg.retry_of) if id_ is not None}
        found = flights.by_ids(conn, of, named - self.legs.keys(), limit=MOST_LEGS)
        unknown = {leg.flight for leg in new} - self._flights
        self._flights |= unknown
        found += flights.of_flights(conn, of, unknown, limit=MOST_LEGS + 1)
        found += flights.retries(conn, of, ids, limit=MOST_LEGS)
        for leg in new:
            if leg.event_id is not None and leg.event_id not in self._looked_at:
                self._looked_at.add(leg.event_id)
                event = events.get(conn, of, leg.event_id)
                found += self.take(event) if event is not None else flights.by_ids(conn, of, [leg.event_id], limit=1)
            if leg.document_id is not None and leg.document_id not in self._looked_at:
                found += self.read(leg.document_id)
            if leg.video_id is not None:
                found += self.watch(leg.video_id)
        return found

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

    # ---- telling ----

    def record(self, kind: Kind, id_: str) -> Record:
        entries = [*self._legs(), *self._webhooks(), *self._schedules(), *self.videos.values(), *self._documents()]
        entries += [*self._files(), *self._edges()]
        told = {each.id: each for each in (*entries, *self._more.values())}
        ordered = [replace(each, depth=depth) for each, depth in _as_tree(list(told.values()))]
        return Record(kind, id_, self.organization_id, sorted(self._flights), ordered, self.truncated)

    def _legs(self) -> Iterator[Entry]:
        for leg in self.legs.values():
            is_job = leg.kind == "job"
            yield Entry(
                leg.kind,
                str(leg.id),
                self._cause_of(leg) if is_job else None,
                (leg.type or "") if is_job else self._name_of_event(leg.endpoint_id, leg.type),
                leg.created_at,
                leg.ended_at,
                leg.state,
                code=leg.code,
                attempts=leg.attempts,
                kept=leg.kept,
            )

    def _cause_of(self, leg: Leg) -> str | None:
        """The nearest thing before it that is known."""
        acted = next((each for each in self.events.values() if each.action_job_id == leg.id), None)
        candidates = (
            leg.parent_id,
            leg.event_id,
            acted.handled_by if acted is not None else None,
            leg.retry_of,
            leg.schedule_id,
            leg.flight if leg.flight != leg.id else None,
            leg.video_id,
        )
        known = self.legs.keys() | self.events.keys() | self.videos.keys()
        for each in candidates:
            if each is not None and (each in known or each == leg.schedule_id):
                return str(each)
        # A trace that began before its first job: of a webhook's request, say.
        handlers = [each.id for each in self.legs.values() if each.flight == leg.flight and each.event_id is not None]
        return str(min(handlers)) if handlers and min(handlers) != leg.id else None

    def _webhooks(self) -> Iterator[Entry]:
        for event in self.events.values():
            name = self._name_of_event(event.endpoint_id, event.type)
            state = event.outcome or ("pending" if event.job_id is not None else event.verdict)
            yield Entry("event", str(event.id), None, name, event.received_at, event.handled_at, state)

    def _name_of_event(self, endpoint_id: UUID | None, type_: str | None) -> str:
        if endpoint_id is not None and endpoint_id not in self._endpoints:
            endpoint = endpoints.get(self.conn, self.organization_id, endpoint_id)
            self._endpoints[endpoint_id] = endpoint.name if endpoint is not None else None
        return " · ".join(each for each in (self._endpoints.get(endpoint_id), type_) if each)

    def _schedules(self) -> Iterator[Entry]:
        for leg in self.legs.values():
            if leg.schedule_id is not None:
                found = schedules.get(self.conn, self.organization_id, leg.schedule_id)
                name = found.name if found is not None else ""
                yield Entry("schedule", str(leg.schedule_id), None, name, leg.created_at, kept=found is not None)

    def _documents(self) -> Iterator[Entry]:
        for document in self.documents.values():
            made_by = (document.job_id, document.chain_id, document.video_id)
            cause = next((str(each) for each in made_by if each in self.legs or each in self.videos), None)
            state = (
                "failed" if document.error is not None else "succeeded" if document.read_at is not None else "queued"
            )
            yield Entry(
                "document",
                str(document.id),
                cause,
                document.title,
                document.read_at or document.updated_at,
                state=state,
            )

    def _files(self) -> Iterator[Entry]:
        ended = [leg.id for leg in self.legs.values() if leg.kept and leg.state == "succeeded"]
        found = flights.files(self.conn, self.organization_id, ended, most=_MOST_FILES) if ended else {}
        for job_id, keys in found.items():
            leg = self.legs[job_id]
            for key in keys:
                yield Entry("artefact", key, str(job_id), PurePosixPath(key).name, leg.ended_at or leg.created_at)

    def _edges(self) -> Iterator[Entry]:
        for document in self.documents.values():
            told = graph_queries.of_document(self.conn, self.organization_id, document.id, limit=_MOST_EDGES)
            for edge, one, other in told:
                at = document.read_at or document.updated_at
                yield Entry("edge", str(edge.id), str(document.id), _said(edge, one, other), at)


def _as_tree(entries: list[Entry]) -> Iterator[tuple[Entry, int]]:
    """Each with its depth, the earliest first; whose cause is not told, or is below itself, stands at the top."""
    known = {each.id for each in entries}
    below: dict[str | None, list[Entry]] = {}
    for each in sorted(entries, key=lambda each: (each.began_at, each.id)):
        below.setdefault(each.cause if each.cause in known else None, []).append(each)
    told: set[str] = set()

    def walk(top: Entry, depth: int) -> Iterator[tuple[Entry, int]]:
        if top.id in told:
            return
        told.add(top.id)
        yield top, depth
        for each in below.get(top.id, []):
            yield from walk(each, depth + 1)

    for each in below.get(None, []):
        yield from walk(each, 0)
    for each in entries:
        yield from walk(each, 0)


def _said(edge: graph_queries.Edge, one: str, other: str) -> str:
    return f"{one} — {edge.predicate} → {other}"


def _called(video: Video) -> str:
    """A link's query may open what it leads to."""
    return video.filename or (video.source_url or "").partition("?")[0]
