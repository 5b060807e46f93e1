"""A renderer for the bot's tests: what is asked for in words happens, and a picture of its own comes of each job."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from agentflow.errors import Permanent, Transient
from agentflow.jobs import registry
from agentflow.jobs.registry import Payload, RetryClass, job
from agentflow.worker.running import JobContext

TYPE = "comfy_render"


class Picture(Payload):
    artefact: str


class Render(Payload):
    workflow: str
    parameters: dict[str, str]
    images: dict[str, Picture]


def render(context: JobContext, payload: Render) -> dict[str, Any]:
    """`away until FILE`, `half way until FILE`, `fail CODE`; else a picture at once."""
    words = payload.parameters["prompt"].split()
    for each in payload.images.values():
        assert context.system.storage.stat(each.artefact) is not None
    if words[0] == "away" and not Path(words[-1]).exists():
        raise Transient("no server answers", code="comfyui_unreachable")
    if words[0] == "fail":
        raise Permanent("it cannot be done", code=words[1])
    if words[0] == "half":
        while not Path(words[-1]).exists():
            context.progress(0.5, "rendering")
            context.sleep(0.05)
    content = picture(context.job.id.int % (1 << 24))
    key = f"o/{context.job.organization_id}/renders/{context.job.id}/out.png"
    with context.system.storage.writer(key, content_type="image/png") as writer:
        writer.write(content)
    output = {"node": "9", "kind": "image", "key": key, "width": 32, "height": 32, "bytes": len(content)}
    return {"outputs": [{**output, "media_type": "image/png"}], "provenance": {}, "cached": False}


def picture(colour: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (colour >> 16 & 255, colour >> 8 & 255, colour & 255)).save(file, format)
    return file.getvalue()


def install() -> None:
    """In this process renders are these."""
    registry._types.pop(TYPE, None)
    job(TYPE, payload=Render, queue="gpu", retry=RetryClass("test", 1000), time_limit_s=120.0)(render)
