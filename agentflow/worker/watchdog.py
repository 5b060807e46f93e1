"""Ends what runs too long, and tells Redis how far the jobs are. One thread for all jobs of the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from agentflow import log, metrics
from agentflow.live import Claim, Progress
from agentflow.worker.running import Running

logger = log.get(__name__)

TICK_S: Final = 0.2
#: A stopped thread that has not ended after this long will not: it is in a C call, or swallows everything.
GRACE_S: Final = 10.0
_LEASE_MARGIN_S: Final = 5.0


class Watchdog:
    def __init__(
        self,
        *,
        held: Callable[[], Sequence[Running]],
        publish: Callable[[Sequence[tuple[Claim, Progress]]], None],
        stuck: Callable[[Running], None],
        look: Callable[[Sequence[Running]], None] = lambda _held: None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._held = held
        self._publish = publish
        self._stuck = stuck
        self._look = look
        self._grace_s = grace_s
        self._work = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._work.set()

    def wake(self) -> None:
        self._work.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._held():
                self._work.clear()
                if not self._held():
                    self._work.wait(60.0)
            self.step()
            self._stop.wait(TICK_S)

    def step(self) -> None:
        now = time.monotonic()
        changed = []
        held = self._held()
        self._look(held)
        for running in held:
            news = running.news("redis")
            if news is not None:
                changed.append((running.key, news))
            if running.settling:
                continue
            if running.stop_reason is None:
                if running.deadline is not None and now >= running.deadline:
                    logger.warning("time limit reached", job_id=str(running.job.id), job_type=running.job.type)
                    metrics.time_limit(running.job.type)
                    running.stop("time_limit")
                elif now >= running.lease_ends - _LEASE_MARGIN_S / 2 and not running.repeatable:
                    running.stop("lost")
            elif running.began is None:
                continue  # no thread is in it that could be stuck
            elif running.stop_reason in ("time_limit", "cancelled") and not running.abandoned:
                assert running.stopped_at is not None  # noqa: S101 - set together with the reason
                if now - running.stopped_at >= self._grace_s:
                    running.abandoned = True
                    threading.Thread(target=self._stuck, args=(running,), name="replace", daemon=True).start()
        if changed:
            self._publish(changed)
