"""Who hands work in: a mixed load over HTTP, each request repeated with its key until it is answered, and a journal of it all.

The journal is written before a request is sent and after it was answered, so that what was accepted is known whoever dies.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx2

from agentflow.prove.checker import Accepted, Violation

SENDERS: Final = 6
#: Hot enough for the workers' threads to meet at them, with room for all that comes.
KEYS: Final = {"alone": 1, "alone too": 1, "three": 3, "five": 5}
_BATCH: Final = 20
_ANSWER_S: Final = 15.0
#: After the load has ended, so long is tried to have an answer to what was sent; what waits to be sent then is left out.
_LAST_WORD_S: Final = 60.0
#: But who was promised a cancel gets it: some of these jobs would wait for an hour.
_CANCELS_LATER_S: Final = 60.0
#: The job to be cancelled sleeps for a minute.
_CANCEL_IN_TIME_S: Final = 20.0

#: Kinds of requests that are one job each, by weight.
MIX: Final[Mapping[str, float]] = {
    "ping": 30,
    "sleeps": 10,
    "fails once": 5,
    "parks": 5,
    "native": 1,
    "keyed": 8,
    "again": 5,
    "later": 4,
    "cancelled": 2,
    "chain": 5,
}
_WITH_RECEIVER: Final = {"effect": 12, "long effect": 2, "native effect": 0.7, "called back": 9}

SUCCEEDS: Final = frozenset({"succeeded"})
CANCELS: Final = frozenset({"cancelled"})
#: Until the answer to the cancel says more: one that comes too late leaves the job to its end.
EITHER: Final = SUCCEEDS | CANCELS


@dataclass
class Request:
    """One request and what is expected of it. `again`: sent so many times more, with the same key."""

    key: str
    kind: str
    body: dict[str, Any]
    path: str = "/api/jobs"
    ends: frozenset[str] = SUCCEEDS
    again: int = 0
    cancel_after_s: float | None = None
    effect: bool = False
    due: float = field(default_factory=time.monotonic)


class Requests:
    """The requests of a load, in their order: the same for the same seed.

    `receiver_port` None: by the product's own types alone. `batches`, `crowds`: of the requests, the share that
    are 20 jobs, of any kind and of one key. `mix`: only these kinds of MIX, by weight. `correlation_id`: of every single job.
    """

    def __init__(
        self,
        seed: int,
        receiver_port: int | None,
        videos: list[str],
        *,
        run: str = "",
        batches: float = 0.05,
        crowds: float = 0.015,
        mix: Mapping[str, float] | None = None,
        correlation_id: str | None = None,
    ) -> None:
        self._chance = random.Random(f"{seed} load")
        self._receiver_port = receiver_port
        self.videos = videos
        self._batches = batches
        self._crowds = crowds
        self._mix = MIX if mix is None else mix
        self._correlation_id = correlation_id
        self._run = run
        self._number = 0
        self._seed = seed

    def second(self, jobs: float) -> Iterator[Request]:
        """What is handed in within one second: about so many jobs."""
        count = int(jobs) + (self._chance.random() < jobs % 1)
        while count > 0:
            request, size = self._next(count)
            count -= size
            yield request

    def video(self) -> Request:
        return self._request("video", {"video_id": self._chance.choice(self.videos)}, path="/api/videos/analyze")

    def _next(self, room: int) -> tuple[Request, int]:
        luck = self._chance.random()
        if room >= _BATCH and luck < self._batches:
            jobs = [self._ping({"sleep_ms": self._chance.choice((0, 0, 0, 5, 20))}) for _ in range(_BATCH)]
            return self._request("batch", {"jobs": jobs}, path="/api/jobs/batch"), _BATCH
        if room >= _BATCH and luck < self._batches + self._crowds:
            return self._crowd(), _BATCH
        ms = self._chance.randrange
        kinds: dict[str, Callable[[], Request]] = {
            "ping": lambda: self._request("ping", self._ping({})),
            "sleeps": lambda: self._request("sleeps", self._ping({"sleep_ms": ms(20, 400)})),
            "fails once": lambda: self._request("fails once", self._ping({"fail_attempts": 1})),
            "parks": lambda: self._request("parks", self._ping({"wait_ms": ms(200, 2000)})),
            "native": lambda: self._request("native", self._ping({"native_ms": ms(50, 1500)})),
            "keyed": self._keyed,
            "again": lambda: self._request(
                "again", self._ping({"sleep_ms": ms(0, 30)}), again=self._chance.randint(1, 3)
            ),
            "later": lambda: self._request("later", {**self._ping({}), "run_at": self._in(ms(1, 8))}),
            "cancelled": self._cancelled,
            "chain": lambda: self._request("chain", self._chain()),
        }
        weights = dict(self._mix)
        if self._receiver_port is not None:
            weights |= _WITH_RECEIVER
            kinds |= {
                "effect": lambda: self._effect("effect", sleep_ms=ms(0, 200)),
                "long effect": lambda: self._effect("long effect", sleep_ms=ms(3000, 9000)),
                "native effect": lambda: self._effect("native effect", native_ms=ms(1000, 8000)),
                "called back": self._called_back,
            }
        (kind,) = self._chance.choices(list(weights), list(weights.values()))
        return kinds[kind](), 1

    def _crowd(self) -> Request:
        """Many of one key at once: all workers reach for the same few slots."""
        key = self._chance.choice(list(KEYS))
        jobs = [
            {
                **self._ping({"sleep_ms": self._chance.randrange(20)}),
                "concurrency_key": key,
                "concurrency_limit": KEYS[key],
            }
            for _ in range(_BATCH)
        ]
        return self._request("crowd", {"jobs": jobs}, path="/api/jobs/batch")

    def _keyed(self) -> Request:
        key = self._chance.choice(list(KEYS))
        body = {**self._ping({"sleep_ms": self._chance.randrange(5, 60)}), "concurrency_key": key}
        return self._request("keyed", {**body, "concurrency_limit": KEYS[key]})

    def _cancelled(self) -> Request:
        how = self._chance.randrange(3)
        if how == 0:
            body = {**self._ping({}), "run_at": self._in(3600)}
            return self._request("cancelled waiting", body, ends=EITHER, cancel_after_s=0.3)
        if how == 1:
            body = self._ping({"sleep_ms": 60_000})
            return self._request("cancelled running", body, ends=EITHER, cancel_after_s=1.0)
        return self._request("cancelled perhaps", self._ping({"sleep_ms": 100}), ends=EITHER, cancel_after_s=0.0)

    def _chain(self) -> dict[str, Any]:
        last = self._ping({})
        then = [{**self._ping({"sleep_ms": 10}), "then": [last]}, last]
        return {**self._ping({}), "then": then}

    def _effect(self, kind: str, **payload: int) -> Request:
        body = {"type": "prove_effect", "payload": {"port": self._receiver_port, **payload}}
        return self._request(kind, body, effect=True)

    def _called_back(self) -> Request:
        body = {**self._ping({}), "callback_url": f"http://127.0.0.1:{self._receiver_port}/callbacks"}
        return self._request("called back", body)

    def _ping(self, payload: dict[str, int]) -> dict[str, Any]:
        return {"type": "ping", "payload": payload}

    def _in(self, seconds: float) -> str:
        return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()

    def _request(self, kind: str, body: dict[str, Any], **more: Any) -> Request:
        self._number += 1
        if self._correlation_id is not None and "jobs" not in body:
            body = {**body, "correlation_id": self._correlation_id}
        return Request(f"prove-{self._seed}-{self._run or 0}-{self._number}", kind, body, **more)


class Load:
    """Sends what `Requests` makes, at a steady rate, from a few threads. `accepted`, `violations`, `intake_s` and `troubles` grow
    meanwhile.

    `intake_s`: from the moment that each request was due, whether a thread was free for it then or not, to its answer.
    `troubles`: answers that were none (5xx, 429, no connection), after each of which it was sent again.
    """

    def __init__(
        self,
        url: str,
        admin_key: str,
        requests: Requests,
        *,
        jobs_per_minute: float,
        seconds: float,
        journal: Path,
        senders: int = SENDERS,
    ) -> None:
        self.accepted: list[Accepted] = []
        self.violations: list[Violation] = []
        self.intake_s: list[float] = []
        self.troubles: Counter[str] = Counter()
        self.unanswered = 0
        self.unsent = 0
        self._url = url
        self._headers = {"Authorization": f"Bearer {admin_key}"}
        self._requests = requests
        self._per_s = jobs_per_minute / 60
        self._seconds = seconds
        self._queue: queue.PriorityQueue[tuple[float, int, Any]] = queue.PriorityQueue()
        self._serial = 0
        self._lock = threading.Lock()
        self._journal = journal.open("w", buffering=1)
        self._gives_up = float("inf")
        self._open = 0
        self._began = 0.0
        self._threads = [threading.Thread(target=self._send_all, name=f"load-{n}", daemon=True) for n in range(senders)]
        self._producer = threading.Thread(target=self._produce, name="load", daemon=True)

    def start(self) -> None:
        self._began = time.monotonic()
        for thread in (self._producer, *self._threads):
            thread.start()

    def finish(self) -> None:
        """Wait until everything that was sent is answered, within reason."""
        self._producer.join(self._seconds + 60)
        self._gives_up = time.monotonic() + _LAST_WORD_S
        while self._open and time.monotonic() < self._gives_up + _CANCELS_LATER_S:
            time.sleep(0.1)
        for _ in self._threads:
            self._put(float("-inf"), None)
        for thread in self._threads:
            thread.join(_ANSWER_S + 5)
        self._journal.close()

    def _produce(self) -> None:
        next_video = 0.0
        for second in range(int(self._seconds)):
            time.sleep(max(0.0, self._began + second - time.monotonic()))
            requests = list(self._requests.second(self._per_s))
            if self._requests.videos and second >= next_video:
                requests.append(self._requests.video())
                next_video = second + 12
            for n, request in enumerate(requests):
                request.due = self._began + second + n / len(requests)
                self._put(request.due, request)

    def _put(self, due: float, item: Any) -> None:
        with self._lock:
            self._serial += 1
            self._open += item is not None
            self._queue.put((due, self._serial, item))

    def _send_all(self) -> None:
        with httpx2.Client(base_url=self._url, headers=self._headers, timeout=_ANSWER_S) as client:
            while True:
                due, _, item = self._queue.get()
                if item is None:
                    return
                if (early := due - time.monotonic()) > 0.02:
                    self._queue.put((due, _, item))
                    time.sleep(min(early, 0.05))
                    continue
                try:
                    if isinstance(item, Accepted):
                        self._cancel(client, item, late=time.monotonic() - due > _CANCEL_IN_TIME_S)
                    elif time.monotonic() < self._gives_up:
                        self._submit(client, item)
                    else:
                        self.unsent += 1
                finally:
                    with self._lock:
                        self._open -= 1

    def _submit(self, client: httpx2.Client, request: Request) -> None:
        for repetition in range(1 + request.again):
            self._write({"sends": request.key, "kind": request.kind})
            answer = self._answered(client, request.path, request.body, request.key, None)
            if answer is None:
                self.unanswered += 1
                continue
            if repetition == 0:
                self.intake_s.append(time.monotonic() - request.due)
            if answer.status_code not in (200, 202):
                said = f"{request.kind}: {answer.status_code} {answer.text[:200]}"
                self.violations.append(Violation("refused what is allowed", None, said))
                return
            document = answer.json()
            ids = document["ids"] if "ids" in document else [document.get("task_id") or document["id"]]
            self._write({"accepted": request.key, "ids": ids})
            self._take(request, [UUID(id_) for id_ in ids])
        if request.cancel_after_s is not None and answer is not None:
            promise = Accepted(UUID(ids[0]), request.key, request.kind, request.ends)
            self._put(time.monotonic() + request.cancel_after_s, promise)

    def _take(self, request: Request, ids: list[UUID]) -> None:
        """Repeated submissions come here again, with the same ids or the checker will say so."""
        with self._lock:
            for n, id_ in enumerate(ids):
                key = f"{request.key}/{n}" if len(ids) > 1 else request.key
                self.accepted.append(Accepted(id_, key, request.kind, request.ends, request.effect))

    @property
    def jobs(self) -> int:
        with self._lock:
            return len({promise.id for promise in self.accepted})

    def _cancel(self, client: httpx2.Client, promise: Accepted, *, late: bool) -> None:
        """What the answer says is a promise, too."""
        path = f"/api/jobs/{promise.id}/cancel"
        answer = self._answered(client, path, None, None, self._gives_up + _CANCELS_LATER_S)
        if answer is None:
            return
        if answer.status_code not in (200, 202, 409):
            self.violations.append(Violation("refused what is allowed", promise.id, f"cancel: {answer.status_code}"))
        elif answer.status_code == 200 or (promise.kind == "cancelled running" and not late):
            with self._lock:
                self.accepted.append(dataclasses.replace(promise, ends=CANCELS))

    def _answered(
        self, client: httpx2.Client, path: str, body: dict[str, Any] | None, key: str | None, until: float | None
    ) -> httpx2.Response | None:
        """The first answer that is one. Until then it is sent again: with the key that makes no second job."""
        while time.monotonic() < (until or self._gives_up):
            try:
                answer = client.post(path, json=body, headers={"Idempotency-Key": key} if key else {})
                if answer.status_code < 500 and answer.status_code != 429:
                    return answer
                trouble = str(answer.status_code)
            except httpx2.TransportError as error:
                trouble = type(error).__name__
            with self._lock:
                self.troubles[trouble] += 1
            time.sleep(0.2)
        return None

    def _write(self, what: dict[str, Any]) -> None:
        line = json.dumps({"at": round(time.monotonic() - self._began, 3), **what}) + "\n"
        with self._lock:
            self._journal.write(line)
