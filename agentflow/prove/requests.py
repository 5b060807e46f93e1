"""What is handed in: kinds of requests in a mix, and what is expected of each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

#: Hot enough for the workers' threads to meet at them, with room for all that comes.
KEYS: Final = {"alone": 1, "alone too": 1, "three": 3, "five": 5}
_BATCH: Final = 20
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
