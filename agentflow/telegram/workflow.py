"""The render that a request becomes: the payload of a `comfy_render` job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

#: The workflow's names for the pictures of an album, in their order; there are no more places than these.
IMAGES: Final = ("image", "image2", "image3")


def render_of(workflow: str, prompt: str, keys: Sequence[str]) -> dict[str, Any]:
    """Of the first pictures, for which there are places. No seed is named: each render draws its own."""
    images = {name: {"artefact": key} for name, key in zip(IMAGES, keys, strict=False)}
    return {"workflow": workflow, "parameters": {"prompt": prompt}, "images": images}
