"""The decision whether a job's memory fits, from figures alone: of the container, of those that run, and of those that wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from agentflow.container import Memory
from agentflow.worker.ledger import State, Waiting

#: A job that has waited so long for memory keeps what becomes free: others may not overtake it any more.
PATIENCE_S: Final = 20.0
#: Alone in a container that nothing leaves any more, such as a local model that fell asleep 300 s after its last text.
GIVE_UP_S: Final = 360.0
_FIRST_S, _LEAST_S, _MOST_S = 3.0, 5.0, 120.0
_LATE_S: Final = 60.0


class Asked(NamedTuple):
    """What a job is taken to need, in bytes. `after_kill`: what it needs beside others after the kernel has killed it; alone it
    is tried all the same."""

    job: str
    need: int
    after_kill: int = 0


class Never(NamedTuple):
    """The container has no more for jobs than `most` bytes, empty or not."""

    most: int


class Room(NamedTuple):
    """The container as it is. `processes`: what those of the workers themselves hold; `resident`: what a process has, by pid."""

    memory: Memory
    processes: int
    reserve: int
    resident: Callable[[int], int]

    def left(self, state: State) -> int:
        """Of what is free that which nobody is expected to take."""
        return self.memory.limit - self.memory.pinned - state.growth(self.resident) - self.reserve


def decide(state: State, asked: Asked, room: Room, now: float) -> float | Never | None:
    """None: the job may start. Else it is noted as waiting, and looks again in about so many seconds; or that is no use."""
    free = room.memory.limit - room.memory.pinned
    # What the processes themselves hold never becomes free; of what else is there, nobody knows.
    most = room.memory.limit - room.reserve - room.processes
    if asked.need > most:
        state.leave(asked.job)
        return Never(most)
    need = max(asked.need, min(asked.after_kill, most)) if state.held else asked.need
    first = _kept_for(state, now)
    others_first = first is not None and first.job != asked.job
    kept = first.need if first is not None and others_first else 0
    if need <= room.left(state) - kept:
        return None
    waiting = state.wait(asked.job, need, now)
    if not state.held and not others_first:
        if now - waiting.since >= PATIENCE_S and need <= free:
            return None  # nobody is there to make more room: the reserve is for this, too
        if now - waiting.since >= GIVE_UP_S:
            state.leave(asked.job)
            return Never(max(0, free - room.reserve))
    # Whoever leaves wakes those that fit; this is for what is freed otherwise. The more wait, the less often each looks.
    pause_s = _FIRST_S if waiting is state.first() else min(_MOST_S, _LEAST_S + len(state.waiting) / 2)
    waiting.until = now + 2 * pause_s + _LATE_S
    return pause_s


def that_fit(state: State, room: Room, now: float) -> list[str]:
    """Those that wait and would fit now, the first ones first; whoever has waited too long is not overtaken."""
    left = room.left(state)
    kept = _kept_for(state, now)
    fit = []
    for waiting in sorted(state.waiting, key=lambda waiting: waiting.since):
        if waiting.need <= left:
            fit.append(waiting.job)
            left -= waiting.need
        elif waiting is kept:
            left -= waiting.need
    # Alone it may have the reserve, too: let it look.
    return fit or ([first.job] if (first := state.first()) and not state.held else [])


def _kept_for(state: State, now: float) -> Waiting | None:
    first = state.first()
    return first if first is not None and now - first.since >= PATIENCE_S else None
