"""The render that a request becomes: the payload of a `comfy_render` job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def render_of(workflow: str, prompt: str, keys: Sequence[str]) -> dict[str, Any]:
    """No seed is named: each render draws its own. The first picture is the workflow's `image`, further ones of an album are its
    `image2`, `image3` …"""
    images = {f"image{number}" if number > 1 else "image": {"artefact": key} for number, key in enumerate(keys, 1)}
    return {"workflow": workflow, "parameters": {"prompt": prompt}, "images": images}
