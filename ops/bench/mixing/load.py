"""Hands work in over HTTP as it comes in life: each letter at a moment of its own (Poisson), whatever became of those before.

    python -m ops.bench.mixing.load PLAN.json

The plan is a `Plan`. What was accepted is written to `journal` (kind, job or event, id; a line each), and once a minute what
that was like to `figures`, a line of JSON. A letter's time counts from the moment at which it was due. Its end is told by a line.
"""

from __future__ import annotations

import json
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from ops.bench.comparison.figures import quantile
from ops.bench.comparison.intake import Client
from ops.bench.mixing import letters
from ops.bench.mixing.letters import Customer

#: Each holds one connection. At 300 letters a second these wait when an answer takes longer than 0.2 s.
SENDERS: Final = 64
#: So long a letter is tried again that was not accepted, as senders of webhooks do for longer still.
_PATIENCE_S: Final = 60.0
_AGAIN_S: Final = 0.5
#: After the last letter so long may be sent what has waited for a connection.
_LAST_WORD_S: Final = 60.0
#: And for the answers that are on their way then.
_ANSWER_S: Final = 65.0


class Span(NamedTuple):
    """Until `end_s` after the beginning so many letters a second of each kind."""

    end_s: float
    rates: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """`begin_at` is a time of the wall clock; `first`: the number of the first letter, since numbers must not come twice."""

    port: int
    begin_at: float
    spans: list[Span]
    customers: list[Customer]
    clip: str
    journal: str
    figures: str
    seed: int = 1
    first: int = 0

    @classmethod
    def read(cls, path: Path) -> Plan:
        document: dict[str, Any] = json.loads(path.read_text())
        document["spans"] = [Span(*span) for span in document["spans"]]
        document["customers"] = [
            Customer(**{name: _frozen(value) for name, value in customer.items()}) for customer in document["customers"]
        ]
        return cls(**document)


class Letter(NamedTuple):
    due: float
    kind: str
    number: int
    customer: Customer


class Refused(Exception):
    """An answer that another try does not change."""


class GivenUp(Exception):
    """Nobody accepted it in time."""


@dataclass
class Minute:
    """`late`: how long after a letter was due somebody began to send it; `behind` is the part that is this program's fault.
    `unsent`: letters that still waited for a connection when the time was over."""

    letters: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)
    took_by_kind: dict[str, list[float]] = field(default_factory=dict)
    late: list[float] = field(default_factory=list)
    unsent: int = 0
    behind: list[float] = field(default_factory=list)
    troubles: Counter[str] = field(default_factory=Counter)
    given_up: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)

    def told(self, number: int) -> dict[str, Any]:
        return {
            "minute": number,
            "letters": sum(self.letters.values()),
            "jobs": sum(self.jobs.values()),
            "by_kind": dict(self.letters),
            "accept_ms": _quantiles(self.took),
            "accept_ms_by_kind": {kind: _quantiles(values) for kind, values in sorted(self.took_by_kind.items())},
            "late_ms": _quantiles(self.late),
            "behind_ms": _quantiles(self.behind),
            "troubles": dict(self.troubles),
            "given_up": dict(self.given_up),
            "refused": self.refused[:5],
            "unsent": self.unsent,
        }


class Load:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._clip = Path(plan.clip).read_bytes()
        self._waiting: queue.SimpleQueue[Letter | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._minute = Minute()
        self._began = time.monotonic() + plan.begin_at - time.time()
        self._journal = Path(plan.journal).open("a", buffering=1)  # noqa: SIM115 - until the process ends
        self._figures = Path(plan.figures).open("a", buffering=1)  # noqa: SIM115
        self._stop_at = self._began + plan.spans[-1].end_s + _LAST_WORD_S
        self._threads = [threading.Thread(target=self._send_all, daemon=True) for _ in range(SENDERS)]

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        minute = self._produce()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join(max(0.0, self._stop_at + _ANSWER_S - time.monotonic()))
        self._tell(minute)

    def _produce(self) -> int:
        """Returns the minute that the last letter was in."""
        chance = random.Random(self._plan.seed)
        weights = letters.weights(len(self._plan.customers))
        number, minute, at = self._plan.first, 0, 0.0
        for end_s, rates in self._plan.spans:
            kinds, per_s = list(rates), sum(rates.values())
            while True:
                at += chance.expovariate(per_s)
                if at >= end_s:
                    at = end_s  # no memory: the next span begins anew there
                    break
                while at >= 60 * (minute + 1):
                    self._sleep_until(60 * (minute + 1))
                    self._tell(minute)
                    minute += 1
                self._sleep_until(at)
                due = self._began + at
                with self._lock:
                    self._minute.behind.append(time.monotonic() - due)
                (kind,) = chance.choices(kinds, list(rates.values()))
                (customer,) = chance.choices(self._plan.customers, weights)
                self._waiting.put(Letter(due, kind, number, customer))
                number += 1
        self._sleep_until(at)
        return minute

    def _sleep_until(self, second: float) -> None:
        if (left := self._began + second - time.monotonic()) > 0:
            time.sleep(left)

    def _tell(self, number: int) -> None:
        with self._lock:
            minute, self._minute = self._minute, Minute()
        self._figures.write(json.dumps(minute.told(number)) + "\n")

    def _send_all(self) -> None:
        sender = Sender(self._plan.port, self._note_trouble)
        while (letter := self._waiting.get()) is not None:
            late = time.monotonic() - letter.due
            if time.monotonic() > self._stop_at:
                with self._lock:
                    self._minute.unsent += 1
                continue
            sender.gives_up = min(time.monotonic() + _PATIENCE_S, self._stop_at)
            try:
                ids = letters.hand_in(letter.kind, letter.number, letter.customer, self._clip, sender.post)
            except GivenUp:
                with self._lock:
                    self._minute.given_up[letter.kind] += 1
                continue
            except (Refused, KeyError, ValueError) as error:
                with self._lock:
                    self._minute.refused.append(f"{letter.kind}: {error}")
                    self._minute.given_up[letter.kind] += 1
                continue
            took = time.monotonic() - letter.due
            what = "event" if letters.BY_NAME[letter.kind].events else "job"
            with self._lock:
                self._journal.write("".join(f"{letter.kind}\t{what}\t{id_}\n" for id_ in ids))
                self._minute.letters[letter.kind] += 1
                self._minute.jobs[letter.kind] += letters.BY_NAME[letter.kind].jobs
                self._minute.took.append(took)
                self._minute.took_by_kind.setdefault(letter.kind, []).append(took)
                self._minute.late.append(late)

    def _note_trouble(self, what: str) -> None:
        with self._lock:
            self._minute.troubles[what] += 1


class Sender:
    """One connection that is kept, and made anew when it has ended."""

    def __init__(self, port: int, note_trouble: Any) -> None:
        self._port = port
        self._note_trouble = note_trouble
        self._client: Client | None = None
        self.gives_up = 0.0

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        """What was said with 2xx. Raises Refused and GivenUp."""
        head = [f"POST {path} HTTP/1.1", "Host: mix", f"Content-Length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in {"Content-Type": "application/json", **headers}.items()]
        raw = "\r\n".join([*head, "", ""]).encode() + body
        while True:
            try:
                if self._client is None:
                    self._client = Client(self._port)
                status, said = self._client.send(raw)
            except OSError as error:
                if self._client is not None:
                    self._client.__exit__()
                self._client = None
                status, said, trouble = 0, b"", type(error).__name__
            else:
                trouble = str(status)
            if 200 <= status < 300:
                answer: dict[str, Any] = json.loads(said)
                return answer
            self._note_trouble(trouble)
            if 400 <= status < 500 and status != 429:
                raise Refused(f"{status} {said[:300]!r}")
            if time.monotonic() > self.gives_up:
                raise GivenUp
            time.sleep(_AGAIN_S)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _quantiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {
        name: round(1000 * quantile(seconds, share), 1) for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    } | {"max": round(1000 * max(seconds), 1)}


if __name__ == "__main__":
    Load(Plan.read(Path(sys.argv[1]))).run()
    print(json.dumps({"done": True}), flush=True)
    sys.stdin.read()  # what it has used can be asked until its input ends
