"""The nodes that the test ComfyUI can run: pictures are real, models are not there.

A node of the recorded /object_info without a function here hands on the picture that it got; so a graph with models (loaders, KSampler,
VAEDecode) runs too, and ends in the picture that went in.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo

Batch = list[Image.Image]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Blocked:
    """comfy_execution.graph.ExecutionBlocker: what depends on it is passed over; the message is told on the socket only."""

    message: str | None


@dataclass(frozen=True)
class Made:
    values: tuple[Any, ...] = ()
    shown: dict[str, list[Any]] | None = None  # what /history lists under this node


class Running(Protocol):
    """What a node may do while it runs."""

    files: Files
    graph: dict[str, Any]
    extra_data: dict[str, Any]

    takes_s: float  # what the test ordered for this class of nodes

    def progress(self, value: float, most: float, *, always: bool = False) -> None:
        """Tell it, where the last one is not too young; raises where the run is interrupted."""

    def rest(self, seconds: float) -> None: ...

    def work(self, seconds: float) -> None:
        """Be busy for so long, with progress."""

    def picture(self, png: bytes) -> None:
        """Send it over the socket."""


class Files:
    """The folders of a server. `output`, `input` and `temp` are what the API calls types."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for type_ in ("output", "input", "temp"):
            (folder / type_).mkdir(parents=True, exist_ok=True)

    def of(self, type_: str) -> Path:
        return self.folder / type_

    def annotated(self, name: str) -> Path:
        """folder_paths.get_annotated_filepath: `name`, `folder/name` or `name [output]`."""
        for type_ in ("output", "input", "temp"):
            if name.endswith(f" [{type_}]"):
                return self.of(type_) / name.removesuffix(f" [{type_}]")
        return self.of("input") / name

    def inputs(self) -> list[str]:
        return sorted(path.name for path in self.of("input").iterdir() if path.is_file())

    def next(self, type_: str, prefix: str, suffix: str = ".png") -> tuple[Path, str, str]:
        """folder_paths.get_save_image_path: the number after the highest that is there *now*, so numbers come again."""
        prefix = os.path.normpath(prefix)
        subfolder, name = os.path.split(prefix)
        base = self.of(type_).resolve()
        folder = Path(os.path.normpath(base / subfolder))
        if not folder.is_relative_to(base):
            places = f" full_output_folder: {folder}\n         output_dir: {base}"
            raise Exception(f"**** ERROR: Saving image outside the output folder is not allowed.\n{places}")
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [0]
        for path in folder.glob(f"{name}_*"):
            digits = path.name[len(name) + 1 :].split("_")[0].split(".")[0]
            numbers.append(int(digits) if digits.isdigit() else 0)
        filename = f"{name}_{max(numbers) + 1:05}_{suffix}"
        return folder / filename, filename, subfolder


def fingerprint(class_type: str, inputs: Inputs, files: Files) -> str | None:
    """IS_CHANGED: a picture is known by its bytes, not by its name."""
    if class_type not in ("LoadImage", "LoadImageMask"):
        return None
    path = files.annotated(inputs["image"])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "gone"


def png(image: Image.Image, texts: dict[str, Any] | None = None) -> bytes:
    info = PngInfo()
    for name, value in (texts or {}).items():
        info.add_text(name, json.dumps(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, compress_level=1)
    return buffer.getvalue()


# ---- the nodes ----


def empty_image(running: Running, inputs: Inputs) -> Made:
    width, height, count = inputs["width"], inputs["height"], inputs["batch_size"]
    if (size := width * height * count * 12) > 4 << 30:
        told = f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size} bytes."
        raise RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {told} Error code 12 (Cannot allocate memory)")
    color = inputs["color"]
    image = Image.new("RGB", (width, height), (color >> 16 & 255, color >> 8 & 255, color & 255))
    return Made(([image] * count,))


def load_image(running: Running, inputs: Inputs) -> Made:
    with Image.open(running.files.annotated(inputs["image"])) as image:
        return Made(([image.convert("RGB")], [image.convert("L")]))


def invert(running: Running, inputs: Inputs) -> Made:
    return Made(([ImageOps.invert(image) for image in inputs["image"]],))


def scale(running: Running, inputs: Inputs) -> Made:
    method = {"lanczos": Image.LANCZOS, "bicubic": Image.BICUBIC, "nearest-exact": Image.NEAREST, "area": Image.BOX}
    image = inputs["image"][0]
    width = inputs["width"] or max(1, round(image.width * inputs["height"] / image.height))
    height = inputs["height"] or max(1, round(image.height * inputs["width"] / image.width))
    resample = method.get(inputs["upscale_method"], Image.BILINEAR)
    return Made(([each.resize((width, height), resample) for each in inputs["image"]],))


def scale_by(running: Running, inputs: Inputs) -> Made:
    by = inputs["scale_by"]
    return Made(([ImageOps.scale(each, by) for each in inputs["image"]],))


def blur(running: Running, inputs: Inputs) -> Made:
    return Made(([each.filter(ImageFilter.GaussianBlur(inputs["sigma"])) for each in inputs["image"]],))


def batch(running: Running, inputs: Inputs) -> Made:
    return Made((inputs["image1"] + inputs["image2"],))


def save_image(running: Running, inputs: Inputs) -> Made:
    return Made((inputs["images"],), {"images": _saved(running, "output", inputs["filename_prefix"], inputs["images"])})


def preview_image(running: Running, inputs: Inputs) -> Made:
    infix = "".join(random.choices(string.ascii_lowercase, k=5))
    return Made((), {"images": _saved(running, "temp", f"ComfyUI_temp_{infix}", inputs["images"])})


def _saved(running: Running, type_: str, prefix: str, images: Batch) -> list[dict[str, str]]:
    saved = []
    for image in images:
        path, filename, subfolder = running.files.next(type_, prefix)
        path.write_bytes(png(image, {"prompt": running.graph, **running.extra_data.get("extra_pnginfo", {})}))
        saved.append({"filename": filename, "subfolder": subfolder, "type": type_})
    return saved


def save_animated(running: Running, inputs: Inputs) -> Made:
    first, *more = inputs["images"]
    path, filename, subfolder = running.files.next("output", inputs["filename_prefix"], ".webp")
    first.save(path, "WEBP", save_all=True, append_images=more, duration=round(1000 / inputs["fps"]))
    return Made((), {"images": [{"filename": filename, "subfolder": subfolder, "type": "output"}], "animated": [True]})


def send_images(running: Running, inputs: Inputs) -> Made:
    for n, image in enumerate(inputs["images"]):
        running.progress(n, len(inputs["images"]), always=True)
        running.picture(png(image))
    return Made()


def sample(running: Running, inputs: Inputs) -> Made:
    for step in range(inputs["steps"]):
        running.progress(step + 1, inputs["steps"])
    return Made((inputs.get("latent_image"),))


def hand_on(running: Running, inputs: Inputs) -> Made:
    pictures = [value for value in inputs.values() if isinstance(value, list) and value]
    return Made((pictures[0] if pictures else None,) * 4)


def sleep(running: Running, inputs: Inputs) -> Made:
    running.work(inputs["seconds"])
    return Made((inputs["value"],))


def fail(running: Running, inputs: Inputs) -> Made:
    raise RuntimeError("Intentional sync execution error for testing")


def block(running: Running, inputs: Inputs) -> Made:
    if not inputs["block"]:
        return Made((inputs["input"],))
    return Made((Blocked("Blocked Execution" if inputs["verbose"] else None),))


def output(running: Running, inputs: Inputs) -> Made:
    """Any kind of output: a file of these bytes under this key, or, without a suffix, the bare text."""
    if not inputs["suffix"]:
        return Made((), {inputs["key"]: [inputs["content"]]})
    path, filename, subfolder = running.files.next("output", inputs["filename_prefix"], inputs["suffix"])
    path.write_bytes(inputs["content"].encode())
    return Made((), {inputs["key"]: [{"filename": filename, "subfolder": subfolder, "type": "output"}]})


NODES: dict[str, Callable[[Running, Inputs], Made]] = {
    "EmptyImage": empty_image,
    "LoadImage": load_image,
    "ImageInvert": invert,
    "ImageScale": scale,
    "ImageScaleBy": scale_by,
    "ImageBlur": blur,
    "ImageBatch": batch,
    "SaveImage": save_image,
    "PreviewImage": preview_image,
    "SaveAnimatedWEBP": save_animated,
    "SaveImageWebsocket": send_images,
    "KSampler": sample,
    "TestSleep": sleep,
    "TestSyncError": fail,
    "TestExecutionBlocker": block,
    "TestOutput": output,
}


def described(name: str, required: dict[str, Any], returns: list[str], *, output_node: bool = False) -> dict[str, Any]:
    return {
        "input": {"required": required},
        "input_order": {"required": list(required)},
        "output": returns,
        "output_is_list": [False] * len(returns),
        "output_name": returns,
        "name": name,
        "display_name": name,
        "description": "",
        "python_module": "custom_nodes.testing-pack",
        "category": "Testing",
        "output_node": output_node,
    }


PACE_THEMSELVES = ("KSampler",)

# The nodes of ComfyUI's own testing pack that the recordings use, and one of ours.
OF_TESTS = {
    "TestSleep": described("TestSleep", {"value": ["*"], "seconds": ["FLOAT", {"default": 1.0, "min": 0.0}]}, ["*"]),
    "TestSyncError": described("TestSyncError", {"value": ["*"]}, ["*"]),
    "TestExecutionBlocker": described(
        "TestExecutionBlocker",
        {"input": ["*"], "block": ["BOOLEAN"], "verbose": ["BOOLEAN", {"default": False}]},
        ["*"],
    ),
    "TestOutput": described(
        "TestOutput",
        {"key": ["STRING", {}], "suffix": ["STRING", {}], "filename_prefix": ["STRING", {}], "content": ["STRING", {}]},
        [],
        output_node=True,
    ),
}
