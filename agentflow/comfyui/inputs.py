"""The images that a graph is given: from storage or from a URL, onto the server, under a name made of their content."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from agentflow import USER_AGENT, fetch
from agentflow.comfyui import pictures
from agentflow.comfyui.client import Client
from agentflow.comfyui.requests import Image, Place, is_own
from agentflow.errors import Permanent
from agentflow.storage import NotStored
from agentflow.worker.running import JobContext

_FETCH_S: Final = 120.0


def bring(
    context: JobContext, client: Client, graph: dict[str, Any], places: Sequence[Place], *, share_end: float
) -> dict[str, Any]:
    """The graph with the names of its images on this server. Raises Permanent for what is no image or is not there."""
    if not places:
        return graph
    graph = {node: {**each, "inputs": dict(each.get("inputs") or {})} for node, each in graph.items()}
    named: dict[tuple[str | None, str | None], str] = {}
    with tempfile.TemporaryDirectory(prefix="agentflow-render-") as scratch:
        for number, place in enumerate(places):
            context.progress(share_end * number / len(places), "uploading")
            key = (place.image.artefact, place.image.url)
            if key not in named:
                path = Path(scratch) / str(number)
                _fetch(context, place.image, path)
                name, media_type = _name(path, place)
                named[key] = client.upload(path, name, media_type, context.check)
                path.unlink()
            graph[place.node]["inputs"][place.input] = named[key]
    return graph


def _fetch(context: JobContext, image: Image, path: Path) -> None:
    if image.artefact is not None:
        if not is_own(context.job.organization_id, image.artefact):
            raise Permanent("An image is not a file of this organization", code="render_image_gone")
        try:
            context.system.storage.fetch_to(image.artefact, path)
        except (NotStored, ValueError):
            raise Permanent("An image is not in storage any more", code="render_image_gone") from None
        return
    assert image.url is not None  # noqa: S101 - checked where the request came in
    with path.open("wb") as file:
        fetch.download(
            image.url,
            file.write,
            guard=fetch.Guard(allow=context.system.settings.fetch_allow),
            max_bytes=context.system.settings.render_image_max_bytes,
            timeout_s=_FETCH_S,
            user_agent=USER_AGENT,
            should_stop=context.check,
        )


def _name(path: Path, place: Place) -> tuple[str, str]:
    with path.open("rb") as file:
        media_type = pictures.media_type(file.read(pictures.HEAD_BYTES))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if media_type is None:
        raise Permanent(
            f"What node {place.node} is to be given as {place.input} is no PNG, JPEG or WebP", code="render_bad_image"
        )
    return f"{digest[:40]}{pictures.SUFFIXES[media_type]}", media_type
