"""What tests of renders share: what recorded servers said of their nodes, pictures, and a job type where no worker is needed."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import psycopg

import actors  # noqa: F401 - makes the types known
from agentflow.comfyui.requests import TYPE, RenderRequest, folder
from agentflow.jobs import registry
from agentflow.jobs.model import Outcome
from agentflow.system import System
from tests import web_support

DATA = Path(__file__).parent / "data" / "comfyui"
VERSIONS = ("0.3.64", "0.33.0")
MODELS = {
    ("UNETLoader", "unet_name"): "qwen_image_edit_2509_fp8_e4m3fn.safetensors",
    ("CLIPLoader", "clip_name"): "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    ("VAELoader", "vae_name"): "qwen_image_vae.safetensors",
    ("LoraLoaderModelOnly", "lora_name"): "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
}

if not registry.known(TYPE):

    @registry.job(TYPE, payload=RenderRequest, queue="gpu", files=folder)
    def render(context: Any, payload: RenderRequest) -> None:
        """Only to be handed in."""


@cache
def _recorded(version: str) -> dict[str, Any]:
    return dict(json.loads((DATA / f"object_info-{version}.json").read_text()))


def nodes(version: str, *, models: bool = False) -> dict[str, Any]:
    """What a server without any model said; with `models`, as if the files of Qwen-Image-Edit were there."""
    found = copy.deepcopy(_recorded(version))
    for (node, name), file in MODELS.items() if models else ():
        found[node]["input"]["required"][name][0].append(file)
    return found


def end(system: System, conn: psycopg.Connection, render_id: str, outcome: Outcome = "succeeded", **more: Any) -> None:
    """Write a render's end as a worker does, whichever GPUs there are."""
    conn.execute("update agentflow.jobs set concurrency_key = null where id = %s", (render_id,))
    web_support.run(system, conn, render_id, outcome, **more)


def png(width: int = 2, height: int = 2, colour: bytes = b"\xff\x00\x00") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\x00" + colour * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


def colour(**inputs: Any) -> dict[str, Any]:
    """A small graph that any server runs."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0, **inputs}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
