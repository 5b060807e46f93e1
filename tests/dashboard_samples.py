"""Knowledge and CRM accounts to see in the dashboard: a handbook, a film with keyframes, their graph; mirrors of accounts."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
from PIL import Image, ImageDraw
from psycopg.types.json import Jsonb

from agentflow.knowledge import graph, graph_matches
from agentflow.knowledge.clusters import Match
from agentflow.knowledge.graph import Entity, Mention, Relation, Span, Validity
from agentflow.storage import Storage
from tests.dashboard_support import uuid_at
from tests.graph_support import FACTS, Fact, write_chunks

#: A fact of the film is said in its chunk of so many seconds.
CHUNK_S: Final = 12.0
KEYFRAME_S: Final = 5.0


def knowledge(conn: psycopg.Connection, storage: Storage, organization_id: int = 1) -> dict[str, UUID]:
    """A handbook by pages, and the film of a visit, in which the same people and companies are spoken of."""
    said, written = FACTS[: len(FACTS) // 2], FACTS[len(FACTS) // 2 :]
    handbook = _document(conn, organization_id, "Supplier handbook", written, "pdf", age_s=86_400)
    film = _document(conn, organization_id, "A visit to the plant", said, "video", age_s=600)
    keyframes = [
        {"time_s": CHUNK_S * n + KEYFRAME_S, "key": f"o/{organization_id}/videos/visit/shot-{n + 1:04d}.jpg"}
        for n in range(len(said))
    ]
    for n, keyframe in enumerate(keyframes):
        storage.put_bytes(str(keyframe["key"]), picture(n), content_type="image/jpeg")
    conn.execute(
        "update agentflow.documents set facts = %s where id = %s",
        (Jsonb({"duration_s": CHUNK_S * len(said), "keyframes": keyframes}), film),
    )
    conn.execute(
        "update agentflow.chunks c set place = c.place || jsonb_build_object('thumbnail', (k->>'key'))"
        " from agentflow.documents d, jsonb_array_elements(d.facts->'keyframes') with ordinality a(k, n)"
        " where c.document_id = d.id and d.id = %s and n = c.position + 1",
        (film,),
    )
    return {"handbook": handbook, "film": film}


def _document(
    conn: psycopg.Connection, organization_id: int, title: str, facts: tuple[Fact, ...], kind: str, *, age_s: float
) -> UUID:
    """One chunk for each fact, and the graph that a model would have made of them."""
    film = kind == "video"
    places: list[dict[str, Any]] = [
        {"part": "transcript", "start_s": CHUNK_S * n, "end_s": CHUNK_S * (n + 1)} if film else {"page": n + 1}
        for n in range(len(facts))
    ]
    texts = [f"What follows was noted on the spot. {fact.sentence} Nobody objected." for fact in facts]
    at = datetime.now(UTC) - timedelta(seconds=age_s)
    id_ = uuid_at(at)
    conn.execute(
        "insert into agentflow.documents (id, organization_id, source_id, title, kind, text, language, size_bytes, video_id,"
        " source_url, created_at, updated_at, read_at) values (%s, %s, %s, %s, %s, %s, 'en', 48211, %s, %s, %s, %s, %s)",
        (
            *(id_, organization_id, title.lower(), title, kind, "\n\n".join(texts), uuid4() if film else None),
            *(None if film else "https://example.com/handbook.pdf", at, at, at),
        ),
    )
    write_chunks(conn, id_, texts, organization_id=organization_id, places=places)
    source = graph.read_source(conn, organization_id, id_)
    assert source is not None
    mentions, relations = set(), []
    for fact, chunk in zip(facts, source.chunks, strict=True):
        start = chunk.text.index(fact.sentence)
        span = Span(chunk.key, start, start + len(fact.sentence))
        one, other = (Entity(t.type, name) for t, name in zip((fact.one, fact.other), fact.names, strict=True))
        mentions |= {Mention(one, span), Mention(other, span)}
        validity = None
        if fact.valid_quote:
            begin = chunk.text.index(fact.valid_quote)
            validity = Validity(fact.valid_from, None, Span(chunk.key, begin, begin + len(fact.valid_quote)))
        relations.append(Relation(one, fact.predicate, other, span, validity))
    assert graph.store(conn, source, mentions, relations) == "stored"
    _merge(conn, organization_id, facts)
    return id_


def _merge(conn: psycopg.Connection, organization_id: int, facts: tuple[Fact, ...]) -> None:
    """Names of one thing are one."""
    names: dict[Any, set[str]] = {}
    for fact in facts:
        for thing, name in zip((fact.one, fact.other), fact.names, strict=True):
            names.setdefault(thing, set()).add(name)
    for thing, called in names.items():
        ids = sorted(graph.entity_id(organization_id, Entity(thing.type, name)) for name in called)
        found = [(Match(ids[0], other, True), "names") for other in ids[1:]]
        graph_matches.decide(conn, organization_id, found)


def picture(number: int) -> bytes:
    """Something to look at, another for each number."""
    image = Image.new("RGB", (320, 180), (30 + 17 * number % 120, 70, 110 + 11 * number % 90))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 120, 320, 180), fill=(70, 80, 74))
    draw.ellipse((40 + 23 * number % 180, 40, 110 + 23 * number % 180, 110), fill=(236, 200, 120))
    draw.rectangle((200, 60, 290, 130), fill=(120, 60 + 13 * number % 90, 60))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return data.getvalue()


def account(
    conn: psycopg.Connection,
    name: str = "Acme sales",
    *,
    organization_id: int = 1,
    age_s: float = 864_000,
    **columns: Any,
) -> UUID:
    values = {
        "id": uuid_at(datetime.now(UTC) - timedelta(seconds=age_s)), "organization_id": organization_id, "name": name,
        "base_url": "https://acme.kommo.com", "auth": "token", "state": "connected", "access_sealed": "sealed",
        "remote_id": 30_411, "created_at": datetime.now(UTC) - timedelta(seconds=age_s), **columns,
    }  # fmt: skip
    conn.execute(
        f"insert into agentflow.crm_accounts ({', '.join(values)}) values ({', '.join(['%s'] * len(values))})",  # noqa: S608
        list(values.values()),
    )
    found: UUID = values["id"]
    return found


def run(
    conn: psycopg.Connection, account_id: UUID, *, organization_id: int = 1, age_s: float = 60.0, **columns: Any
) -> UUID:
    began = datetime.now(UTC) - timedelta(seconds=age_s)
    values = {
        "id": uuid_at(began), "organization_id": organization_id, "account_id": account_id, "job_id": uuid4(),
        "mode": "incremental", "plan": False, "state": "succeeded", "calls": 14, "started_at": began,
        "finished_at": began + timedelta(seconds=3.4),
        "counts": {"leads": {"created": 3, "updated": 12}, "contacts": {"unchanged": 40}}, **columns,
    }  # fmt: skip
    values["counts"] = json.dumps(values["counts"])
    conn.execute(
        f"insert into agentflow.sync_runs ({', '.join(values)}) values ({', '.join(['%s'] * len(values))})",  # noqa: S608
        list(values.values()),
    )
    found: UUID = values["id"]
    return found


def accounts(conn: psycopg.Connection) -> UUID:
    """One in step, whose deletions wait; one whose grant was refused; one that has to be connected again."""
    hour = timedelta(hours=1)
    account(conn, "Bolt GmbH", age_s=900_000, state="needs_reauth",
            state_reason="its long-lived token has expired or was revoked", base_url="https://bolt.kommo.com")  # fmt: skip
    late = account(conn, "Romashka", auth="oauth", grant_refused_at=datetime.now(UTC) - hour, age_s=870_000,
                   access_expires_at=datetime.now(UTC) + 9 * hour, base_url="https://romashka.kommo.com")  # fmt: skip
    run(conn, late, age_s=7200)
    well = account(conn, deletions_held=41)
    run(conn, well, age_s=4000, state="failed", error="HTTP 502 from acme.kommo.com, five times", counts={})
    run(
        conn,
        well,
        age_s=900,
        mode="reconcile",
        state="held",
        calls=212,
        counts={"leads": {"unchanged": 8211, "held": 41}},
    )
    run(conn, well, age_s=600, mode="touched", calls=1, counts={"leads": {"updated": 1}})
    run(conn, well, age_s=90)
    conn.execute(
        "insert into agentflow.crm_drift (account_id, organization_id, entity_type, field, kind) values"
        " (%s, 1, 'leads', 'loss_forecast', 'object')",
        (well,),
    )
    for number in range(3):
        conn.execute(
            "insert into agentflow.crm_entities (account_id, organization_id, entity_type, entity_id, updated_at, read_at,"
            " seen_at, hash, version, deleted_at, data) values (%s, 1, 'leads', %s, 0, now(), now(), '', %s, %s, %s)",
            (well, 501 + number, number + 1, datetime.now(UTC) if number == 2 else None,
             Jsonb({"id": 501 + number, "name": f"Order of {number + 2} Atlas 3"})),
        )  # fmt: skip
    return well
