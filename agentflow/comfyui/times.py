"""How far a render is: by its nodes and sampler steps, each weighed by what it took the last times on this server."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from psycopg.types.json import Jsonb

from agentflow.comfyui.socket import Event
from agentflow.database import Connection

#: What tells graphs of one shape apart in their time: how much there is to compute.
_SIZES: Final = ("steps", "width", "height", "length", "batch_size", "frames", "megapixels", "amount")
#: Of a graph that was never seen, in parts of its nodes.
_SAMPLER_WEIGHT: Final = 20.0
#: How much the newest time counts.
_NEWEST: Final = 0.3
#: By the clock alone nothing is ever quite done.
_MOST_BY_CLOCK: Final = 0.95


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the whole, and by node."""

    seconds: float
    nodes: Mapping[str, float] = field(default_factory=dict)


def shape_of(graph: Mapping[str, Any]) -> str:
    """The same for graphs that take about as long: nodes, and the sizes among their inputs."""
    nodes = [
        [node, each.get("class_type"), [(each.get("inputs") or {}).get(size) for size in _SIZES]]
        for node, each in sorted(graph.items())
    ]
    return hashlib.sha256(json.dumps(nodes, default=str).encode()).hexdigest()[:32]


def known(conn: Connection, shape: str, server: str) -> Times | None:
    row = conn.execute(
        "select seconds, nodes from agentflow.render_times where shape = %s and server = %s", (shape, server)
    ).fetchone()
    return Times(*row) if row else None


def learn(conn: Connection, shape: str, server: str, took: Times) -> None:
    """Of a render that ran, not one from the cache."""
    before = known(conn, shape, server)
    if before is not None:
        mixed = {node: _mixed(before.nodes.get(node), seconds) for node, seconds in took.nodes.items()}
        took = Times(_mixed(before.seconds, took.seconds), {**before.nodes, **mixed})
    conn.execute(
        "insert into agentflow.render_times as t (shape, server, seconds, nodes) values (%s, %s, %s, %s)"
        " on conflict (shape, server) do update set seconds = excluded.seconds, nodes = excluded.nodes,"
        " updated_at = clock_timestamp()",
        (shape, server, took.seconds, Jsonb(took.nodes)),
    )


def forget(conn: Connection) -> None:
    """Of graphs that nobody renders any more."""
    conn.execute("delete from agentflow.render_times where updated_at < clock_timestamp() - interval '90 days'")


def _mixed(before: float | None, now: float) -> float:
    return now if before is None else (1 - _NEWEST) * before + _NEWEST * now


class Course:
    """What the websocket has said of one prompt so far."""

    def __init__(self, graph: Mapping[str, Any], usual: Times | None) -> None:
        usual_s = usual.nodes if usual else {}
        least_s = usual.seconds / (100 * len(graph)) if usual and graph else 0.0
        self._weights = {
            node: usual_s.get(node, least_s) or least_s if usual_s else _guessed(each) for node, each in graph.items()
        }
        self._usual_s = usual.seconds if usual else None
        self._done: set[str] = set()
        self._step: dict[str, float] = {}
        self._node: str | None = None
        self._since = self._began = time.monotonic()
        self._outputs: dict[str, Any] = {}
        self._messages: list[list[Any]] = []
        self._succeeded = self._has_begun = False
        self.took: dict[str, float] = {}
        self.heard = False

    def begin(self) -> None:
        """It runs from now on, as far as is known."""
        if not (self.heard or self._has_begun):
            self._has_begun = True
            self._since = self._began = time.monotonic()

    def hear(self, event: Event) -> None:
        data = event["data"]
        match event.get("type"):
            case "execution_start":
                self.heard = True
                self._since = self._began = time.monotonic()
                self._messages.append(["execution_start", data])
            case "execution_cached":
                cached = data.get("nodes")
                self._done |= {str(node) for node in (cached if isinstance(cached, list) else ())}
                self._messages.append(["execution_cached", data])
            case "executed":
                self._outputs[str(data.get("node"))] = data.get("output")
            case "execution_success":
                self._succeeded = True
                self._messages.append(["execution_success", data])
            case "executing":
                self._now_at(data.get("node"))
            case "progress":
                self._steps(data.get("node"), data)
            case "progress_state":
                nodes = data.get("nodes")
                for node, each in nodes.items() if isinstance(nodes, dict) else ():
                    if isinstance(each, dict):
                        self._steps(node, each)
                        if each.get("state") == "finished":
                            self._done.add(str(node))

    def entry(self) -> dict[str, Any] | None:
        """What the history would have of it, where its good end was heard: of use when somebody has cleared the history. Whether
        its files are there is for their download to say."""
        if not self._succeeded:
            return None
        return {"outputs": self._outputs, "status": {"status_str": "success", "messages": self._messages}}

    def fraction(self) -> float | None:
        """0 to 1. None: nothing is known."""
        total = sum(self._weights.values())
        if self.heard and total > 0:
            done = sum(weight for node, weight in self._weights.items() if node in self._done)
            begun = sum(self._weights[n] * share for n, share in self._step.items() if n not in self._done)
            return min(1.0, (done + begun) / total)
        if self._usual_s:
            return min(_MOST_BY_CLOCK, (time.monotonic() - self._began) / self._usual_s)
        return None

    def _now_at(self, node: Any) -> None:
        now = time.monotonic()
        self.heard = True
        if self._node is not None:
            self.took[self._node] = self.took.get(self._node, 0.0) + now - self._since
            self._done.add(self._node)
        self._node, self._since = (str(node) if node is not None else None), now

    def _steps(self, node: Any, data: Mapping[str, Any]) -> None:
        value, most = data.get("value"), data.get("max")
        if str(node) in self._weights and isinstance(value, int | float) and isinstance(most, int | float) and most > 0:
            self.heard = True
            self._step[str(node)] = min(1.0, max(0.0, value / most))


def _guessed(node: Mapping[str, Any]) -> float:
    return _SAMPLER_WEIGHT if "sampler" in str(node.get("class_type")).lower() else 1.0
