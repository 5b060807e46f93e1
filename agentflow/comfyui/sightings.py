"""Where a prompt is at its server, what that says when it is looked at again and again, and ending exactly this one, verified."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import UUID

from agentflow.comfyui.client import Check, Client, Queue

#: Between two looks whose agreement counts: an entry moves from the queue to the history under one lock, but the two questions
#: are two, and a request whose answer was lost may still be on its way.
APART_S: Final = 0.5
_LOOK_S: Final = 0.1
_ASK_AGAIN_S: Final = 1.0
#: Between looks at the queue, which comes with all its graphs.
QUEUE_EVERY_S: Final = 1.0
#: In which a queue moves, were its server not stuck: between two prompts it may unload models, which takes seconds.
STUCK_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where a prompt is: `entry`, once it has ended; `position` 0 while it runs, from 1 on while it waits; neither: nowhere."""

    entry: dict[str, Any] | None = None
    position: int | None = None
    queue: Queue | None = None

    @property
    def is_nowhere(self) -> bool:
        return self.entry is None and self.position is None


def look(client: Client, prompt_id: UUID, check: Check) -> Sighting:
    """History, then the queue, then history again for one that ended in between."""
    entry = client.history(prompt_id, check)
    if entry is not None:
        return Sighting(entry)
    queue = client.queue(check)
    position = queue.position(prompt_id)
    if position is None:
        entry = client.history(prompt_id, check)
    return Sighting(entry, position, queue)


def stop(client: Client, prompt_id: UUID, within_s: float, check: Check) -> Sighting | None:
    """Take a prompt out of the queue, or interrupt it. Returns how it ended: with an entry, which may say that it ran to its end
    all the same, or nowhere. None: it is still there after so long.

    It is asked for again and again: one that waited may run by the time that the interruption comes. Neither answer says
    whether there was anything to end.
    """
    end = time.monotonic() + within_s
    ask_at = float("-inf")
    was_nowhere_at: float | None = None
    while True:
        if time.monotonic() >= ask_at:
            client.dequeue(prompt_id, check)
            client.interrupt(prompt_id, check)
            ask_at = time.monotonic() + _ASK_AGAIN_S
        sighting = look(client, prompt_id, check)
        if sighting.entry is not None:
            return sighting
        if not sighting.is_nowhere:
            was_nowhere_at = None
        elif was_nowhere_at is None:
            was_nowhere_at = time.monotonic()
        elif time.monotonic() - was_nowhere_at >= APART_S:
            return sighting
        if time.monotonic() >= end:
            return None
        time.sleep(_LOOK_S)
        check()


class QueueWatch:
    """What the looks at a queue say of a prompt, one after the other."""

    def __init__(self) -> None:
        self.is_running = False
        self._next_at = 0.0
        self._nowhere_at: float | None = None
        self._stuck_at: float | None = None

    def is_due(self) -> bool:
        return time.monotonic() >= self._next_at

    def see(self, sighting: Sighting) -> Literal["lost", "stuck", "running", "waiting", "unknown"]:
        if sighting.queue is None:
            return "unknown"
        now = time.monotonic()
        self._next_at = now + QUEUE_EVERY_S
        if sighting.is_nowhere:
            if self._nowhere_at is not None and now - self._nowhere_at >= APART_S:
                return "lost"
            self._nowhere_at = self._nowhere_at or now
            self._next_at = now + APART_S
            return "unknown"
        self._nowhere_at = None
        self.is_running = sighting.position == 0
        if self.is_running or sighting.queue.running:
            self._stuck_at = None
            return "running" if self.is_running else "waiting"
        self._stuck_at = self._stuck_at or now
        return "stuck" if now - self._stuck_at >= STUCK_S else "waiting"
