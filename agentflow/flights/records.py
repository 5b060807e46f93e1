"""Flight records, by what one may ask about: a job, a webhook, an edge of the graph, a file."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Final
from uuid import UUID

from agentflow.database import Connection
from agentflow.flights.gathering import Gathered
from agentflow.flights.telling import Entry, Record, record, said_of
from agentflow.jobs import files, flights
from agentflow.knowledge import documents, graph_queries
from agentflow.webhooks import events

_MOST_DOCUMENTS: Final = 10
_ROOT: Final = re.compile(r"o/(\d{1,18})/")


def of_job(conn: Connection, sees: int | None, job_id: UUID) -> Record | None:
    """None: there is no such job, and none is remembered."""
    leg = flights.get(conn, sees, job_id)
    if leg is None or leg.kind != "job":
        return None
    gathered = Gathered(conn, leg.organization_id)
    gathered.follow([leg])
    return record(gathered, "job", str(job_id))


def of_event(conn: Connection, sees: int | None, event_id: UUID) -> Record | None:
    """None: there is no such webhook, and none is remembered."""
    event = events.get(conn, sees, event_id)
    if event is not None:
        gathered = Gathered(conn, event.organization_id)
        gathered.follow(gathered.take(event))
        return record(gathered, "event", str(event_id))
    leg = flights.get(conn, sees, event_id)
    if leg is None or leg.kind != "event":
        return None
    gathered = Gathered(conn, leg.organization_id)
    gathered.follow([leg])
    return record(gathered, "event", str(event_id))


def of_edge(conn: Connection, sees: int | None, edge_id: UUID) -> Record | None:
    """By the documents that say it. None: there is no such edge."""
    found = graph_queries.edge(conn, sees, edge_id)
    if found is None:
        return None
    edge, one, other = found
    gathered = Gathered(conn, one.organization_id)
    behind = dict.fromkeys(each.document_id for each in graph_queries.evidence(conn, one.organization_id, edge))
    for document_id in list(behind)[:_MOST_DOCUMENTS]:
        gathered.follow(gathered.read(document_id))
    gathered.truncated |= len(behind) > _MOST_DOCUMENTS
    cause = next((str(each) for each in behind if each in gathered.documents), None)
    began_at = min((each.read_at or each.created_at for each in gathered.documents.values()), default=None)
    if began_at is None:  # its documents are being deleted
        return None
    told = Entry("edge", str(edge.id), cause, said_of(edge, one.name, other.name), began_at)
    return record(gathered, "edge", str(edge_id), told)


def of_artefact(conn: Connection, sees: int | None, key: str) -> Record | None:
    """By the job, video or document that the file belongs to. None: nothing is known of any."""
    match = _ROOT.match(key)
    organization_id = int(match[1]) if match else None
    if organization_id is None or sees not in (None, organization_id):
        return None
    gathered = Gathered(conn, organization_id)
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
        if owner.id in gathered.videos:
            video, first = gathered.videos[owner.id], min(gathered.legs.values(), key=lambda leg: leg.id, default=None)
            began_at = video.created_at if video is not None else first.created_at if first is not None else None
            cause = str(owner.id)
    if began_at is None:
        return None
    told = Entry("artefact", key, cause, PurePosixPath(key).name, began_at)
    return record(gathered, "artefact", key, told)
