"""Jobs that are claimed before a thread asks: those of which the message is here and that a thread takes up within milliseconds.

So many go in one statement, and threads find theirs claimed. What no thread has taken up after all is handed back, by whoever
gives its message back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final
from uuid import UUID

from agentflow.broker import DeliveredMessage
from agentflow.jobs.model import Verdict
from agentflow.worker.claimer import Claim, Claimer
from agentflow.worker.running import Running
from agentflow.worker.threads import Threads


class Ahead:
    """Safe in threads. `give_up(running, verdict)` settles a job that no thread has begun, once."""

    def __init__(self, claimer: Claimer, threads: Threads, give_up: Callable[[Running, Verdict], None]) -> None:
        self._claimer: Final = claimer
        self._threads: Final = threads
        self._give_up: Final = give_up
        self._lock = threading.Lock()
        # By the id() of their messages, which are kept with them: those to be asked for, in the order they came, and the others.
        self._next: dict[int, DeliveredMessage] = {}
        self._asked: dict[int, tuple[DeliveredMessage, Claim]] = {}

    def expect(self, message: DeliveredMessage) -> None:
        """It is on its way to the threads: claim it as soon as one will be there by then."""
        if self._threads.takes(message.actor_name):
            with self._lock:
                self._next[id(message)] = message
                self._ask()

    def take(self, message: DeliveredMessage) -> Claim | None:
        """What was asked for it; from now on the caller's."""
        with self._lock:
            self._next.pop(id(message), None)
            _, claim = self._asked.pop(id(message), (message, None))
            self._ask()
        return claim

    def has(self, message: DeliveredMessage) -> bool:
        return id(message) in self._asked

    def hand_back(self, message: DeliveredMessage, delay_s: float) -> bool:
        """Whether its job was claimed here: then it is handed back, to be run after `delay_s`."""
        if (claim := self.take(message)) is None:
            return False
        claim.unwanted = lambda running: self._give_up(running, Verdict(*running.key, "handback", delay_s=delay_s))
        if claim.running is None:
            return False  # not yet: if it is claimed after all, it is handed back then
        claim.unwanted(claim.running)
        return True

    def _ask(self) -> None:
        """For free threads at once; beyond them for many together: not before half of what may be claimed is used up."""
        free, more = self._threads.soon()
        most = free + more
        if len(self._asked) >= free and 2 * len(self._asked) > most:
            return
        while self._next and len(self._asked) < most:
            message = self._next.pop(next(iter(self._next)))
            if not message.given_back and (job_id := _job_of(message)) is not None:
                message.claimed = True
                self._asked[id(message)] = message, self._claimer.ask(job_id)


def _job_of(message: DeliveredMessage) -> UUID | None:
    try:
        return UUID(message.args[0])
    except (ValueError, IndexError, TypeError, AttributeError):
        return None  # none of ours, as its thread will find
