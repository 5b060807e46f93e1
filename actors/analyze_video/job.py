"""Video analysis: shots, pictures, sound and subtitles of a stored or linked video, in a child process.

The file is streamed: a stored one is read in place where storage is a folder, a linked one is downloaded through the SSRF
guard. Pictures go to storage under a key of the job's, so that a second run writes the same keys; so does what the
analysis knows half-way, from which a second run goes on (`keeping`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from uuid import UUID

from actors.analyze_video.keeping import Keeping
from agentflow import USER_AGENT, fetch, videos
from agentflow.errors import Permanent
from agentflow.jobs.registry import Payload, job
from agentflow.videos import Video
from agentflow.worker.running import JobContext

_DOWNLOAD_SHARE = 0.2
_DOWNLOAD_LIMIT_S = 1800.0


class AnalyzeVideo(Payload):
    video_id: UUID


@job(
    "analyze_video",
    payload=AnalyzeVideo,
    queue="heavy",
    time_limit_s=3600.0,
    process_limit=lambda settings: settings.video_concurrency,
)
def analyze_video(context: JobContext, payload: AnalyzeVideo) -> dict[str, Any]:
    """Find a video's shots, with the sharpest keyframe of each, and what is to be seen, heard and read in it."""
    organization = context.job.organization_id
    with context.system.database.connection() as conn:
        video = videos.get(conn, organization, payload.video_id)
    if video is None:
        raise Permanent(f"There is no video {payload.video_id}.", code="no_such_video")
    with tempfile.TemporaryDirectory(prefix="agentflow-video-") as folder:
        source, share = _source(context, video, Path(folder))
        out = Path(folder) / "out"
        out.mkdir()
        settings = context.system.settings
        keeping = Keeping(context, f"o/{organization}/videos/{video.id}/{context.job.id}", out)
        with keeping:
            analysis: dict[str, Any] = context.run_child(
                "actors.analyze_video.child:analyze",
                on_note=keeping.keep,
                source=str(source),
                out_dir=str(out),
                share_done=share,
                max_pixels=settings.video_max_pixels,
                max_duration_s=settings.video_max_hours * 3600,
                resume=keeping.resume(),
                speech=False,  # until something is made of it
            )
            keeping.store(analysis)
    return {"video_id": str(video.id), "filename": video.filename, **analysis}


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
