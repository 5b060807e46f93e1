"""The worker of the test ComfyUI: its queue, its cache and the one thread that runs graphs, after execution.py and main.py.

The queue is the same heap of tuples as the real one, so its traps are the real ones: the same id and number twice compares two graphs, raises,
and in the end kills the thread.
"""

from __future__ import annotations

import copy
import heapq
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests import comfyui_nodes as nodes
from tests.comfyui_nodes import Blocked, Made

if TYPE_CHECKING:
    from tests.comfyui_server import Comfy

Item = tuple[float, str, dict[str, Any], dict[str, Any], list[str]]
MOST_HISTORY = 10_000
SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")
TICK_S = 0.01


class Gone(BaseException):
    """The server was restarted under this thread."""


class Interrupted(Exception):
    pass


@dataclass
class Run:
    """One time that a prompt was run, kept over restarts: what the server did, whatever it told."""

    prompt_id: str
    number: float
    extra_data: dict[str, Any]
    outputs: dict[str, Any] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)  # nodes that really ran, the cached ones not among them
    ended: str = ""  # success, error, interrupted, lost (in a restart); empty while it runs


class Queue:
    """execution.PromptQueue."""

    def __init__(self, comfy: Comfy) -> None:
        self.comfy = comfy
        self.changed = threading.Condition(threading.RLock())
        self.pending: list[Item] = []
        self.running: list[Item] = []
        self.history: dict[str, Any] = {}
        self.gone = False

    def put(self, item: Item) -> None:
        with self.changed:
            heapq.heappush(self.pending, item)  # raises after it took the item, where two of one id and number compare
            self.comfy.send_status()
            self.changed.notify()

    def wait(self) -> None:
        with self.changed:
            while not self.pending and not self.gone:
                self.changed.wait()
            self._live()

    def get(self) -> Item | None:
        with self.changed:
            self._live()
            if not self.pending:
                return None
            item = heapq.heappop(self.pending)
            self.running.append(copy.deepcopy(item))
            self.comfy.send_status()
            return item

    def done(self, run: Run, entry: dict[str, Any], *, remember: bool) -> None:
        with self.changed:
            self._live()
            item = self.running.pop()
            extra_data = {name: value for name, value in item[3].items() if name not in SECRETS}
            if len(self.history) > MOST_HISTORY:
                del self.history[next(iter(self.history))]
            if remember:
                self.history[item[1]] = {"prompt": [*item[:3], extra_data, item[4]], **entry}
            self.comfy.send_status()

    def remaining(self) -> int:
        with self.changed:
            return len(self.pending) + len(self.running)

    def delete(self, prompt_id: str) -> bool:
        """One item of this id, as the real one does: a second stays."""
        with self.changed:
            for at, item in enumerate(self.pending):
                if item[1] == prompt_id:
                    del self.pending[at]
                    heapq.heapify(self.pending)
                    self.comfy.send_status()
                    return True
            return False

    def clear(self) -> None:
        with self.changed:
            self.pending.clear()
            self.comfy.send_status()

    def abandon(self) -> None:
        with self.changed:
            self.gone = True
            self.changed.notify_all()

    def _live(self) -> None:
        if self.gone:
            raise Gone


class Worker:
    """main.prompt_worker and execution.PromptExecutor, on a thread of its own until the queue is abandoned."""

    def __init__(self, comfy: Comfy, queue: Queue) -> None:
        self.comfy = comfy
        self.queue = queue
        self.interrupted = threading.Event()
        self.client_id: Any = None
        self.last_node: str | None = None
        self.run: Run | None = None
        self.cache: dict[str, Made] = {}
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def interrupt(self, prompt_id: str | None = None) -> bool:
        with self.queue.changed:
            hit = bool(self.queue.running) and prompt_id in (None, self.queue.running[0][1])
            if hit or prompt_id is None:
                self.interrupted.set()
            return hit

    def _work(self) -> None:
        try:
            while True:
                self.queue.wait()
                if (stuck := self.comfy.strikes("stuck")) is not None:
                    if not stuck.seconds:
                        return
                    self.wait(stuck.seconds)
                try:
                    item = self.queue.get()
                except TypeError:
                    return  # two graphs were compared: the thread dies, and the server goes on accepting prompts
                if item is not None:
                    self._run(item)
        except Gone:
            if self.run is not None:
                self.run.ended = self.run.ended or "lost"

    def _run(self, item: Item) -> None:
        number, prompt_id, graph, extra_data, targets = item
        run = self.run = Run(prompt_id, number, extra_data)
        self.comfy.runs.append(run)
        self.interrupted.clear()  # so an interrupt between the queue and this line is lost, as it is there
        self.client_id = extra_data.get("client_id")
        execution = Execution(self, run, graph, targets)
        entry = execution.execute()
        self.last_node = None
        self.wait(self.comfy.history_gap_s)  # "execution_success" is told by now, the result is not there yet
        if self.comfy.strikes("delete_outputs", run):
            for items in (shown.get("images", []) for shown in entry["outputs"].values()):
                for image in items:
                    (self.comfy.files.of(image["type"]) / image["subfolder"] / image["filename"]).unlink(missing_ok=True)
        self.queue.done(run, entry, remember=self.comfy.strikes("lose_history", run) is None)
        run.ended = execution.ended
        execution.send("executing", {"node": None, "prompt_id": prompt_id})

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.queue.gone:
                raise Gone
            time.sleep(min(left, TICK_S))


class Execution:
    """One graph being run; to its nodes it is what they may do (`comfyui_nodes.Running`)."""

    def __init__(self, worker: Worker, run: Run, graph: dict[str, Any], targets: list[str]) -> None:
        self.worker, self.comfy, self.run = worker, worker.comfy, run
        self.graph, self.targets, self.extra_data = graph, targets, run.extra_data
        self.files = worker.comfy.files
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.states: dict[str, dict[str, Any]] = {}
        self.values: dict[str, tuple[Any, ...]] = {}
        self.shown: dict[str, dict[str, Any]] = {}
        self.node = ""
        self.takes_s = 0.0
        self.ended = "success"
        self.uninterruptible = False
        self.mute = worker.comfy.strikes("no_events", run) is not None
        self.no_output = worker.comfy.strikes("no_output", run) is not None
        self._told_at: dict[str, float] = {}

    def execute(self) -> dict[str, Any]:
        self._tell("execution_start", {})
        signatures = {id_: self._signature(id_) for id_ in self.graph}
        cache = self.worker.cache
        for signature in [known for known in cache if known not in signatures.values()]:
            del cache[signature]  # only what the last graph held is kept
        cached = [id_ for id_ in self.graph if signatures[id_] in cache]
        self._tell("execution_cached", {"nodes": cached})
        for id_ in cached:
            self.values[id_] = cache[signatures[id_]].values

        try:
            for id_ in self._order(set(cached)):
                if id_ in cached:
                    self._show(id_, cache[signatures[id_]].shown)
                    self._state(id_, "finished", 1, 1)
                else:
                    cache[signatures[id_]] = self._execute(id_)
            self._tell("execution_success", {})
        except Interrupted:
            self.ended = "interrupted"
            self.worker.interrupted.clear()
            self._tell("execution_interrupted", self._about())
        except Exception as error:  # noqa: BLE001: a node may raise anything, and the server lives on
            self.ended = "error"
            self._tell("execution_error", {**self._about(), **_told(error), "current_inputs": {}, "current_outputs": cached})
        success = self.ended == "success"
        status = {"status_str": "success" if success else "error", "completed": success, "messages": self.messages}
        meta = {id_: {"node_id": id_, "display_node": id_, "parent_node": None, "real_node_id": id_} for id_ in self.shown}
        self.run.outputs = self.shown
        return json.loads(json.dumps({"outputs": self.shown, "status": status, "meta": meta}))  # type: ignore[no-any-return]

    def _execute(self, id_: str) -> Made:
        self.node = self.worker.last_node = id_
        class_type = self.graph[id_]["class_type"]
        self._state(id_, "running", 0, 1)
        self.send("executing", {"node": id_, "display_node": id_, "prompt_id": self.run.prompt_id})
        self._strike(id_)
        self._check()
        inputs = {name: self._value(value) for name, value in self.graph[id_]["inputs"].items()}
        blocked = next((value for value in inputs.values() if isinstance(value, Blocked)), None)
        if blocked is not None or (self.no_output and id_ in self.targets):
            made = Made((blocked,) * 4)
            if blocked is not None and blocked.message is not None and self.comfy.nodes[class_type]["output_node"]:
                self._tell_blocked(id_, blocked.message)
        else:
            self.takes_s = self.comfy.durations.get(class_type, 0)
            if self.takes_s and class_type not in nodes.PACE_THEMSELVES:
                self.work(self.takes_s)
            made = nodes.NODES.get(class_type, nodes.hand_on)(self, inputs)
            self._show(id_, made.shown)
        self.run.executed.append(id_)
        self.values[id_] = made.values
        self._state(id_, "finished", self.states[id_]["max"], self.states[id_]["max"])
        return made

    def _strike(self, id_: str) -> None:
        first = not self.run.executed
        last = id_ in self.targets
        if first and self.comfy.strikes("restart", self.run):
            threading.Thread(target=self.comfy.restart, daemon=True).start()
            self.worker.wait(60)
        if first and (fault := self.comfy.strikes("hang", self.run)):
            self.worker.wait(fault.seconds)  # bound in C: an interrupt waits too
        if first and (fault := self.comfy.strikes("slow", self.run)):
            self.work(fault.seconds)
        if last and self.comfy.strikes("ignore_interrupt", self.run):
            self.uninterruptible = True
        if first and self.comfy.strikes("out_of_memory", self.run):
            raise OutOfMemory
        if (first and self.comfy.strikes("node_error", self.run)) or (self.shown and self.comfy.strikes("fail_later", self.run)):
            raise RuntimeError("Intentional sync execution error for testing")

    def _order(self, cached: set[str]) -> Iterator[str]:
        """ux_friendly_pick_node: outputs as soon as they can be, then what leads to one in a step or two."""
        needed: set[str] = set()
        ways = list(self.targets)
        while ways:
            if (id_ := ways.pop()) not in needed:
                needed.add(id_)
                ways += [] if id_ in cached else self._sources(id_)
        needed = {id_ for id_ in needed if id_ not in cached or id_ in self.targets}
        waiting = [id_ for id_ in self.graph if id_ in needed]
        while waiting:
            ready = [id_ for id_ in waiting if not any(source in waiting for source in self._sources(id_))]
            chosen = min(ready, key=lambda id_: self._steps_to_output(id_))
            waiting.remove(chosen)
            yield chosen

    def _steps_to_output(self, id_: str, most: int = 3) -> int:
        if self.comfy.nodes[self.graph[id_]["class_type"]]["output_node"] or most == 0:
            return 0
        after = [each for each in self.graph if id_ in self._sources(each)]
        return 1 + min((self._steps_to_output(each, most - 1) for each in after), default=most)

    def _sources(self, id_: str) -> list[str]:
        return [value[0] for value in self.graph[id_]["inputs"].values() if isinstance(value, list)]

    def _value(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        made = self.values.get(value[0], ())
        return made[value[1]] if value[1] < len(made) else None

    def _signature(self, id_: str) -> str:
        node = self.graph[id_]
        parts: list[Any] = [node["class_type"], nodes.fingerprint(node["class_type"], node["inputs"], self.files)]
        for name, value in sorted(node["inputs"].items()):
            parts.append([name, [self._signature(value[0]), value[1]] if isinstance(value, list) else value])
        return json.dumps(parts)

    # ---- what it tells ----

    def send(self, type_: str, data: dict[str, Any]) -> None:
        if self.worker.client_id is not None and not self.mute:
            self.comfy.send(type_, data, self.worker.client_id, self.run)

    def _tell(self, type_: str, data: dict[str, Any]) -> None:
        data = {"prompt_id": self.run.prompt_id, **data, "timestamp": round(time.time() * 1000)}
        self.messages.append((type_, data))
        self.send(type_, data)

    def _tell_blocked(self, id_: str, message: str) -> None:
        """On the socket only: the history says success."""
        about = {"exception_message": f"Execution Blocked: {message}", "exception_type": "ExecutionBlocked"}
        empty = {"traceback": [], "current_inputs": [], "current_outputs": []}
        self.send("execution_error", {"prompt_id": self.run.prompt_id, **self._about(), **about, **empty})

    def _about(self) -> dict[str, Any]:
        return {"node_id": self.node, "node_type": self.graph[self.node]["class_type"], "executed": list(self.run.executed)}

    def _show(self, id_: str, shown: dict[str, Any] | None) -> None:
        if shown is not None:
            self.shown[id_] = shown
            data = {"node": id_, "display_node": id_, "output": shown, "prompt_id": self.run.prompt_id}
            self.send("executed", data)

    def _state(self, id_: str, state: str, value: float, most: float) -> None:
        ids = {"node_id": id_, "prompt_id": self.run.prompt_id, "display_node_id": id_, "parent_node_id": None}
        self.states[id_] = {"value": value, "max": most, "state": state, **ids, "real_node_id": id_}
        if not self.mute:  # to everybody, where the prompt names no client
            data = {"prompt_id": self.run.prompt_id, "nodes": dict(self.states)}
            self.comfy.send("progress_state", data, self.worker.client_id, self.run)

    # ---- what nodes may do ----

    def progress(self, value: float, most: float, *, always: bool = False) -> None:
        self._check()
        now = time.monotonic()
        if not always and value < most and now - self._told_at.get(self.node, 0) < self.comfy.progress_every_s:
            return
        self._told_at[self.node] = now
        self._state(self.node, "running", value, most)
        self.send("progress", {"value": value, "max": most, "prompt_id": self.run.prompt_id, "node": self.node})

    def rest(self, seconds: float) -> None:
        self.worker.wait(seconds)

    def work(self, seconds: float) -> None:
        began = time.monotonic()
        while (spent := time.monotonic() - began) < seconds:
            self.progress(spent, seconds)
            self.rest(min(TICK_S, seconds - spent))
        self.progress(seconds, seconds)

    def picture(self, png: bytes) -> None:
        if self.worker.client_id is not None:
            self.comfy.send_binary(b"\0\0\0\1\0\0\0\2" + png, self.worker.client_id)

    def _check(self) -> None:
        if self.worker.interrupted.is_set() and not self.uninterruptible:
            raise Interrupted


class OutOfMemory(RuntimeError):
    """torch.OutOfMemoryError, as a card says it."""

    def __init__(self) -> None:
        super().__init__(
            "Allocation on device 0 would exceed allowed memory. (out of memory)\nCurrently allocated     : 7.12 GiB\n"
            "Requested               : 2.00 GiB\nDevice limit            : 7.79 GiB\nFree (according to CUDA): 19.44 MiB\n"
            "PyTorch limit (set by user-supplied memory fraction)\n                        : 17179869184.00 GiB"
        )


def _told(error: Exception) -> dict[str, Any]:
    named = {"OutOfMemory": "torch.OutOfMemoryError", "UnidentifiedImageError": "PIL.UnidentifiedImageError"}
    name = named.get(type(error).__name__, type(error).__name__)
    lines = ['  File "/srv/comfyui/execution.py", line 545, in execute\n', '  File "/srv/comfyui/nodes.py", line 1, in run\n']
    return {"exception_message": f"{error}\n", "exception_type": name, "traceback": lines}
