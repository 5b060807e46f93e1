"""Video analysis: shots, keyframes and a contact sheet of a stored or linked video, in a child process; then what models say.

The file is streamed: a stored one is read in place where storage is a folder, a linked one is downloaded through the SSRF
guard. Pictures go to storage under a key of the job's, so that a second run writes the same keys. Before models are asked
the analysis goes there, too: a job that a model's limit has parked goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any
from uuid import UUID

from pydantic import Field

from actors.analyze_video import understanding
from actors.analyze_video.keeping import STORE_SHARE, Keeping
from agentflow import USER_AGENT, fetch, videos
from agentflow.errors import Permanent
from agentflow.jobs.model import Job
from agentflow.jobs.registry import Memory, Payload, job
from agentflow.knowledge import documents
from agentflow.storage import NotStored
from agentflow.system import System
from agentflow.videos import Video
from agentflow.worker.running import JobContext

_DOWNLOAD_SHARE = 0.2
# Where the local analysis ends: with models, without.
_LOCAL_END, _LOCAL_END_ALONE = 0.6, 0.98
_DOWNLOAD_LIMIT_S = 1800.0
#: Of 1080p, however long.
_GUESS_BYTES = 300 << 20


class AnalyzeVideo(Payload):
    video_id: UUID
    index: bool = Field(False, description="Make a document of the knowledge base of what was said and seen")


def folder(organization_id: int, job_id: UUID, payload: AnalyzeVideo) -> str:
    """Where an analysis keeps its files."""
    return f"o/{organization_id}/videos/{payload.video_id}/{job_id}"


def _size_of(system: System, running: Job) -> int | None:
    with system.database.connection() as conn:
        video = videos.get(conn, running.organization_id, UUID(running.payload["video_id"]))
    return video.size_bytes if video is not None else None


@job(
    "analyze_video",
    payload=AnalyzeVideo,
    queue="heavy",
    time_limit_s=3600.0,
    process_limit=lambda settings: settings.video_concurrency,
    memory=Memory(guess=lambda _size: _GUESS_BYTES, input_bytes=_size_of),
    files=folder,
)
def analyze_video(context: JobContext, payload: AnalyzeVideo) -> dict[str, Any]:
    """Find a video's shots, with the sharpest keyframe of each and a contact sheet; with models, what it is about."""
    organization = context.job.organization_id
    with context.system.database.connection() as conn:
        video = videos.get(conn, organization, payload.video_id)
    if video is None:
        raise Permanent(f"There is no video {payload.video_id}.", code="no_such_video")
    prefix = folder(organization, context.job.id, payload)
    with tempfile.TemporaryDirectory(prefix="agentflow-video-") as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        with Keeping(context, prefix, out) as keeping:
            analysis = _earlier(context, prefix) or _analyzed(context, video, Path(scratch), keeping)
            context.memory_done()
            analysis |= _understood(context, analysis, out, prefix)
    if payload.index:
        _index(context, video)
    return {"video_id": str(video.id), "filename": video.filename, **analysis}


def _index(context: JobContext, video: Video) -> None:
    """Whoever asked by the API has made the document already, and the job that reads it follows by itself."""
    job = context.job
    with context.system.transaction() as transaction:
        conn, organization = transaction.conn, job.organization_id
        document = documents.of_video(conn, organization, video.id, title=video.filename)
        if document.chain_id == job.id:
            return
        reading = dataclasses.replace(documents.reading(document.id, graph=False), idempotency_key=f"index:{job.id}")
        submitted = transaction.submit(organization, reading).job
        documents.ask(conn, document, chain_id=submitted.id, job_id=submitted.id)


def _analyzed(context: JobContext, video: Video, folder: Path, keeping: Keeping) -> dict[str, Any]:
    """What this machine finds, its files in storage."""
    source, share = _source(context, video, folder)
    context.sized(source.stat().st_size)
    settings = context.system.settings
    end = _LOCAL_END if understanding.wanted(context.system.models) else _LOCAL_END_ALONE
    analysis: dict[str, Any] = context.run_child(
        "actors.analyze_video.child:analyze",
        on_note=keeping.keep,
        source=str(source),
        out_dir=str(folder / "out"),
        share_done=share,
        share_end=end,
        max_pixels=settings.video_max_pixels,
        max_duration_s=settings.video_max_hours * 3600,
        resume=keeping.resume(),
        speech=understanding.wants_speech(context.system.models),
    )
    context.spent(video_min=analysis["video"]["duration_s"] / 60)
    keeping.store(analysis, share_done=end)
    if end == _LOCAL_END:
        context.system.storage.put_bytes(_earlier_key(keeping.prefix), json.dumps(analysis).encode())
    return analysis


def _earlier(context: JobContext, prefix: str) -> dict[str, Any] | None:
    """The analysis of an earlier run of this job, if it came so far."""
    if context.job.fence == 1:
        return None
    try:
        found: dict[str, Any] = json.loads(b"".join(context.system.storage.read(_earlier_key(prefix))))
    except NotStored:
        return None
    return found


def _earlier_key(prefix: str) -> str:
    return f"{prefix}/analysis.json"


def _understood(context: JobContext, analysis: dict[str, Any], out: Path, prefix: str) -> dict[str, Any]:
    """What models say about it. The chunks of sound were for them alone, and go."""
    storage = context.system.storage

    def local(file: dict[str, Any], folder: Path) -> Path:
        path = out / str(file["file"])
        if not path.exists():
            path = folder / path.name
            storage.fetch_to(file["key"], path)
        return path

    def store(name: str, data: bytes, content_type: str) -> str:
        storage.put_bytes(f"{prefix}/{name}", data, content_type=content_type)
        return f"{prefix}/{name}"

    done = _LOCAL_END + STORE_SHARE
    fields = understanding.understand(context, analysis, local, store, share_done=done)
    storage.delete(_earlier_key(prefix))  # first: it names the chunks
    for chunk in (analysis.pop("speech", None) or {}).get("chunks", ()):
        storage.delete(chunk["key"])
    return fields


def _source(context: JobContext, video: Video, folder: Path) -> tuple[Path, float]:
    """The file on this machine, and the share of the progress that getting it took."""
    storage = context.system.storage
    if video.storage_key is not None:
        local = storage.local_path(video.storage_key)
        if local is None:
            local = folder / "source"
            context.progress(0.0, "download")
            storage.fetch_to(video.storage_key, local)
            return local, _DOWNLOAD_SHARE
        if not local.exists():
            raise Permanent("The video's file is gone from storage.", code="file_gone")
        return local, 0.0
    return _download(context, video, folder / "source"), _DOWNLOAD_SHARE


def _download(context: JobContext, video: Video, path: Path) -> Path:
    settings = context.system.settings

    def report(done: int, total: int | None) -> None:
        context.progress(_DOWNLOAD_SHARE * (done / total if total else 0.5), "download")

    assert video.source_url is not None  # noqa: S101 - a CHECK constraint: one source
    with path.open("wb") as file:
        fetch.download(
            video.source_url,
            file.write,
            guard=fetch.Guard(allow=settings.fetch_allow),
            max_bytes=settings.upload_max_bytes,
            timeout_s=_DOWNLOAD_LIMIT_S,
            user_agent=USER_AGENT,
            report=report,
            should_stop=context.check,
        )
    return path
