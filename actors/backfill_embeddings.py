"""Takes the knowledge base from one embedding model to another."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from agentflow.jobs.registry import Payload, job
from agentflow.knowledge import switching
from agentflow.worker.running import JobContext


class BackfillEmbeddings(Payload):
    model: Annotated[str, Field(min_length=3, max_length=300)]  # provider/name


# The operator's, for all organizations at once: two of them would only make the same vectors.
@job(
    "backfill_embeddings",
    payload=BackfillEmbeddings,
    priority="low",
    time_limit_s=7 * 86_400.0,
    concurrency=lambda _: ("backfill_embeddings", 1),
    public=False,
)
def backfill_embeddings(context: JobContext, payload: BackfillEmbeddings) -> dict[str, Any]:
    """Make all vectors anew with another model, search with it from then on, and delete the old ones."""
    return switching.switch(context, payload.model)
