"""Documents with known facts, and a model that tells them: truly, or with mistakes of every kind."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg.types.json import Jsonb

from actors.extract_graph.job import ExtractGraph, extract_graph
from agentflow import settings
from agentflow.errors import Transient, Wait
from agentflow.jobs import claims
from agentflow.jobs.model import Job
from agentflow.jobs.requests import NewJob
from agentflow.knowledge import graph, graph_matches
from agentflow.knowledge.clusters import Match
from agentflow.knowledge.graph import Entity, Mention, Relation, Span
from agentflow.system import System
from agentflow.worker.running import JobContext, Running
from tests.openrouter_server import Asked, ModelServer

ORGANIZATION = 1


@dataclass(frozen=True)
class Thing:
    """`names` as the texts have them, the first most of all."""

    type: str
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Fact:
    """A sentence that says that `one` does something to `other`; `names` are the two as they are called in it."""

    one: Thing
    predicate: str
    other: Thing
    names: tuple[str, str]
    sentence: str
    valid_from: str | None = None
    valid_quote: str | None = None


def person(*names: str) -> Thing:
    return Thing("person", names)


def organization(*names: str) -> Thing:
    return Thing("organization", names)


def place(*names: str) -> Thing:
    return Thing("place", names)


def product(*names: str) -> Thing:
    return Thing("product", names)


IVANOVA = person("Мария Сергеевна Иванова", "Мария Иванова", "М. С. Иванова")
SEMENOV = person("Алексей Семёнов", "Aleksey Semenov")
HUGHES = person("Margaret Hughes", "M. Hughes")
CHEN = person("David Chen")
CHENG = person("David Cheng")
ROMASHKA = organization("ООО «Ромашка»", "Ромашка", "Romashka LLC")
ROMASHKA_PLUS = organization("ООО «Ромашка Плюс»")
ACME = organization("Acme Corporation", "Acme")
BOLT = organization("Bolt GmbH", "Bolt")
MOSCOW = place("Москва", "Moscow")
KAZAN = place("Казань", "Kazan")
BERLIN = place("Berlin")
ATLAS_3, ATLAS_4 = product("Atlas 3"), product("Atlas 4")

FACTS = (
    Fact(
        IVANOVA,
        "leads",
        ROMASHKA,
        ("Мария Сергеевна Иванова", "ООО «Ромашка»"),
        "Мария Сергеевна Иванова возглавляет ООО «Ромашка» с 14 марта 2019 года.",
        "2019-03-14",
        "с 14 марта 2019 года",
    ),
    Fact(ROMASHKA, "located_in", MOSCOW, ("ООО «Ромашка»", "Москва"), "ООО «Ромашка»: Москва, улица Лесная, дом 5."),
    Fact(
        IVANOVA,
        "works_for",
        ROMASHKA,
        ("М. С. Иванова", "Ромашка"),
        "Договор за компанию «Ромашка» подписала М. С. Иванова.",
    ),
    Fact(
        SEMENOV,
        "works_for",
        ROMASHKA,
        ("Алексей Семёнов", "Ромашка"),
        "Алексей Семёнов работает в фирме «Ромашка» инженером.",
    ),
    Fact(
        SEMENOV,
        "works_for",
        ROMASHKA,
        ("Aleksey Semenov", "Romashka LLC"),
        "Aleksey Semenov is an engineer at Romashka LLC.",
    ),
    Fact(
        ROMASHKA_PLUS,
        "part_of",
        ROMASHKA,
        ("ООО «Ромашка Плюс»", "ООО «Ромашка»"),
        "ООО «Ромашка Плюс» входит в ООО «Ромашка».",
    ),
    Fact(
        ROMASHKA_PLUS,
        "located_in",
        KAZAN,
        ("ООО «Ромашка Плюс»", "Казань"),
        "Город регистрации ООО «Ромашка Плюс» — Казань.",
    ),
    Fact(ROMASHKA, "uses", ATLAS_3, ("ООО «Ромашка»", "Atlas 3"), "На складе ООО «Ромашка» работает Atlas 3."),
    Fact(
        ACME, "makes", ATLAS_3, ("Acme Corporation", "Atlas 3"), "Acme Corporation sells Atlas 3 in twelve countries."
    ),
    Fact(
        ACME,
        "makes",
        ATLAS_4,
        ("Acme", "Atlas 4"),
        "Atlas 4 has been made by Acme since May 2023.",
        "2023-05",
        "since May 2023",
    ),
    Fact(
        HUGHES,
        "founded",
        ACME,
        ("Margaret Hughes", "Acme Corporation"),
        "Margaret Hughes founded Acme Corporation in 1998.",
        "1998",
        "in 1998",
    ),
    Fact(
        HUGHES,
        "leads",
        ACME,
        ("M. Hughes", "Acme Corporation"),
        "The board of Acme Corporation is chaired by M. Hughes.",
    ),
    Fact(
        ACME, "located_in", BERLIN, ("Acme Corporation", "Berlin"), "Acme Corporation moved its head office to Berlin."
    ),
    Fact(CHEN, "works_for", ACME, ("David Chen", "Acme"), "David Chen joined Acme as an accountant."),
    Fact(CHENG, "works_for", BOLT, ("David Cheng", "Bolt GmbH"), "David Cheng is the chief lawyer of Bolt GmbH."),
    Fact(BOLT, "works_with", ACME, ("Bolt", "Acme"), "Bolt has been a supplier of Acme for years."),
    Fact(BOLT, "located_in", BERLIN, ("Bolt GmbH", "Berlin"), "The workshops of Bolt GmbH are in Berlin."),
    Fact(
        ROMASHKA,
        "works_with",
        ACME,
        ("Romashka LLC", "Acme"),
        "Romashka LLC buys from Acme through its office in Moscow.",
    ),
    Fact(
        ROMASHKA,
        "located_in",
        MOSCOW,
        ("Romashka LLC", "Moscow"),
        "The office of Romashka LLC in Moscow has forty people.",
    ),
    Fact(
        ROMASHKA_PLUS,
        "located_in",
        KAZAN,
        ("ООО «Ромашка Плюс»", "Kazan"),
        "ООО «Ромашка Плюс» is registered in Kazan, too.",
    ),
)
THINGS = tuple(dict.fromkeys(thing for fact in FACTS for thing in (fact.one, fact.other)))
FILLING = (
    "Погода в тот день была ясной, и совещание началось вовремя.",
    "The minutes were approved without a vote.",
    "Приложение к протоколу хранится в архиве отдела.",
    "Nobody asked for the floor after lunch.",
)


def texts(facts: Sequence[Fact] = FACTS, each: int = 2) -> list[str]:
    """The sentences as chunks, with others between them, and white space as extracted text has it."""
    found = []
    for first in range(0, len(facts), each):
        lines = []
        for number, fact in enumerate(facts[first : first + each]):
            lines += [FILLING[(first + number) % len(FILLING)], fact.sentence.replace(" ", "\n", 1)]
        found.append("  \n".join(lines))
    return found


def add_document(
    conn: psycopg.Connection,
    chunks: Sequence[str],
    *,
    title: str = "Protocol",
    organization_id: int = ORGANIZATION,
    kind: str = "text",
    places: Sequence[dict[str, Any]] | None = None,
    facts: dict[str, Any] | None = None,
) -> UUID:
    """A document as reading leaves it."""
    id_ = uuid4()
    conn.execute(
        "insert into agentflow.documents (id, organization_id, source_id, title, kind, text, facts)"
        " values (%s, %s, %s, %s, %s, %s, %s)",
        (id_, organization_id, str(id_), title, kind, "\n\n".join(chunks), Jsonb(facts or {})),
    )
    write_chunks(conn, id_, chunks, organization_id=organization_id, places=places)
    return id_


def write_chunks(
    conn: psycopg.Connection,
    document_id: UUID,
    chunks: Sequence[str],
    *,
    organization_id: int = ORGANIZATION,
    places: Sequence[dict[str, Any]] | None = None,
) -> None:
    conn.execute("delete from agentflow.chunks where document_id = %s", (document_id,))
    at = 0
    for position, text in enumerate(chunks):
        where = places[position] if places else {"page": position + 1}
        conn.execute(
            "insert into agentflow.chunks (organization_id, document_id, position, key, text, start_offset, end_offset,"
            " tokens, place) values (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                *(organization_id, document_id, position, hashlib.sha256(text.encode()).digest(), text, at),
                *(at + len(text), 400, Jsonb(where)),
            ),
        )
        at += len(text) + 2


# ---- the model ----


@dataclass
class Teller:
    """What the model answers. `share` is of mistakes, which come on top of what is true: 0.3 is three for ten facts."""

    facts: Collection[Fact] = FACTS
    share: float = 0.0
    seed: int = 7
    missed_at_first: Collection[Fact] = ()

    def __post_init__(self) -> None:
        self.meant: dict[tuple[str, str], Thing] = {
            (thing.type, name): thing for fact in self.facts for thing in (fact.one, fact.other) for name in thing.names
        }
        self.mistakes = 0
        self.compared: list[tuple[str, str]] = []

    def __call__(self, asked: Asked) -> Any:
        return self.found(asked.text) if asked.schema == "found" else self.verdict(asked.text)

    def found(self, question: str) -> dict[str, Any]:
        passages = re.split(r"\n\n\[\d+\] ", "\n\n" + question[question.index("\n[1] ") + 1 :])[1:]
        second = "These were found already" in question
        rng = random.Random(f"{self.seed} {question}")
        entities: list[dict[str, Any]] = []
        relations: list[dict[str, Any]] = []
        told: list[tuple[dict[str, Any], Fact, str, re.Match[str]]] = []
        for number, passage in enumerate(passages, 1):
            for fact in self.facts:
                if (place := re.search(fact.sentence.replace(" ", r"\s+").replace(".", r"\."), passage)) is None:
                    continue
                if (fact in self.missed_at_first) != second:
                    continue
                told += [(each, fact, passage, place) for each in self._told(fact, number, place.start())]
        mistaken = [self._wrong(*each, rng) for each in rng.sample(told, round(self.share * len(told)))]
        self.mistakes += len(mistaken)
        for each in [*(true for true, *_ in told), *mistaken]:
            (entities if "name" in each else relations).append(each)
        rng.shuffle(entities)
        rng.shuffle(relations)
        return {"entities": entities, "relations": relations}

    @staticmethod
    def _told(fact: Fact, number: int, start: int) -> list[dict[str, Any]]:
        where = {"passage": number, "quote": fact.sentence, "start": start}
        ends = [
            {"name": name, "type": t.type, **where} for name, t in zip(fact.names, (fact.one, fact.other), strict=True)
        ]
        when = {"valid_from": fact.valid_from, "valid_to": None, "valid_quote": fact.valid_quote}
        relation = {"subject": fact.names[0], "predicate": fact.predicate, "object": fact.names[1]}
        return [*ends, {**relation, **where, **when}]

    def _wrong(
        self, true: dict[str, Any], fact: Fact, passage: str, place: re.Match[str], rng: random.Random
    ) -> dict[str, Any]:
        mistakes: list[Callable[[], dict[str, Any]]] = [
            lambda: {**true, "start": true["start"] + rng.randrange(-30, 30), "passage": rng.randrange(0, 9)},
            lambda: {**true, "quote": passage[place.start() + 3 : place.end() + 3]},
            lambda: {**true, "quote": "As everybody knows, " + true["quote"]},
        ]
        if "name" in true:
            mistakes += [
                lambda: {**true, "name": "Nikola Tesla", "type": "person"},
                lambda: {**true, "name": "Global Dynamics", "type": "organization", "quote": "Global Dynamics pays."},
                lambda: {**true, "type": "mood"},
                lambda: {**true, "name": true["name"].upper()},
                lambda: {**true, "name": true["name"].lower()},
                lambda: {**true, "name": self._misspelled(true["name"], true["type"], rng)},
            ]
        else:
            other = rng.choice(
                [name for thing in THINGS if thing not in (fact.one, fact.other) for name in thing.names]
            )
            mistakes += [
                lambda: {**true, "predicate": "hates"},
                lambda: {**true, "object": other, "quote": f"{true['subject']} knows {other}."},
                lambda: {**true, "object": "Nikola Tesla"},
                lambda: {**true, "subject": true["subject"].upper()},
                lambda: {**true, "valid_from": "1815", "valid_quote": "since 1815"},
            ]
        return rng.choice(mistakes)()

    def _misspelled(self, name: str, type_: str, rng: random.Random) -> str:
        """Another spelling, of which the model will say that it is the same."""
        words = name.split()
        at = max(range(len(words)), key=lambda n: len(words[n]) if words[n].isalpha() else 0)
        letter = rng.randrange(1, len(words[at]) - 1) if len(words[at]) > 2 else 0
        words[at] = words[at][: letter + 1] + words[at][letter:]  # a doubled letter
        other = " ".join(words)
        self.meant.setdefault((type_, other), self.meant[type_, name])
        return other

    def verdict(self, question: str) -> dict[str, Any]:
        found = re.search(r"same (\w+)\?", question)
        assert found
        one, other = (re.search(rf"^{n}\. (.*?)(?: \(\".*)?$", question, re.M | re.S) for n in (1, 2))
        names = [(found[1], match[1].split(' ("')[0]) for match in (one, other) if match]
        self.compared.append((names[0][1], names[1][1]))
        things = [self.thing(*name) for name in names]
        return {"same": things[0] is not None and things[0] == things[1]}

    def thing(self, type_: str, name: str) -> Thing | None:
        folded = {(t, n.casefold()): thing for (t, n), thing in self.meant.items()}
        return folded.get((type_, name.casefold()))


# ---- runs ----


class Runs:
    """Jobs to extract graphs, run in this process as a worker would."""

    def __init__(self, system: System, conn: psycopg.Connection, **named: str) -> None:
        found = settings.load(named)
        update = {name.lower(): getattr(found, name.lower()) for name in named}
        self.system = System(system.settings.model_copy(update=update), "test")
        self.conn = conn

    def run(self, document_id: UUID, *, organization_id: int = ORGANIZATION, **payload: Any) -> dict[str, Any]:
        job = self.submit(document_id, organization_id=organization_id, **payload)
        (job,), _ = claims.claim(self.conn, [job.id], uuid4(), 600.0)
        try:
            return self._perform(job, document_id, payload)
        finally:
            # No worker that a test starts takes it for the job of a dead one.
            self.conn.execute("delete from agentflow.jobs where id = %s", (job.id,))

    def _perform(self, job: Job, document_id: UUID, payload: dict[str, Any]) -> dict[str, Any]:
        for _ in range(20):
            context = JobContext(Running(job, time.monotonic() + 600), self.system)
            try:
                return extract_graph(context, ExtractGraph.model_validate_json(_json(document_id, payload)))
            except Wait as error:
                time.sleep(error.seconds)
            except Transient:
                if job.attempt == job.max_attempts:
                    raise
                job = replace(job, attempt=job.attempt + 1)
        raise AssertionError("it never ended")

    def submit(self, document_id: UUID, *, organization_id: int = ORGANIZATION, **payload: Any) -> Any:
        new = NewJob("extract_graph", {"document_id": str(document_id), **payload})
        return self.system.submit(organization_id, new).job


def _json(document_id: UUID, payload: dict[str, Any]) -> str:
    return ExtractGraph(document_id=document_id, **payload).model_dump_json()


def local(vendor: ModelServer) -> dict[str, str]:
    """Settings of a server for chat alone: no embeddings."""
    return {"LLM_BASE_URL": vendor.url, "LLM_MODEL": "m", "LLM_TIMEOUT": "30"}


# ---- what is stored ----


def small_graph(conn: psycopg.Connection, organization_id: int) -> dict[str, str]:
    """A document, two connected things of which one has two names, and the ids of everything."""
    text = "Acme makes Atlas 3. Acme Corporation is old."
    document = add_document(conn, [text], organization_id=organization_id)
    source = graph.read_source(conn, organization_id, document)
    assert source is not None
    acme, whole, atlas = (
        Entity("organization", "Acme"),
        Entity("organization", "Acme Corporation"),
        Entity("product", "Atlas 3"),
    )
    first, second = (Span(source.chunks[0].key, *place) for place in ((0, 19), (20, 44)))
    mentions = {Mention(acme, first), Mention(atlas, first), Mention(whole, second)}
    assert graph.store(conn, source, mentions, [Relation(acme, "makes", atlas, first)]) == "stored"
    one, other = sorted(graph.entity_id(organization_id, each) for each in (acme, whole))
    graph_matches.decide(conn, organization_id, [(Match(one, other, True), "names")])
    acme_id, atlas_id = (graph.entity_id(organization_id, each) for each in (acme, atlas))
    ids = {"document": document, "entity": acme_id, "from": acme_id, "to": atlas_id}
    ids |= {"edge": graph.edge_id(acme_id, "makes", atlas_id), "merge": graph_matches.match_id(one, other)}
    return {f"{name}_id": str(id_) for name, id_ in ids.items()}


TABLES = ("graph_entities", "graph_mentions", "graph_edges", "graph_evidence", "graph_matches")


def dump(conn: psycopg.Connection) -> dict[str, list[Any]]:
    """All rows of the graph but for the times at which they were written."""
    return {
        table: conn.execute(
            f"select to_jsonb(t) - 'decided_at' from agentflow.{table} t order by (to_jsonb(t) - 'decided_at')::text"  # noqa: S608
        ).fetchall()
        for table in TABLES
    }


def things(conn: psycopg.Connection) -> set[tuple[str, frozenset[str]]]:
    """Each thing of the graph by type and names."""
    rows = conn.execute(
        "select type, array_agg(name) from agentflow.graph_entities group by organization_id, type, root_id"
    ).fetchall()
    return {(type_, frozenset(names)) for type_, names in rows}


def quotes(conn: psycopg.Connection, table: str) -> list[str]:
    rows = conn.execute(
        f"select c.text, t.start_offset, t.end_offset from agentflow.{table} t"  # noqa: S608
        " join agentflow.chunks c on c.document_id = t.document_id and c.key = t.chunk_key"
    ).fetchall()
    return [text[start:end] for text, start, end in rows]
