"""The vectors of chunks: making those that are missing, and deleting those that no chunk has any more.

A vector belongs to a chunk's key (the hash of its text) and a model, so a text that stands in ten documents is paid once, and
a new version of a document costs what is new in it. Vectors appear only for chunks that are there: whoever writes them and
whoever deletes them take the organization's lock, and look at the chunks after they have it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from agentflow import log
from agentflow.database import Connection
from agentflow.errors import JobError, Permanent, Transient
from agentflow.knowledge import embedding_models, vector_index
from agentflow.knowledge.embedding import TEXTS_AT_ONCE, TOKENS_AT_ONCE, Refused, Vector
from agentflow.knowledge.embedding_models import EmbeddingModel
from agentflow.models.client import Caller, Placed

if TYPE_CHECKING:
    from agentflow.system import System
    from agentflow.worker.running import JobContext

logger = log.get(__name__)

_PAGE: Final = 500
#: A server's hiccup should not cost a whole attempt of the job, of which there are five.
_TRIES: Final = 3
_PAUSE_S: Final = 1.0


class NoVectors(Permanent):
    """Postgres lacks pgvector."""

    def __init__(self, why: str) -> None:
        super().__init__(
            "Postgres needs the extension pgvector 0.8 or newer for this: install it at the server, then run"
            f" `create extension vector` as a role that may ({why})",
            code="pgvector_missing",
        )


@dataclass(frozen=True, slots=True)
class Missing:
    """A text without a vector."""

    key: bytes
    text: str
    tokens: int


class Spending:
    """Passes on what a caller spends, and adds it up."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.measures: dict[str, float] = {}

    def check(self) -> None:
        self._caller.check()

    def spent(self, **measures: float) -> None:
        for name, value in measures.items():
            self.measures[name] = self.measures.get(name, 0.0) + value
        self._caller.spent(**measures)


class PlacedSpending(Spending):
    """Of a caller that limits hold back."""

    def __init__(self, caller: Placed) -> None:
        super().__init__(caller)
        self.permit = caller.permit
        self.refused = caller.refused
        self.exhausted = caller.exhausted


def spending_of(caller: Caller) -> Spending:
    return PlacedSpending(caller) if isinstance(caller, Placed) else Spending(caller)


def why_not(conn: Connection) -> str | None:
    """Why there can be no vectors in this database; None: there can."""
    row = conn.execute("select agentflow.prepare_vectors_1()").fetchone()
    return str(row[0]) if row is not None and row[0] is not None else None


def to_fill(system: System, caller: Caller) -> list[EmbeddingModel]:
    """The models that want vectors: the active one, and one that is being filled. The first ever is the settings'.

    Raises NoVectors, and what `Embeddings` does.
    """
    with system.database.connection() as conn:
        if why := why_not(conn):
            raise NoVectors(why)
        models = [model for model in embedding_models.every(conn) if model.state != "old"]
    if models:
        return models
    provider, name = system.embeddings.configured()
    dimensions = system.embeddings.dimensions(caller, provider, name)
    with system.database.transaction() as conn:
        prefixes = system.embeddings.prefixes(provider)
        added = embedding_models.add(conn, provider, name, dimensions, *prefixes, state="active")
    return [added] if added is not None else to_fill(system, caller)


def embed_missing(context: JobContext, document_id: UUID, *, share_done: float, share_end: float) -> dict[str, Any]:
    """Make the vectors that a document's chunks lack. What was committed before a kill is not made again.

    Returns `model` (the active one), `vectors` (how many were made), `reused`, `refused`, and what it cost as far as the
    provider says: `tokens_in`, `usd`. Raises NoVectors, and what `Embeddings` does.
    """
    system, organization_id = context.system, context.job.organization_id
    spending = spending_of(context)
    made = refused = 0
    while True:
        models = to_fill(system, spending)
        for nth, model in enumerate(models):
            with system.database.connection() as conn:
                texts, lacking = count(conn, organization_id, model, document_id)
            done = 0
            for stored in fill(system, context, spending, organization_id, model, document_id):
                done += stored.made + stored.refused
                made += stored.made
                refused += stored.refused
                part = (nth + min(1.0, done / max(1, lacking))) / len(models)
                context.progress(share_done + (share_end - share_done) * part, "vectors")
            vector_index.ensure(system, organization_id, model)
        if {model.id for model in to_fill(system, spending)} <= {model.id for model in models}:
            break  # else one was added meanwhile
    context.progress(share_end, "vectors")
    reused = max(0, texts * len(models) - made - refused)
    cost = {name: value for name, value in spending.measures.items() if name in ("tokens_in", "usd")}
    return {"model": models[0].title, "vectors": made, "reused": reused, "refused": refused, **cost}


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a batch."""

    made: int
    refused: int
    tokens: int


def fill(
    system: System,
    context: JobContext,
    caller: Caller,
    organization_id: int,
    model: EmbeddingModel,
    document_id: UUID | None = None,
) -> Iterator[Stored]:
    """Make what a document, or all of an organization, lacks; yields after each batch, which is committed by then. Ends where
    the model is given up or replaced meanwhile."""
    after = b""
    while True:
        with system.database.connection() as conn:
            page = _missing(conn, organization_id, model, document_id, after)
        if not page:
            return
        after = page[-1].key
        for batch in batches(page):
            found = _patiently(system, context, caller, model, [missing.text for missing in batch])
            with system.database.transaction() as conn:
                if not _store(conn, organization_id, model, batch, found):
                    return
            refused = sum(isinstance(each, Refused) for each in found)
            yield Stored(len(batch) - refused, refused, sum(missing.tokens for missing in batch))


def batches(missing: Sequence[Missing]) -> Iterator[list[Missing]]:
    """In order, within the budgets; what is over the budget by itself goes alone."""
    batch: list[Missing] = []
    tokens = 0
    for each in missing:
        if batch and (len(batch) == TEXTS_AT_ONCE or tokens + each.tokens > TOKENS_AT_ONCE):
            yield batch
            batch, tokens = [], 0
        batch.append(each)
        tokens += each.tokens
    if batch:
        yield batch


def count(
    conn: Connection, organization_id: int, model: EmbeddingModel, document_id: UUID | None = None
) -> tuple[int, int]:
    """How many different texts there are, and how many of them lack this model's vector.

    Under the organization's lock: a deletion that is under way is waited for.
    """
    with conn.transaction():
        _lock(conn, organization_id, shared=True)
        row = conn.execute(
            "select count(*), count(*) filter (where v.chunk_key is null) from ("
            "select distinct c.organization_id, c.key from agentflow.chunks c where c.organization_id = %s"
            " and (%s::uuid is null or c.document_id = %s)) c left join agentflow.vectors v"
            " on v.organization_id = c.organization_id and v.model_id = %s and v.chunk_key = c.key",
            (organization_id, document_id, document_id, model.id),
        ).fetchone()
    return (int(row[0]), int(row[1])) if row is not None else (0, 0)


def volume(conn: Connection) -> tuple[int, int]:
    """Of all organizations: how many different texts, and about how many tokens they are."""
    row = conn.execute(
        "select count(*), coalesce(sum(c.tokens), 0) from (select distinct on (organization_id, key) tokens"
        " from agentflow.chunks order by organization_id, key) c"
    ).fetchone()
    return (int(row[0]), int(row[1])) if row is not None else (0, 0)


def extent(conn: Connection, model: EmbeddingModel) -> tuple[int, int]:
    """Of all organizations: how many vectors a model has, and how many texts lack one."""
    row = conn.execute(
        "select (select count(*) from agentflow.vectors v where v.model_id = %s and v.vector is not null),"
        " (select count(*) from (select distinct organization_id, key from agentflow.chunks) c"
        " where not exists (select from agentflow.vectors v where v.organization_id = c.organization_id"
        " and v.model_id = %s and v.chunk_key = c.key))",
        (model.id, model.id),
    ).fetchone()
    return (int(row[0]), int(row[1])) if row is not None else (0, 0)


def drop_orphans(conn: Connection, organization_id: int, keys: Collection[bytes]) -> int:
    """Delete the vectors of those keys that no chunk of the organization has any more, in the caller's transaction, which
    has deleted the chunks. Until it ends, no vectors of the organization are written."""
    if not keys:
        return 0
    row = conn.execute("select to_regclass(%s)", ("agentflow.vectors",)).fetchone()
    if row is None or row[0] is None:
        return 0
    _lock(conn, organization_id, shared=False)
    return conn.execute(
        "delete from agentflow.vectors v where v.organization_id = %s and v.chunk_key = any (%s)"
        " and v.model_id in (select id from agentflow.embedding_models)"
        " and not exists (select from agentflow.chunks c where c.organization_id = v.organization_id and c.key = v.chunk_key)",
        (organization_id, list(keys)),
    ).rowcount


def _missing(
    conn: Connection, organization_id: int, model: EmbeddingModel, document_id: UUID | None, after: bytes
) -> list[Missing]:
    with conn.cursor(row_factory=class_row(Missing)) as cursor:
        return cursor.execute(
            "select distinct on (c.key) c.key, c.text, c.tokens from agentflow.chunks c where c.organization_id = %s"
            " and (%s::uuid is null or c.document_id = %s) and c.key > %s and not exists (select from agentflow.vectors v"
            " where v.organization_id = c.organization_id and v.model_id = %s and v.chunk_key = c.key)"
            " order by c.key limit %s",
            (organization_id, document_id, document_id, after, model.id, _PAGE),
        ).fetchall()


def _patiently(
    system: System, context: JobContext, caller: Caller, model: EmbeddingModel, texts: list[str]
) -> list[Vector | Refused]:
    for further in range(_TRIES - 1, -1, -1):
        try:
            found = system.embeddings.passages(caller, model, texts)
            if model.provider == "local":
                context.joined_by(system.embeddings.encoder_pid)
            else:
                context.memory_done()
            return found
        except Transient as error:
            if not further:
                raise
            _note(model, error)
            context.sleep(max(_PAUSE_S, error.retry_after_s or 0.0))
    raise AssertionError("not reached")


def _note(model: EmbeddingModel, error: JobError) -> None:
    logger.info("a batch of texts is asked for again", model=model.title, code=error.code)


def _store(
    conn: Connection,
    organization_id: int,
    model: EmbeddingModel,
    batch: Sequence[Missing],
    found: Sequence[Vector | Refused],
) -> bool:
    """Of chunks that are gone by now nothing is written, nor of a model that is an old one by now: False."""
    if not embedding_models.hold(conn, model.id):
        return False
    _lock(conn, organization_id, shared=True)
    vector_index.find_types(conn)
    conn.execute(
        "insert into agentflow.vectors (organization_id, model_id, chunk_key, vector, error)"
        " select %s, %s, n.key, n.vector::halfvec, n.error"
        " from unnest(%s::bytea[], %s::text[], %s::jsonb[]) n(key, vector, error)"
        " where exists (select from agentflow.chunks c where c.organization_id = %s and c.key = n.key)"
        " on conflict do nothing",
        (
            organization_id,
            model.id,
            [missing.key for missing in batch],
            [None if isinstance(each, Refused) else each for each in found],
            [
                Jsonb({"code": each.code, "message": each.message}) if isinstance(each, Refused) else None
                for each in found
            ],
            organization_id,
        ),
    )
    return True


def _lock(conn: Connection, organization_id: int, *, shared: bool) -> None:
    """Until the transaction ends."""
    function = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
    conn.execute(f"select {function}(hashtextextended('vectors of ' || %s, 7))".encode(), (organization_id,))


def delete_some(conn: Connection, organization_id: int, model_id: int, limit: int = 2000) -> int:
    """A part of an organization's vectors of an old model; 0 when none is left."""
    return conn.execute(
        "delete from agentflow.vectors where organization_id = %s and model_id = %s and chunk_key in ("
        "select chunk_key from agentflow.vectors where organization_id = %s and model_id = %s limit %s)",
        (organization_id, model_id, organization_id, model_id, limit),
    ).rowcount
