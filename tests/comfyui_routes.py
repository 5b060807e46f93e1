"""The HTTP routes of the test ComfyUI, after server.py and comfy_execution/jobs.py."""

from __future__ import annotations

import io
import json
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from werkzeug.formparser import parse_form_data

from tests.comfyui_graph import Validation
from tests.comfyui_worker import SECRETS
from tests.http_server import Reply, Request

if TYPE_CHECKING:
    from pathlib import Path

    from tests.comfyui_server import Comfy

MOST_BYTES = 104_857_600
STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".mp4": "video/mp4", ".flac": "audio/flac"}
MODEL_FOLDERS = ["checkpoints", "loras", "vae", "text_encoders", "diffusion_models", "embeddings"]


class Routes:
    def __init__(self, comfy: Comfy) -> None:
        self.comfy = comfy

    def answer(self, request: Request) -> Reply:
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if origin and origin.split("://")[-1] != host and host.startswith(("127.", "localhost")):
            return Reply(403)
        if len(request.body) > MOST_BYTES:
            return Reply(413, b"Maximum request body size 104857600 exceeded.", _TEXT)
        try:
            return self._route(request)
        except Exception:  # noqa: BLE001: aiohttp's answer to whatever a handler raises
            return self.failed()

    @staticmethod
    def failed() -> Reply:
        return Reply(500, b"500 Internal Server Error\n\nServer got itself in trouble", _TEXT)

    def _route(self, request: Request) -> Reply:
        method = "GET" if request.method == "HEAD" else request.method
        parts = request.path.strip("/").split("/")
        if parts[0] == "api":
            parts = parts[1:]
            if parts[0] == "jobs" and not self.comfy.old:
                return self._jobs(method, parts[1:], request)
        match method, *parts:
            case "POST", "prompt":
                return self._submit(json.loads(request.body))
            case "GET", "prompt":
                return _json(self.comfy.status()["status"])
            case "GET", "queue":
                return _json(self._queue())
            case "POST", "queue":
                return self._change_queue(json.loads(request.body))
            case "POST", "interrupt":
                return self._interrupt(request.body)
            case "POST", "free":
                json.loads(request.body)
                return Reply()
            case "GET", "history":
                return _json(self._history(request.query))
            case "GET", "history", id_:
                found = self.comfy.queue.history
                return _json({id_: found[id_]} if id_ in found else {})
            case "POST", "history":
                return self._change_history(json.loads(request.body))
            case "GET", "view":
                return self._view(request)
            case "POST", "upload", "image":
                return self._upload(request)
            case "GET", "object_info":
                return _json(self._nodes())
            case "GET", "object_info", name:
                return _json({name: node for known, node in self._nodes().items() if known == name})
            case "GET", "system_stats":
                return _json(self._stats())
            case "GET", "features":
                return _json(self.comfy.features)
            case "GET", "models":
                return _json(MODEL_FOLDERS)
            case "GET", "embeddings":
                return _json([])
        if method == "POST":
            return Reply(405, b"405: Method Not Allowed", _TEXT)
        return Reply(404, b"", {"Content-Type": "application/octet-stream"})

    # ---- the queue ----

    def _submit(self, body: Any) -> Reply:
        comfy = self.comfy
        if "number" in body:
            number = float(body["number"])
        else:
            number = -comfy.number if isinstance(body, dict) and body.get("front") else comfy.number
            comfy.number += 1
        if "prompt" not in body:
            error = {"type": "no_prompt", "message": "No prompt provided", "details": "No prompt provided", "extra_info": {}}
            return _json({"error": error, "node_errors": {}}, 400)
        prompt_id = body.get("prompt_id", None if not comfy.old else str(uuid.uuid4()))
        if comfy.old:
            prompt_id = str(prompt_id)
        elif prompt_id is None:
            prompt_id = str(uuid.uuid4())
        elif not _canonical(prompt_id):
            details = "prompt_id must be a UUID string in canonical lowercase hyphenated form; omit it to let the server generate one"
            error = {"type": "invalid_prompt_id", "message": "prompt_id must be a valid UUID", "details": details}
            return _json({"error": {**error, "extra_info": {}}, "node_errors": {}}, 400)

        validation = Validation(comfy.nodes, lambda name: comfy.files.annotated(name).is_file(), comfy.old)
        verdict = validation.verdict(body["prompt"], body.get("partial_execution_targets"))
        extra_data = body.get("extra_data", {})
        if not isinstance(extra_data, dict):
            raise TypeError("extra_data")
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        if verdict.error is not None:
            return _json({"error": verdict.error, "node_errors": verdict.node_errors}, 400)
        if not comfy.old:
            extra_data["create_time"] = round(time.time() * 1000)
        comfy.queue.put((number, prompt_id, body["prompt"], extra_data, verdict.outputs))
        return _json({"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors})

    def _queue(self) -> dict[str, Any]:
        queue = self.comfy.queue
        with queue.changed:
            return {"queue_running": [*map(self._item, queue.running)], "queue_pending": [*map(self._item, queue.pending)]}

    def _item(self, item: Any) -> list[Any]:
        hidden = () if self.comfy.old else SECRETS
        return [*item[:3], {name: value for name, value in item[3].items() if name not in hidden}, item[4]]

    def _change_queue(self, body: Any) -> Reply:
        if body.get("clear"):
            self.comfy.queue.clear()
        for id_ in body.get("delete", ()):
            self.comfy.queue.delete(id_)
        return Reply()

    def _interrupt(self, body: bytes) -> Reply:
        try:
            asked = json.loads(body)
        except ValueError:
            asked = {}
        self.comfy.worker.interrupt(asked.get("prompt_id"))
        return Reply()

    # ---- the history ----

    def _history(self, query: Any) -> dict[str, Any]:
        known = list(self.comfy.queue.history.items())
        most = int(query["max_items"]) if "max_items" in query else None
        offset = int(query["offset"]) if "offset" in query else -1
        if offset < 0 and most is not None:
            offset = max(0, len(known) - most)
        offset = max(0, offset)
        return dict(known[offset:] if most is None else known[offset : offset + most])

    def _change_history(self, body: Any) -> Reply:
        if body.get("clear"):
            self.comfy.queue.history.clear()
        for id_ in body.get("delete", ()):
            self.comfy.queue.history.pop(id_, None)
        return Reply()

    # ---- /api/jobs ----

    def _jobs(self, method: str, parts: list[str], request: Request) -> Reply:
        match method, *parts:
            case ("GET",):
                return self._list_jobs(request.query)
            case "GET", id_:
                found = next((job for job in self._all_jobs(whole=True) if job["id"] == id_), None)
                return _json({"error": "Job not found"}, 404) if found is None else _json(found)
            case "POST", "cancel":
                ids = json.loads(request.body).get("job_ids")
                if not isinstance(ids, list):
                    return _json({"error": "job_ids must be a list"}, 400)
                if invalid := [id_ for id_ in ids if not _canonical(id_)]:
                    return _json({"error": "job_ids contains invalid id(s)", "invalid_ids": invalid}, 400)
                return _json({"cancelled": any([self._cancel(id_) for id_ in ids])})
            case "POST", id_, "cancel":
                return _json({"cancelled": self._cancel(id_)})
        return Reply(404)

    def _cancel(self, id_: str) -> bool:
        return self.comfy.queue.delete(id_) or self.comfy.worker.interrupt(id_)

    def _list_jobs(self, query: Any) -> Reply:
        asked = query["status"].split(",") if query.get("status") else STATUSES
        if unknown := [each for each in asked if each not in STATUSES]:
            told = f"Invalid status value(s): {', '.join(unknown)}. Valid values: {', '.join(STATUSES)}"
            return _json({"error": told}, 400)
        found = [job for job in self._all_jobs() if job["status"] in asked]
        if "workflow_id" in query:
            found = [job for job in found if job.get("workflow_id") == query["workflow_id"]]
        offset = int(query.get("offset", 0))
        limit = int(query["limit"]) if "limit" in query else None
        shown = found[offset:] if limit is None else found[offset : offset + limit]
        more = offset + len(shown) < len(found)
        return _json({"jobs": shown, "pagination": {"offset": offset, "limit": limit, "total": len(found), "has_more": more}})

    def _all_jobs(self, *, whole: bool = False) -> list[dict[str, Any]]:
        """The newest first; of one job (`whole`), what is done hides a second run of the same id."""
        queue = self.comfy.queue
        with queue.changed:
            waiting = [_job(item, "pending") for item in queue.pending] + [_job(item, "in_progress") for item in queue.running]
            done = [self._done_job(entry, whole=whole) for entry in reversed(queue.history.values())]
        return done + waiting if whole else waiting + done

    def _done_job(self, entry: dict[str, Any], *, whole: bool) -> dict[str, Any]:
        messages = dict(entry["status"]["messages"])
        interrupted = "execution_interrupted" in messages
        status = "cancelled" if interrupted else "completed" if entry["status"]["completed"] else "failed"
        times = [data["timestamp"] for data in messages.values()]
        images = [
            {**item, "nodeId": node, "mediaType": kind}
            for node, shown in entry["outputs"].items()
            for kind, items in shown.items()
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]
        job = _job(entry["prompt"], status, len(images))
        job |= {"execution_start_time": times[0], "execution_end_time": times[-1]}
        if "execution_error" in messages:
            job["execution_error"] = messages["execution_error"]
        if images:
            job["preview_output"] = images[0]
        if whole:
            workflow = {"prompt": entry["prompt"][2], "extra_data": entry["prompt"][3]}
            job |= {"outputs": entry["outputs"], "execution_status": entry["status"], "workflow": workflow}
        return job

    # ---- files ----

    def _view(self, request: Request) -> Reply:
        query = request.query
        filename, type_ = query.get("filename", ""), query.get("type", "output")
        if not filename:
            return Reply(404)
        if filename[0] == "/" or ".." in filename or type_ not in ("output", "input", "temp"):
            return Reply(400)
        base = self.comfy.files.of(type_).resolve()
        path = (base / query.get("subfolder", "") / filename).resolve()
        if not path.is_relative_to(base):
            return Reply(403)
        if not path.is_file():
            return Reply(404)
        headers = {"Content-Type": TYPES.get(path.suffix, "application/octet-stream")}
        headers["Content-Disposition"] = f'filename="{filename}"'
        return Reply(200, path.read_bytes(), headers)

    def _upload(self, request: Request) -> Reply:
        body = {"wsgi.input": io.BytesIO(request.body), "CONTENT_LENGTH": str(len(request.body))}
        environ = {"REQUEST_METHOD": "POST", "CONTENT_TYPE": request.headers["content-type"], **body}
        _, form, files = parse_form_data(environ)
        image = files.get("image")
        if image is None or not image.filename:
            return Reply(400)
        type_ = form.get("type", "input")
        base = self.comfy.files.of(type_).resolve()
        if type_ not in ("input", "temp", "output"):
            raise ValueError(type_)  # 500, as there
        folder = (base / form.get("subfolder", "")).resolve()
        path = (folder / image.filename).resolve()
        if not folder.is_relative_to(base) or not path.is_relative_to(base):
            return Reply(400)
        folder.mkdir(parents=True, exist_ok=True)
        content = image.read()
        if form.get("overwrite") not in ("true", "1"):
            path = _free(path, content)
        path.write_bytes(content)
        return _json({"name": path.name, "subfolder": form.get("subfolder", ""), "type": type_})

    # ---- about the server ----

    def _nodes(self) -> dict[str, Any]:
        nodes: dict[str, Any] = json.loads(json.dumps(self.comfy.nodes))
        for name in ("LoadImage", "LoadImageMask"):
            nodes[name]["input"]["required"]["image"][0] = self.comfy.files.inputs()
        return nodes

    def _stats(self) -> dict[str, Any]:
        memory = {"ram_total": 25_276_510_208, "ram_free": 24_053_587_968}
        versions = {"comfyui_version": self.comfy.version, "python_version": "3.11.7", "pytorch_version": "2.13.0"}
        system = {"os": "posix" if self.comfy.old else "linux", **memory, **versions, "embedded_python": False, "argv": ["main.py"]}
        vram = {"vram_total": 25_276_510_208, "vram_free": self.comfy.vram_free}
        torch = {"torch_vram_total": 33_554_432, "torch_vram_free": 12_345_678}
        name = "cuda:0 NVIDIA GeForce RTX 4090 : cudaMallocAsync"
        return {"system": system, "devices": [{"name": name, "type": "cuda", "index": 0, **vram, **torch}]}


_TEXT = {"Content-Type": "text/plain; charset=utf-8"}


def normal(path: str) -> str:
    """The path without /api and with ids by their name."""
    return re.sub(r"/(history|jobs|object_info)/(?!cancel$)[^/]+", r"/\1/{id}", path.removeprefix("/api"))


def _job(item: Any, status: str, outputs: int = 0) -> dict[str, Any]:
    extra_data = item[3]
    job = {"id": item[1], "status": status, "priority": item[0], "create_time": extra_data.get("create_time")}
    workflow = extra_data.get("extra_pnginfo", {}).get("workflow", {})
    if (workflow_id := workflow.get("id")) is not None:  # raises on what is no object, for the whole list
        job["workflow_id"] = workflow_id
    return {**job, "outputs_count": outputs, "previewable_outputs_count": outputs}


def _canonical(prompt_id: Any) -> bool:
    try:
        return isinstance(prompt_id, str) and str(uuid.UUID(prompt_id)) == prompt_id
    except ValueError:
        return False


def _free(path: Path, content: bytes) -> Path:
    """This name where it is free or holds the same bytes; else the next "name (1).png"."""
    n, found = 1, path
    while found.exists() and found.read_bytes() != content:
        found = path.with_name(f"{path.stem} ({n}){path.suffix}")
        n += 1
    return found


def _json(document: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(document).encode(), {"Content-Type": "application/json; charset=utf-8"})
