"""What was gathered, told as a tree: what was caused stands below its cause, the earliest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import PurePosixPath
from typing import Final, Literal
from uuid import UUID

from agentflow.flights.gathering import Gathered
from agentflow.jobs import flights
from agentflow.jobs.flights import Leg
from agentflow.knowledge import graph_queries
from agentflow.knowledge.graph_queries import Edge
from agentflow.schedules import records as schedules
from agentflow.videos import Video
from agentflow.webhooks import endpoints

Kind = Literal["event", "schedule", "job", "video", "document", "artefact", "edge"]

_MOST_FILES: Final = 12
#: Results may have megabytes each.
_MOST_RESULTS: Final = 40
_MOST_EDGES: Final = 12


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


def record(found: Gathered, kind: Kind, id_: str, *more: Entry) -> Record:
    """Of what was gathered for this thing; `more` is told beside it."""
    told = {each.id: each for each in (*_Telling(found).entries(), *more)}
    entries = [replace(each, depth=depth) for each, depth in _as_tree(list(told.values()))]
    return Record(kind, id_, found.organization_id, sorted(found.flights), entries, found.truncated)


class _Telling:
    def __init__(self, found: Gathered) -> None:
        self._found = found
        self._endpoints: dict[UUID | None, str | None] = {}

    def entries(self) -> Iterator[Entry]:
        for each in (
            self._legs,
            self._webhooks,
            self._schedules,
            self._videos,
            self._documents,
            self._files,
            self._edges,
        ):
            yield from each()

    def _legs(self) -> Iterator[Entry]:
        for leg in self._found.legs.values():
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
        acted = next((each for each in self._found.events.values() if each.action_job_id == leg.id), None)
        candidates = (
            leg.parent_id,
            leg.event_id,
            acted.handled_by if acted is not None else None,
            leg.retry_of,
            leg.schedule_id,
            leg.flight if leg.flight != leg.id else None,
            leg.video_id,
        )
        known = self._found.legs.keys() | self._found.events.keys() | self._found.videos.keys()
        for each in candidates:
            if each is not None and (each in known or each == leg.schedule_id):
                return str(each)
        # A trace that began before its first job: of a webhook's request, say.
        handlers = [
            each.id for each in self._found.legs.values() if each.flight == leg.flight and each.event_id is not None
        ]
        return str(min(handlers)) if handlers and min(handlers) != leg.id else None

    def _webhooks(self) -> Iterator[Entry]:
        for event in self._found.events.values():
            name = self._name_of_event(event.endpoint_id, event.type)
            state = event.outcome or ("pending" if event.job_id is not None else event.verdict)
            ended_at = event.handled_at if not event.replays else None  # it was handled last by a replay
            yield Entry("event", str(event.id), None, name, event.received_at, ended_at, state)

    def _name_of_event(self, endpoint_id: UUID | None, type_: str | None) -> str:
        if endpoint_id is not None and endpoint_id not in self._endpoints:
            endpoint = endpoints.get(self._found.conn, self._found.organization_id, endpoint_id)
            self._endpoints[endpoint_id] = endpoint.name if endpoint is not None else None
        return " · ".join(each for each in (self._endpoints.get(endpoint_id), type_) if each)

    def _schedules(self) -> Iterator[Entry]:
        for leg in self._found.legs.values():
            if leg.schedule_id is not None:
                found = schedules.get(self._found.conn, self._found.organization_id, leg.schedule_id)
                name = found.name if found is not None else ""
                yield Entry("schedule", str(leg.schedule_id), None, name, leg.created_at, kept=found is not None)

    def _videos(self) -> Iterator[Entry]:
        for video_id, video in self._found.videos.items():
            if video is not None:
                yield Entry("video", str(video_id), None, _called(video), video.created_at)
            else:
                began_at = min(leg.created_at for leg in self._found.legs.values() if leg.video_id == video_id)
                yield Entry("video", str(video_id), None, "", began_at, kept=False)

    def _documents(self) -> Iterator[Entry]:
        for document in self._found.documents.values():
            made_by = (document.job_id, document.chain_id, document.video_id)
            cause = next(
                (str(each) for each in made_by if each in self._found.legs or each in self._found.videos), None
            )
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
        ended = [leg.id for leg in self._found.legs.values() if leg.kept and leg.state == "succeeded"]
        found = flights.files(self._found.conn, self._found.organization_id, ended[:_MOST_RESULTS], most=_MOST_FILES)
        for job_id, keys in found.items():
            leg = self._found.legs[job_id]
            for key in keys:
                yield Entry("artefact", key, str(job_id), PurePosixPath(key).name, leg.ended_at or leg.created_at)

    def _edges(self) -> Iterator[Entry]:
        for document in self._found.documents.values():
            told = graph_queries.of_document(
                self._found.conn, self._found.organization_id, document.id, limit=_MOST_EDGES
            )
            for edge, one, other in told:
                at = document.read_at or document.updated_at
                yield Entry("edge", str(edge.id), str(document.id), said_of(edge, one, other), at)


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


def said_of(edge: Edge, one: str, other: str) -> str:
    return f"{one} — {edge.predicate} → {other}"


def _called(video: Video) -> str:
    """A link's query may open what it leads to."""
    return video.filename or (video.source_url or "").partition("?")[0]
