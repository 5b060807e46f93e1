"""Renders, films and logs as rows and files, for pages that show them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg

from agentflow.comfyui import pool
from agentflow.comfyui.servers import Server
from agentflow.jobs import lines
from agentflow.jobs.lines import Line, Place
from agentflow.system import System
from tests.dashboard_support import put_job
from tests.render_support import png

Connection = psycopg.Connection
GB = 1 << 30


#: The bytes of a picture by its number.
Draw = Callable[[int], bytes]


def plain(_number: int) -> bytes:
    return png(64, 36, b"\x20\x90\x60")


def put_picture(system: System, organization_id: int, name: str, data: bytes | None = None) -> str:
    key = f"o/{organization_id}/{name}"
    system.storage.put_bytes(key, data or plain(0))
    return key


def put_server(conn: Connection, name: str, *, free: int = 6 * GB, **columns: Any) -> None:
    pool.list_servers(conn, [Server(name, "default", 2)])
    devices = [{"name": "cuda:0 NVIDIA L4", "type": "cuda", "vram_total": 24 * GB, "vram_free": free}]
    values = {"well": True, "version": "0.33.0", "queue": 1, "devices": json.dumps(devices), **columns}
    for column, value in {**values, "seen_at": datetime.now(UTC)}.items():
        conn.execute(f"update agentflow.comfyui_servers set {column} = %s where name = %s", (value, name))  # noqa: S608


def put_render(
    conn: Connection,
    system: System,
    organization_id: int = 1,
    *,
    outputs: int = 1,
    payload: Any = None,
    draw: Draw = plain,
    **columns: Any,
) -> UUID:
    """One that succeeded, with its files in storage."""
    id_ = uuid4()
    files = [
        {
            "node": "9", "kind": "image", "key": put_picture(system, organization_id, f"renders/{id_}/{n:03d}-out.png", draw(n)),
            "thumbnail_key": put_picture(system, organization_id, f"renders/{id_}/{n:03d}-thumbnail.png", draw(n)),
            "width": 64, "height": 36, "bytes": 100, "media_type": "image/png",
        }
        for n in range(outputs)
    ]  # fmt: skip
    said = {"workflow": "smoke", "version": 3, "parameters": {}, "seeds": {}}
    result = {"outputs": files, "provenance": said, "cached": False, "seconds": 1.5}
    job = put_job(
        conn, "succeeded", organization_id=organization_id, type="comfy_render", queue="gpu", result=result,
        payload=payload or {"workflow": "smoke", "images": {}}, **columns,
    )  # fmt: skip
    put_prompt(conn, job, organization_id, "collected", found=json.dumps(result))
    return job


def put_prompt(conn: Connection, job: UUID, organization_id: int, state: str, **columns: Any) -> None:
    values = {
        "prompt_id": uuid4(), "organization_id": organization_id, "job_id": job, "fence": 1, "server": "http://gpu-1:8188",
        "slot": 0, "state": state, "ended_at": datetime.now(UTC) if state == "collected" else None, **columns,
    }  # fmt: skip
    names = ", ".join(values)
    conn.execute(
        f"insert into agentflow.renders ({names}) values ({', '.join(['%s'] * len(values))})",  # noqa: S608
        list(values.values()),
    )


def film(system: System, organization_id: int, *, shots: int = 3, draw: Draw = plain) -> dict[str, Any]:
    """A result as analyze_video gives one: shots of 4 s, three sentences a minute and a little apart."""
    home = f"films/{uuid4()}"
    found = [
        {
            "index": n, "start_s": 4.0 * n, "end_s": 4.0 * (n + 1), "duration_s": 4.0, "duplicate_of": 0 if n == 2 else None,
            "keyframe": {"file": "x", "key": put_picture(system, organization_id, f"{home}/{n}.png", draw(n)), "time_s": 4.0 * n},
        }
        for n in range(shots)
    ]  # fmt: skip
    segments = [{"start_s": 63.0 * n, "end_s": 63.0 * n + 2, "text": f"Sentence {n}."} for n in range(3)]
    return {
        "shots": found,
        "contact_sheet": {"file": "s", "key": put_picture(system, organization_id, f"{home}/sheet.png", draw(shots))},
        "captions": {"status": "done", "items": [{"shot": 1, "caption": "A bicycle in the rain"}]},
        "transcript": {"status": "done", "language": "en", "segments": segments},
        "chapters": {"status": "done", "items": [{"start_s": 0.0, "end_s": 12.0, "title": "The beginning"}]},
        "summary": {"status": "done", "short": "Somebody rides home.", "long": "…"},
    }


def put_lines(conn: Connection, job: UUID, *said: tuple[str, str, dict[str, Any]]) -> None:
    for n, (level, message, fields) in enumerate(said):
        line = Line(Place(1, n), 1, datetime.now(UTC), lines.LEVELS[level], "actors.x", message, fields, 50)  # type: ignore[index]
        lines.write(conn, [(job, line)])
