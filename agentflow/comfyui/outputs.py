"""The files of a render: downloaded at once, each with its size and a thumbnail, into a folder of the job's in storage."""

from __future__ import annotations

import mimetypes
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from agentflow import log
from agentflow.comfyui.client import Client
from agentflow.comfyui.history import Ended
from agentflow.comfyui.requests import folder
from agentflow.errors import Permanent, Transient
from agentflow.storage import StorageError
from agentflow.worker.running import JobContext

logger = log.get(__name__)

Kind = Literal["image", "video", "audio", "text", "file"]

MOST_FILES: Final = 500
_MEDIA_TYPES: Final = {".webp": "image/webp", ".webm": "video/webm", ".flac": "audio/flac", ".mp4": "video/mp4"}
_ODD: Final = re.compile(r"[^A-Za-z0-9._-]+")


def collect(context: JobContext, client: Client, ended: Ended, *, share_done: float) -> list[dict[str, Any]]:
    """Bring a prompt's files and texts into storage; returns what the job's result says of them.

    Raises FileGone; NoAnswer; Permanent for more, or larger, than is taken. A second run writes the same keys.
    """
    if len(ended.files) > MOST_FILES:
        raise Permanent(f"The render has more than {MOST_FILES} files", code="render_output_too_large")
    with tempfile.TemporaryDirectory(prefix="agentflow-render-") as scratch:
        found = list(_downloaded(context, client, ended, Path(scratch), share_done))
        _look_at(context, found, Path(scratch))
        prefix = folder(context.job.organization_id, context.job.id)
        return [_stored(context, prefix, number, *each) for number, each in enumerate(found, 1)]


def _downloaded(
    context: JobContext, client: Client, ended: Ended, scratch: Path, share_done: float
) -> Iterator[tuple[Path, dict[str, Any]]]:
    most_bytes = context.system.settings.upload_max_bytes
    for number, item in enumerate(ended.files, 1):
        path = scratch / f"{number}{_ODD.sub('', PurePosixPath(item['filename']).suffix[:10])}"
        size = client.view(item, path, most_bytes, context.check)
        if not size:
            raise Transient(f"The output of node {item['node']} is empty", code="render_no_output")
        yield path, {"node": item["node"], "name": item["filename"], "bytes": size, **_kind_of(item["filename"])}
        context.progress(share_done + (1 - share_done) * 0.8 * number / len(ended.files), "downloading")
    for number, (node, text) in enumerate(ended.texts, 1):
        path = scratch / f"text-{number}.txt"
        size = path.write_bytes(text.encode(errors="replace"))
        yield path, {"node": node, "name": "text.txt", "bytes": size, "kind": "text", "media_type": "text/plain"}


def _kind_of(filename: str) -> dict[str, Any]:
    suffix = PurePosixPath(filename).suffix.lower()
    media_type = _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(filename)[0] or "application/octet-stream"
    kind = media_type.partition("/")[0]
    return {"kind": kind if kind in ("image", "video", "audio", "text") else "file", "media_type": media_type}


def _look_at(context: JobContext, found: list[tuple[Path, dict[str, Any]]], scratch: Path) -> None:
    """Widths, heights and thumbnails, by a child process: decoders of pictures are not to be trusted with a worker."""
    visible = [(path, facts) for path, facts in found if facts["kind"] in ("image", "video")]
    if not visible:
        return
    files = [
        {"path": str(path), "kind": facts["kind"], "thumbnail": str(scratch / f"{path.stem}-thumbnail.jpg")}
        for path, facts in visible
    ]
    try:
        seen = context.run_child("agentflow.comfyui.thumbnails:examine", files=files)
    except Transient as error:  # it died of them: they are kept without
        logger.warning("thumbnails could not be made", error=str(error))
        return
    for file, (_, facts), said in zip(files, visible, seen, strict=True):
        facts.update({name: said.get(name) for name in ("width", "height")})
        if said.get("thumbnail"):
            facts["thumbnail"] = Path(file["thumbnail"])
        elif said.get("problem"):
            logger.info("an output has no thumbnail", node=facts["node"], problem=said["problem"])


def _stored(context: JobContext, prefix: str, number: int, path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    storage = context.system.storage
    name = _ODD.sub("_", PurePosixPath(facts.pop("name")).name).strip("_.")[-100:] or "file"
    key, thumbnail = f"{prefix}/{number:03d}-{name}", facts.pop("thumbnail", None)
    thumbnail_key = None
    try:
        storage.put_file(key, path, content_type=facts["media_type"])
        if thumbnail is not None:
            thumbnail_key = f"{prefix}/{number:03d}-thumbnail.jpg"
            storage.put_file(thumbnail_key, thumbnail, content_type="image/jpeg")
    except StorageError as error:
        raise Transient("The render's files could not be stored", code="storage_failed") from error
    context.check()
    return {"width": None, "height": None, **facts, "key": key, "thumbnail_key": thumbnail_key}
