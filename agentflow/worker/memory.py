"""Room in the container's memory: a job starts only if what it is taken to need fits, or else it is parked.

Light jobs are the reserve's matter and ask a figure that is a fifth of a second old; a job that was seen to take more takes its
place in the container's ledger (agentflow/worker/ledger.py) while it runs. What jobs need is learned (agentflow/jobs/peaks.py).
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final
from uuid import UUID

from agentflow import container, log, metrics
from agentflow.database import BoundedConnection, Unavailable
from agentflow.errors import OUT_OF_MEMORY, OutOfMemory, Permanent, Wait
from agentflow.jobs import dispatch, large, leases, registry
from agentflow.jobs.model import LARGE, Job, Verdict
from agentflow.jobs.peaks import Peaks
from agentflow.worker.ledger import Ledger, State
from agentflow.worker.room import Asked, Never, Room, decide, that_fit
from agentflow.worker.work import Work

if TYPE_CHECKING:
    from agentflow.system import System
    from agentflow.worker.running import Running

logger = log.get(__name__)

REASON: Final = "memory"
#: Jobs that need less are not counted one by one.
LIGHT: Final = 32 << 20
#: A job under which the kernel killed so often is not tried there again.
KILLS: Final = 2
#: One that was killed needs more than it had then, nobody knows how much.
_MORE: Final = 1.25
_SAMPLE_S: Final = 0.2
#: Under this much even light jobs wait, while heavy ones are there to end.
_LEAST_FREE: Final = 8 << 20
_MOST_SIZES: Final = 1000


class TooLarge(Permanent):
    """More than the container has, empty or not."""

    def __init__(self, type_: str, need: int, limit: int, most: int) -> None:
        super().__init__(
            f"A {type_} like this one is expected to need {megabytes(need)} of memory, and of the container's"
            f" {megabytes(limit)} at most {megabytes(most)} are there for it: run a worker with more memory for the queue"
            f" `{LARGE}`.",
            code="needs_more_memory",
        )


class Memory:
    """One per worker process. `spare` gives back what can be done without; `woken` is told when parked jobs may be due."""

    def __init__(self, system: System, worker: UUID, *, spare: Callable[[], None], woken: Callable[[], None]) -> None:
        self._system = system
        self._container = container.of(system.settings)
        self._reserve = system.settings.memory_reserve_mb << 20
        self._is_on = system.settings.memory_admission and self._container.memory() is not None
        self._spare = spare
        self._woken = woken
        self.peaks = Peaks(system.database)
        self.ledger = Ledger(self._container.identity, worker)
        self._lock = threading.Lock()
        self._sampled_at = float("-inf")
        self._is_full = False
        self._sizes: OrderedDict[UUID, int] = OrderedDict()  # of inputs that were seen only once they were here
        self._to_name: list[UUID] = []

    # ---- a job ----

    @contextmanager
    def admitted(self, running: Running) -> Iterator[None]:
        """Raises Wait while there is no room, and TooLarge where there never will be."""
        job = running.job
        declared = registry.get(job.type).memory
        size = self._sizes.get(job.id)
        if size is None and declared is not None:
            with suppress(KeyError, ValueError, TypeError):  # a payload that its function will refuse
                size = declared.input_bytes(self._system, job)
        running.work = work = Work(job.type, size, self)
        need = self._need(job, size)
        work.counted = self._is_on and max(need, _killed_with(job)) >= LIGHT
        if work.counted:
            self._take(job, need)
        elif self._is_on:
            self._ask_lightly(job)
        try:
            yield
        finally:
            self.done(running)

    def done(self, running: Running) -> None:
        """What the job still does needs no more than any other: its place is another's."""
        if running.work is not None and running.work.counted:
            running.work.counted = False
            self._release(running.job)

    def sized(self, running: Running, size: int) -> None:
        """The job's input turns out to have so many bytes. Raises Wait and TooLarge, as `admitted` does."""
        work = running.work
        if work is None or work.input_bytes == size:
            return
        work.input_bytes = size
        self._sizes[running.job.id] = size
        while len(self._sizes) > _MOST_SIZES:
            self._sizes.popitem(last=False)
        need = self._need(running.job, size)
        if self._is_on and need >= LIGHT:
            work.counted = True  # first: what is taken is given back
            self._take(running.job, need)

    def settled(self, running: Running, verdict: Verdict) -> Verdict:
        """Learn from an attempt that is over. Killed by the kernel too often, it goes to the large queue or for good."""
        work = running.work
        if work is None:
            return verdict
        if work.killed is not None:
            self.peaks.note(work.type, work.input_bytes, round(work.peak * _MORE))
            if verdict.outcome == "retry" and json.loads(verdict.error or "{}").get("code") == OUT_OF_MEMORY:
                return self._killed(running, verdict)
        elif verdict.outcome == "succeeded":
            self.peaks.note(work.type, work.input_bytes, work.peak)
        return verdict

    def look(self, held: Sequence[Running]) -> None:
        """Now and then, while jobs run: what grows here is theirs, in equal parts."""
        resident = container.resident_bytes()
        for running in held:
            if running.work is not None:
                running.work.saw(resident, len(held))

    def _need(self, job: Job, size: int | None) -> int:
        declared = registry.get(job.type).memory
        return self.peaks.need(job.type, size, declared.guess(size) if declared is not None else 0)

    def _ask_lightly(self, job: Job) -> None:
        now = time.monotonic()
        if now - self._sampled_at > _SAMPLE_S and self._lock.acquire(blocking=False):
            try:
                self._sampled_at = now
                memory = self._container.memory()
                self._is_full = memory is not None and memory.limit - memory.pinned < _LEAST_FREE and self._others_run()
            finally:
                self._lock.release()
        if self._is_full and job.priority != "critical":
            raise Wait(random.uniform(0.5, 1.5), REASON, message="the container's memory is full")

    def _others_run(self) -> bool:
        """Whether anything will become free by itself."""
        with self.ledger.open() as (state, _):
            return bool(state.held)

    # ---- room ----

    def _take(self, job: Job, need: int) -> None:
        now, key = time.monotonic(), str(job.id)
        with self.ledger.open() as (state, dead):
            self._explain(state, dead)
            state.forget_late(now)
            before = state.of(self.ledger.owner, key)
            state.release(self.ledger.owner, key)
            room = self._room(state)
            answer = decide(state, Asked(key, need, round(_killed_with(job) * _MORE)), room, now)
            if answer is None:
                state.hold(self.ledger.owner, key, need, before.pids if before is not None else ())
        self._name_killed()
        if isinstance(answer, Never):
            refused = TooLarge(job.type, need, room.memory.limit, answer.most)
            self._move(job, refused)
            raise refused
        if answer is not None:
            self._spare()
            said = f"{megabytes(need)} of memory are not free"
            raise Wait(answer * random.uniform(0.7, 1.3), REASON, message=said, because=_earlier_kill(job))

    def _room(self, state: State) -> Room:
        memory = self._container.memory()
        assert memory is not None  # noqa: S101 - else nothing is counted
        processes = sum(container.private_bytes(pid) for pid in state.pids)
        return Room(memory, processes, self._reserve, container.resident_bytes)

    def _release(self, job: Job) -> None:
        now = time.monotonic()
        with self.ledger.open() as (state, dead):
            self._explain(state, dead)
            state.release(self.ledger.owner, str(job.id))
            state.forget_late(now)
            fit = that_fit(state, self._room(state), now)
        self._name_killed()
        if not fit:
            return
        try:
            with self._system.database.connection() as conn:
                dispatch.wake_parked(conn, [UUID(job_id) for job_id in fit], REASON)
        except Unavailable:
            return  # they look again by themselves
        self._woken()

    def _move(self, job: Job, why: Permanent) -> None:
        """Raises Wait where the job goes on in the large queue."""
        with self._system.database.connection() as conn:
            moved = large.move(conn, job)
        if moved:
            logger.warning("a job goes to the queue for large ones", why=str(why))
            raise Wait(0.0, LARGE, message="a worker with more memory takes it", because=why)

    # ---- processes at work ----

    def began(self, running: Running, pid: int) -> None:
        if running.work is not None and running.work.counted:
            with self.ledger.open() as (state, _):
                held = state.of(self.ledger.owner, str(running.job.id))
                if held is not None and pid not in held.pids:
                    held.pids.append(pid)

    def ended(self, running: Running, pid: int) -> None:
        if running.work is not None and running.work.counted:
            with self.ledger.open() as (state, _):
                held = state.of(self.ledger.owner, str(running.job.id))
                if held is not None and pid in held.pids:
                    held.pids.remove(pid)

    # ---- kills ----

    def kills(self) -> int | None:
        """Of the whole container, so far. None: not known."""
        return self._container.kills()

    def killed(self, peak: int) -> OutOfMemory:
        """The kernel killed a process of the job's for want of memory."""
        metrics.killed_for_memory("child")
        with self.ledger.open() as (state, _):
            if state.explained is not None:
                state.explained += 1
        memory = self._container.memory()
        of = f" of {megabytes(memory.limit)}" if memory is not None else ""
        return OutOfMemory(f"killed by the kernel: out of memory, peak {megabytes(peak)}{of}", peak_bytes=peak)

    def _killed(self, running: Running, verdict: Verdict) -> Verdict:
        job = running.job
        try:
            with self._system.database.connection() as conn:
                kills = 1 + large.tries_ended(conn, job.id, OUT_OF_MEMORY)
                if kills < KILLS:
                    return verdict
                moved = large.move(conn, job)
        except Unavailable:
            return verdict  # the next kill is counted with this one
        if moved:
            logger.warning("the kernel killed it too often: it goes to the queue for large jobs", kills=kills)
            return Verdict(*running.key, "wait", reason=LARGE, error=verdict.error)
        logger.error("the kernel killed it too often: it fails", kills=kills)
        return Verdict(*running.key, "failed", error=verdict.error)

    def _explain(self, state: State, dead: Sequence[UUID]) -> None:
        """Whether the kernel killed the dead: its counter has risen by more than is known."""
        kills = self._container.kills()
        if kills is None:
            return
        if state.explained is None or state.explained > kills:
            state.explained = kills
        for worker in dead:
            if kills > state.explained:
                state.explained += 1
                self._to_name.append(worker)

    def _name_killed(self) -> None:
        with self._lock:
            named, self._to_name = self._to_name, []
        if not named:
            return
        for worker in named:
            metrics.killed_for_memory("worker")
            logger.error("a worker process was killed by the kernel: out of memory", worker=str(worker))
        try:
            with self._system.database.connection() as conn:
                leases.killed_for_memory(conn, named)
        except Unavailable:
            with self._lock:
                self._to_name += named

    # ---- life ----

    def step(self, conn: BoundedConnection) -> None:
        """What has time: who died, and what was learned."""
        with self.ledger.open() as (state, dead):
            self._explain(state, dead)
        self._name_killed()
        self.peaks.step(conn)

    def close(self) -> None:
        self.ledger.close()


def megabytes(number: int) -> str:
    return f"{max(0, number) / (1 << 20):.0f} MB"


def _earlier_kill(job: Job) -> OutOfMemory | None:
    """What the row says of it, and is to say while the job waits."""
    if job.error is None or job.error.get("code") != OUT_OF_MEMORY:
        return None
    return OutOfMemory(job.error.get("message", ""), peak_bytes=_killed_with(job))


def _killed_with(job: Job) -> int:
    """What the job had when the kernel killed it last; 0 where it did not."""
    error = job.error or {}
    return int(error.get("peak_bytes", 0)) if error.get("code") == OUT_OF_MEMORY else 0


__all__ = ["KILLS", "LIGHT", "REASON", "Memory", "TooLarge", "megabytes"]
