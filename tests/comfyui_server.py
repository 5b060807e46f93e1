"""ComfyUI on this machine, as 0.3.64 and 0.33.0 behave on a real one: small graphs run, its traps are there, faults on order.

    with comfyui(tmp_path) as comfy:                              # or version="0.3.64"
        comfy.fault("answer_500", path="/prompt", times=1)        # it ran; the answer says 500
        comfy.fault("out_of_memory", chance=0.1)                  # one run in ten
        ... Settings(comfyui_url=comfy.url) ...
        assert comfy.times_run() == {prompt_id: 1}

Faults of requests (`path`: only those below it): `lose_request`, `answer_500` and `lose_answer` (both after it was done),
`fail_request` (500, nothing done), `stall` (`seconds`, then as always), `late_answer` (done at once, answered after `seconds`),
`cut` (half of the body), `trickle` (the body takes `seconds`). Of sockets: `refuse_socket`, `deaf_socket`, `drop_socket` (at any
event). Of runs: `no_events`, `out_of_memory`, `node_error`, `fail_later` (after one output), `no_output`, `lose_history`,
`delete_outputs`, `slow` and, at any node, `hang` (both `seconds`; a hang hears no interrupt), `ignore_interrupt`, `restart`,
`stuck` (accepts and never runs; with `seconds`, for so long).

By hand: `python -m tests.comfyui_server --port 8188 --folder /tmp/comfy`.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from json import loads
from pathlib import Path
from typing import Any

from agentflow.prove.ports import free_port
from tests.comfyui_nodes import OF_TESTS, Files
from tests.comfyui_routes import Routes, normal
from tests.comfyui_sockets import Sockets
from tests.comfyui_worker import Gone, Queue, Run, Worker
from tests.faults import Fault, Faults
from tests.http_server import Reply, Request, Server, serve

VERSIONS = ("0.3.64", "0.33.0")
DATA = Path(__file__).parent / "data" / "comfyui"
QWEN = {
    "UNETLoader": ("unet_name", "qwen_image_edit_2509_fp8_e4m3fn.safetensors"),
    "CLIPLoader": ("clip_name", "qwen_2.5_vl_7b_fp8_scaled.safetensors"),
    "VAELoader": ("vae_name", "qwen_image_vae.safetensors"),
    "LoraLoaderModelOnly": ("lora_name", "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors"),
}


class Comfy:
    """`durations`: seconds that a class of nodes takes. `down_s`: how long a restart refuses connections."""

    def __init__(self, server: Server, folder: Path, version: str, seed: int = 0) -> None:
        self.server = server
        self.version = version
        self.old = version.startswith("0.3.")
        self.files = Files(folder)
        self.nodes: dict[str, Any] = loads((DATA / f"object_info-{version}.json").read_text()) | OF_TESTS
        self.durations: dict[str, float] = {}
        self.history_gap_s = 0.003
        self.progress_every_s = 0.01 if self.old else 0.1
        self.down_s = 0.0
        self.vram_free = 24_000_000_000
        self.runs: list[Run] = []
        self.requests: Counter[str] = Counter()  # "GET /history/{id}"
        self.restarted_at: list[float] = []  # monotonic
        self.number = 0
        self.closed = False
        self._faults = Faults(seed)
        self._lock = threading.Lock()
        self._restarting = threading.Lock()
        self._routes = Routes(self)
        self.sockets = Sockets(self)
        self.queue = Queue(self)
        self.worker = Worker(self, self.queue)
        server.on("/", self.answer)

    @property
    def url(self) -> str:
        return self.server.url("").rstrip("/")

    def with_qwen(self) -> Comfy:
        """The files of qwen-image-edit are there: that graph passes, and ends in the picture that went in."""
        for class_type, (input_, name) in QWEN.items():
            options = self.nodes[class_type]["input"]["required"][input_][0]
            if name not in options:
                options.append(name)
        return self

    # ---- what happened ----

    def times_run(self) -> Counter[str]:
        """How often each prompt id was really run, over all restarts."""
        return Counter(run.prompt_id for run in list(self.runs))

    def runs_of(self, prompt_id: str) -> list[Run]:
        return [run for run in list(self.runs) if run.prompt_id == prompt_id]

    # ---- faults ----

    def fault(self, kind: str, **how: Any) -> Fault:
        return self._faults.order(kind, **how)

    def heal(self) -> None:
        self._faults.heal()

    def strikes(self, kind: str, subject: Request | Run | None = None) -> Fault | None:
        path = subject.path.removeprefix("/api") if isinstance(subject, Request) else ""
        fault = self._faults.strike(kind, subject, path)
        if fault is not None and isinstance(subject, Run):
            subject.struck.append(kind)
        return fault

    def restart(self, down_s: float | None = None) -> None:
        """As by systemd after a kill: queue, history, cache and numbers are gone, files stay, sockets end with 1006."""
        with self._restarting:
            if self.closed:
                return
            self.queue.abandon()
            self.server.hang_up()
            for path in self.files.of("temp").iterdir():
                path.unlink()
            time.sleep(self.down_s if down_s is None else down_s)
            self.number = 0
            self.sockets.by_id.clear()
            self.queue = Queue(self)
            self.worker = Worker(self, self.queue)
            self.restarted_at.append(time.monotonic())
            self.server.listen()

    def close(self) -> None:
        with self._restarting:
            self.closed = True
            self.queue.abandon()

    # ---- the wire ----

    def answer(self, request: Request) -> Reply:
        self.server.requests.clear()  # a storm sends 100,000
        with self._lock:
            self.requests[f"{request.method} {normal(request.path)}"] += 1
        if self.strikes("lose_request", request):
            return Reply(raw=[], reset=True)
        if self.strikes("fail_request", request):
            return self._routes.failed()
        if (fault := self.strikes("stall", request)) and self.server.stopping.wait(fault.seconds):
            return Reply(raw=[])  # restarted meanwhile: what the old one had read is gone
        if request.path.removeprefix("/api") == "/ws":
            return self.sockets.reply(request)
        reply = self._routes.answer(request)
        if self.strikes("answer_500", request):
            return self._routes.failed()
        if self.strikes("lose_answer", request):
            return Reply(raw=[], reset=True)
        if fault := self.strikes("late_answer", request):
            self.server.stopping.wait(fault.seconds)
        return self._spoilt(request, reply)

    def _spoilt(self, request: Request, reply: Reply) -> Reply:
        body = reply.body if isinstance(reply.body, bytes) else b""
        # Or the next request would go into an end that is on its way.
        headers = {**reply.headers, "Connection": "close"}
        if self.strikes("cut", request):
            return Reply(reply.status, body[: len(body) // 2], headers, length=len(body))
        if fault := self.strikes("trickle", request):
            pieces = [body[at : at + len(body) // 20 + 1] for at in range(0, len(body), len(body) // 20 + 1)]
            return Reply(reply.status, pieces, headers, pause_s=fault.seconds / max(1, len(pieces)), length=len(body))
        return reply

    # ---- what its parts share ----

    @property
    def features(self) -> dict[str, Any]:
        known: dict[str, Any] = {"supports_preview_metadata": True, "max_upload_size": 104_857_600}
        return known if self.old else {**known, "node_replacements": True, "assets": False}

    def status(self) -> dict[str, Any]:
        return {"status": {"exec_info": {"queue_remaining": self.queue.remaining()}}}

    def send_status(self) -> None:
        self.sockets.send("status", self.status(), None)

    def send(self, type_: str, data: dict[str, Any], client_id: Any, run: Run) -> None:
        if self.strikes("drop_socket", run):
            self.sockets.drop(client_id)
        try:
            self.sockets.send(type_, data, client_id)
        except TypeError:  # a client id that is no key of a dict: the whole server ends
            threading.Thread(target=self.restart, daemon=True).start()
            raise Gone from None

    def send_binary(self, payload: bytes, client_id: str) -> None:
        self.sockets.send_binary(payload, client_id)


@contextmanager
def comfyui(folder: Path, *, version: str = "0.33.0", port: int = 0, seed: int = 0) -> Iterator[Comfy]:
    with serve(port=port or free_port()) as server:
        comfy = Comfy(server, folder, version, seed)
        try:
            yield comfy
        finally:
            comfy.close()


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.comfyui_server")
    options.add_argument("--port", type=int, default=8188)
    options.add_argument("--folder", type=Path, default=None)
    options.add_argument("--version", choices=VERSIONS, default=VERSIONS[-1])
    asked = options.parse_args()
    with comfyui(asked.folder or Path(tempfile.mkdtemp()), version=asked.version, port=asked.port) as comfy:
        print(
            f"ComfyUI {asked.version} of the tests at {comfy.with_qwen().url}, files in {comfy.files.folder}",
            flush=True,
        )
        threading.Event().wait()


if __name__ == "__main__":
    main()
