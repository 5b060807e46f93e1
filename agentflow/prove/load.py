"""Who hands work in: a mixed load over HTTP, each request repeated with its key until it is answered, and a journal of it all.

The journal is written before a request is sent and after it was answered, so that what was accepted is known whoever dies.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx2

from agentflow.prove.checker import Accepted, Violation
from agentflow.prove.requests import CANCELS, Request, Requests

SENDERS: Final = 6
_ANSWER_S: Final = 15.0
#: After the load has ended, so long is tried to have an answer to what was sent; what waits to be sent then is left out.
_LAST_WORD_S: Final = 60.0
#: But who was promised a cancel gets it: some of these jobs would wait for an hour.
_CANCELS_LATER_S: Final = 60.0
#: The job to be cancelled sleeps for a minute.
_CANCEL_IN_TIME_S: Final = 20.0


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
