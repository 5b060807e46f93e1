"""The child process's way in: size and thumbnail of each output, within bounds of memory and time."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE: Final = 512
#: Larger pictures get none: a few kilobytes of PNG can be gigabytes of pixels.
_MOST_PIXELS: Final = 64_000_000
_MEMORY_BYTES: Final = 600 << 20
_CPU_S: Final = 60


def examine(*, files: list[dict[str, str]], report: Callable[[float, str | None], None]) -> list[dict[str, Any]]:
    """`files`: `path`, `kind` (image or video), and `thumbnail`, the path of the JPEG to make. It takes no time worth a `report`.

    Returns for each width, height and whether it has a thumbnail; nothing of one that cannot be read.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S + 5))
    found = []
    for file in files:
        look = _image if file["kind"] == "image" else _video
        facts: dict[str, Any] = {}
        try:
            look(Path(file["path"]), Path(file["thumbnail"]), facts)
        except Exception as error:  # noqa: BLE001 - decoders raise whatever a damaged file leads them into
            facts["problem"] = f"{type(error).__name__}: {error}"[:200]
        found.append(facts)
    return found


def _image(path: Path, thumbnail: Path, facts: dict[str, Any]) -> None:
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # the bound is ours, and asked for before anything is decoded
    with Image.open(path) as image:
        facts["width"], facts["height"] = image.size
        if image.width * image.height > _MOST_PIXELS:
            facts["problem"] = "too large for a thumbnail"
            return
        image.draft("RGB", (SIDE, SIDE))
        _save(ImageOps.exif_transpose(image), thumbnail)
        facts["thumbnail"] = True


def _video(path: Path, thumbnail: Path, facts: dict[str, Any]) -> None:
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts["width"], facts["height"] = stream.codec_context.width, stream.codec_context.height
        if facts["width"] * facts["height"] > _MOST_PIXELS:
            facts["problem"] = "too large for a thumbnail"
            return
        for frame in container.decode(stream):
            _save(frame.to_image(), thumbnail)  # type: ignore[no-untyped-call]
            facts["thumbnail"] = True
            return


def _save(image: Image, path: Path) -> None:
    from PIL import Image as Images

    image.thumbnail((SIDE, SIDE))
    if image.mode in ("RGBA", "LA", "P", "PA"):
        image = image.convert("RGBA")
        image = Images.alpha_composite(Images.new("RGBA", image.size, "white"), image)
    image.convert("RGB").save(path, "JPEG", quality=85)
