"""The models that make the knowledge base's vectors, for the operator's key."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, ConfigDict, Field

from agentflow.jobs.requests import NewJob
from agentflow.knowledge import embedding_models, switching, vectors
from agentflow.organizations import DEFAULT_ORGANIZATION
from web import jobs
from web.api import Answer, Body, Call, Routes, View
from web.problems import Refused, invalid

routes = Routes("embedding models")


class ModelView(View):
    model: str = Field(description="PROVIDER/NAME")
    dimensions: int
    state: str = Field(description="`active`: searched with; `backfilling`: being filled; `old`: being deleted")
    vectors: int = Field(description="Of all organizations")
    missing: int = Field(description="Texts that have none yet; those that a model refuses are not among them")
    created_at: datetime


class ModelList(View):
    models: list[ModelView] = Field(description="The active one first; empty before the first document")
    problem: str | None = Field(description="Why there can be no vectors in this database; null: there can")


class SwitchRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "openrouter/openai/text-embedding-3-small"}]})

    model: Annotated[str, Field(min_length=3, max_length=300), AfterValidator(jobs.storable)] = Field(
        description="PROVIDER/NAME; the provider is `local`, `server` (EMBEDDINGS_BASE_URL) or `openrouter`"
    )


class SwitchStarted(View):
    job_id: UUID = Field(description="Its `stage` says how far it is, how long it will take and what it will cost")
    texts: int = Field(description="How many vectors it is about")
    tokens: int = Field(description="And about how much text")


class Discarded(View):
    model: str | None = Field(description="What is given up; null: no switch was under way")


@routes.get("/api/knowledge/models", {200: ModelList}, scope="admin")
def list_models(call: Call) -> ModelList:
    """List the embedding models, and how far each is filled."""
    with call.system.database.connection() as conn:
        problem = vectors.why_not(conn)
        found = [] if problem else [(model, *vectors.extent(conn, model)) for model in embedding_models.every(conn)]
    return ModelList(
        models=[
            ModelView(
                model=model.title,
                dimensions=model.dimensions,
                state=model.state,
                vectors=made,
                missing=missing,
                created_at=model.created_at,
            )
            for model, made, missing in found
        ],
        problem=problem,
    )


@routes.post("/api/knowledge/models", {202: SwitchStarted}, body=SwitchRequest, scope="admin", problems=(409,))
def switch_model(call: Call, body: SwitchRequest) -> Answer:
    """Switch to another embedding model: a job fills it, searches go on with the old one until then.

    Name the active model to make vectors that are missing. One switch at a time: 409 while another is under way.
    """
    try:
        switching.parse(body.model)
    except switching.WrongModel as error:
        raise invalid("model", str(error)) from None
    with call.system.transaction() as transaction:
        if why := vectors.why_not(transaction.conn):
            raise Refused(409, str(vectors.NoVectors(why)))
        filling = embedding_models.of_state(transaction.conn, "backfilling")
        if filling is not None and filling.title != body.model:
            raise Refused(409, f"a switch to {filling.title} is under way: let it end, or discard it")
        texts, tokens = vectors.volume(transaction.conn)
        submitted = transaction.submit(DEFAULT_ORGANIZATION, NewJob("backfill_embeddings", {"model": body.model}))
    return Answer(SwitchStarted(job_id=submitted.job.id, texts=texts, tokens=tokens), 202)


@routes.post("/api/knowledge/models/discard", {200: Discarded}, scope="admin")
def discard_model(call: Call) -> Discarded:
    """Give up a switch that is under way; the active model stays, what was made of the other is deleted by a job."""
    with call.system.transaction() as transaction:
        return Discarded(model=switching.discard(transaction))
