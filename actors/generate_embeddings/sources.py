"""Where a document's content comes from: brought to this machine as a file, with what is known of its kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from actors.generate_embeddings.readers.video import PARTS
from agentflow import USER_AGENT, fetch
from agentflow.errors import Permanent, Wait
from agentflow.jobs import records
from agentflow.knowledge.documents import Document
from agentflow.storage import NotStored
from agentflow.worker.running import JobContext

_DOWNLOAD_LIMIT_S: Final = 300.0
#: Until an analysis that has not ended is looked at again.
_ANALYSIS_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Local:
    """A file on this machine. `kind` None: its content will say."""

    path: Path
    kind: str | None = None
    name: str | None = None
    content_type: str | None = None


def bring(context: JobContext, document: Document, folder: Path) -> Local:
    """Raises Permanent where it is gone for good, Transient or Wait where it cannot be had just now."""
    if document.video_id is not None:
        return _analysis(context, document, folder)
    if document.source_url is not None:
        return _download(context, document, folder)
    assert document.storage_key is not None  # noqa: S101 - one of the three is there
    storage = context.system.storage
    path = storage.local_path(document.storage_key)
    if path is None or not path.exists():
        path = folder / "source"
        try:
            storage.fetch_to(document.storage_key, path)
        except NotStored as error:
            raise Permanent("The document's file is gone from storage: hand it in again.", code="file_gone") from error
    return Local(path, name=document.filename, content_type=document.content_type)


def _download(context: JobContext, document: Document, folder: Path) -> Local:
    settings = context.system.settings
    path = folder / "source"
    assert document.source_url is not None  # noqa: S101 - asked by the caller
    with path.open("wb") as file:
        fetched = fetch.download(
            document.source_url,
            file.write,
            guard=fetch.Guard(allow=settings.fetch_allow),
            max_bytes=settings.document_max_bytes,
            timeout_s=_DOWNLOAD_LIMIT_S,
            user_agent=USER_AGENT,
            should_stop=context.check,
        )
    return Local(path, name=fetched.filename, content_type=fetched.content_type)


def _analysis(context: JobContext, document: Document, folder: Path) -> Local:
    """What the newest analysis of the video says, as a file: the same analysis is the same file."""
    payload = {"video_id": str(document.video_id)}
    with context.system.database.connection() as conn:
        # One that makes this document asks for it just before it ends.
        ending = records.newest(
            conn, document.organization_id, "analyze_video", {**payload, "index": True}, ("queued", "running")
        )
        found = records.newest(conn, document.organization_id, "analyze_video", payload, ("succeeded",))
    if ending is not None:
        raise Wait(_ANALYSIS_S, "analysis_running", message="the video is being analysed")
    if found is None:
        raise Permanent(
            "The analysis of this video is not kept (any more): analyse it with index=true.", code="not_analysed"
        )
    result: dict[str, Any] = found.result or {}
    path = folder / "analysis.json"
    path.write_text(json.dumps({part: result.get(part) for part in PARTS}, sort_keys=True), encoding="utf-8")
    return Local(path, kind="video", name=result.get("filename"))
