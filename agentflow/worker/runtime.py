"""The worker side of a process: everything around the jobs' functions, started and stopped as one."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from uuid import UUID, uuid4

from agentflow import __version__, container, health, log, metrics, redaction, sentry
from agentflow.broker import DeliveredMessage, PolledMessage
from agentflow.comfyui.keeper import Keeper
from agentflow.database import BoundedConnection, Unavailable
from agentflow.jobs import dispatch, leases, records, registry
from agentflow.jobs.model import USUAL_QUEUES, Ring, Settled, State, Verdict
from agentflow.live import Finished
from agentflow.system import System
from agentflow.worker import performing, reporting
from agentflow.worker.admission import Admission
from agentflow.worker.ahead import Ahead
from agentflow.worker.chores import Relay, Rescue
from agentflow.worker.claimer import ClaimAbandoned, Claimer
from agentflow.worker.heart import Heart
from agentflow.worker.lines import Writer
from agentflow.worker.loops import Loop
from agentflow.worker.memory import Memory
from agentflow.worker.observer import Observer
from agentflow.worker.performing import Performing
from agentflow.worker.running import JobContext, Running
from agentflow.worker.settler import Ended, Settler
from agentflow.worker.threads import Threads
from agentflow.worker.watchdog import GRACE_S, Watchdog

logger = log.get(__name__)

#: At the end of the grace the rest is killed and handed back; that takes a moment, too. At most half of a short grace.
_HAND_BACK_S: Final = 4.0
_HURRY_LOOK_S: Final = 0.1
_REPLACED_AT_MOST_EVERY_S: Final = 60.0
_UNKNOWN_TYPE_S: Final = 30.0
_ALONE_RENEW_S: Final = 2.0
_REPORT_S: Final = 2.0
#: So much more work than was told of last is told of at once.
_GROWN: Final = 4 / 3
#: Rounds of a loop in a row, before health says so.
_FAILING: Final = 3


class Runtime:
    """One per process. `threads` is how many jobs run at once; `replace` is how the process gets a successor; `enqueue` puts
    a message before the threads, past the broker, once they are ready."""

    def __init__(
        self,
        system: System,
        *,
        kind: str,
        threads: int,
        queues: Sequence[str] = USUAL_QUEUES,
        perform: Callable[[Running, JobContext], Verdict],
        replace: Callable[[], None],
        threads_ready: Callable[[], bool],
        enqueue: Callable[[DeliveredMessage], None],
        stuck_grace_s: float = GRACE_S,
    ) -> None:
        settings = system.settings
        self.id: Final = uuid4()
        self.system = system
        self.kind = kind
        self.queues = tuple(queues)
        self.draining = False
        self.hurried = False
        self._replace = replace
        self._enqueue = enqueue
        self.threads = Threads(
            settings,
            threads,
            ready=threads_ready,
            draining=lambda: self.draining,
            trip_s=lambda: self.claimer.trip_s,
        )
        self._started = time.monotonic()
        self._held: dict[tuple[UUID, int], Running] = {}
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)
        self._drained = threading.Lock()
        self._all_ended: bool | None = None
        self._told_demand = threads

        lease_s, crashes = settings.job_lease, settings.job_max_crashes
        self.admission = Admission(system.database, system.rules, system.calls, threads)
        self.claimer = Claimer(system.database, self.id, lease_s, self._hold)
        self.ahead = Ahead(self.claimer, self.threads, self._give_up)
        self.settler = Settler(system.database, self.id, lease_s, crashes, self._settled, self._after_settle)
        self.heart = Heart(
            system.database,
            self.id,
            lease_s=lease_s,
            # Where no Redis shows progress and nobody tells of a cancellation, the heartbeat does both.
            renew_s=settings.job_lease_renew if settings.uses_redis else min(settings.job_lease_renew, _ALONE_RENEW_S),
            held=self.held,
            facts=self._facts,
            unsure_of=self.claimer.unsure_of,
            hand_back=lambda job_id, fence: self.settler.put(Ended(Verdict(job_id, fence, "handback"), None)),
            beat=system.heartbeat,
        )
        self.relay = Relay(
            system.database,
            self.queues,
            poll_s=settings.worker_polling_interval,
            publish=self._ring,
            can_publish=system.broker.can_publish,
            can_hear=system.broker.can_hear,
            room=self.threads.room,
            deliver=self._deliver,
            draining=lambda: self.draining,
            work_done=self.admission.work_done,
        )
        self.memory = Memory(system, self.id, spare=system.embeddings.rest, woken=self.relay.wake)
        self.performing = Performing(system, self.admission, self.memory, perform)
        self.observer = Observer(system.outlooks, system.rules, self.queues, busy=lambda: bool(self._held))
        self.rescue = Rescue(
            system.database,
            self.id,
            lease_s=lease_s,
            max_crashes=crashes,
            after=self._after_rescue,
            besides=self._besides,
        )
        self.gpus = Keeper(
            system.database,
            system.comfyui,
            look_again_s=settings.worker_gpu_lock_timeout,
            ring=lambda conn, ids: system.publisher.ring(records.rings_for(conn, ids)),
        )
        self.lines = Writer(system.database, redaction.of(settings))
        self.watchdog = Watchdog(
            held=self.held,
            publish=system.publisher.progress,
            stuck=self._replace_process,
            look=self.memory.look,
            grace_s=stuck_grace_s,
        )

    @property
    def _renders(self) -> bool:
        return "gpu" in self.queues and bool(self.system.settings.comfyui_servers)

    # ---- life ----

    def start(self) -> None:
        broker = self.system.broker
        broker.allowance = self.threads.allowance
        broker.reserved = self.threads.reserved
        broker.known = registry.known
        broker.on_handing_over = self.ahead.expect
        broker.give_back = self.give_back
        self.system.publisher.take_back_later = self.relay.owe
        broker.on_cancel = self.heart.wake
        broker.on_connected = self._connected_to
        broker.on_emptied = self._ring_everything_again
        broker.on_ready = broker.on_unrung = self.relay.wake
        metrics.known_types(registry.every())
        for loop in self._loops:
            loop.start()
        self.watchdog.start()
        self.lines.start()
        health.of(self.system).watch(self.stuck)
        health.of(self.system).also(self.failing)
        if self._renders:
            self.gpus.start()
        logger.info("worker ready", worker=str(self.id), threads=self.threads.count, queues=",".join(self.queues))

    @property
    def _loops(self) -> tuple[Loop, ...]:
        return self.heart, self.claimer, self.settler, self.relay, self.rescue

    def stuck(self) -> str | None:
        """What would be well again in a fresh process."""
        return next((said for loop in self._loops if (said := loop.stuck())), None)

    def failing(self) -> Iterator[str]:
        """Loops that go on failing though the database is there."""
        for loop in self._loops:
            if loop.unexpected >= _FAILING:
                yield f"{loop.name}: failed {loop.unexpected} times in a row"

    def drain(self, grace_s: float) -> bool:
        """Stop taking work; give running jobs `grace_s`; hand back the rest. True when every job's thread has ended.

        Heartbeats go on until the last verdict is written. Safe to call twice: the second caller waits for the first.
        """
        self.draining = True
        with self._drained:
            if self._all_ended is None:
                self._all_ended = self._drain(grace_s)
            return self._all_ended

    def hurry(self) -> None:
        """End the grace of a drain: running jobs are handed back now."""
        self.hurried = True  # nothing more: it may be called in the middle of anything

    def _drain(self, grace_s: float) -> bool:
        logger.info("stopping", jobs=len(self._held), grace_s=grace_s)
        hand_back_s = min(_HAND_BACK_S, grace_s / 2)
        handing_back_from = time.monotonic() + grace_s - hand_back_s
        self.system.broker.stop_consuming()
        self._give_back_aside()
        self.claimer.stop(timeout_s=1.0)
        self._wait_empty(handing_back_from - time.monotonic(), unless_hurried=True)
        for running in self.held():
            running.stop("shutdown")
        self._wait_empty(hand_back_s / 2)
        stuck = [running for running in self.held() if not running.settling]
        for running in stuck:
            self._give_up(running, Verdict(*running.key, "handback"))
        self.settler.flush(_HAND_BACK_S / 2)
        self.lines.stop(timeout_s=hand_back_s / 4)
        for part in (self.relay, self.rescue, self.settler, self.heart, *([self.gpus] if self._renders else [])):
            part.stop(timeout_s=1.0)
        self.watchdog.stop()
        self.memory.close()
        self._retire()
        self.system.publisher.close()
        logger.info("stopped", handed_back=len(stuck))
        return not stuck

    def _give_back_aside(self) -> None:
        messages = self.threads.take_aside()
        for message in messages:
            message.given_back = True
        self.give_back(messages, 0.0)

    def _retire(self) -> None:
        try:
            with self.system.database.connection() as conn:
                leases.retire_worker(conn, self.id)
        except Unavailable:
            logger.debug("the worker's row was not closed; it is taken for dead when it falls silent")

    def _wait_empty(self, seconds: float, *, unless_hurried: bool = False) -> None:
        end = time.monotonic() + seconds
        with self._empty:
            while self._held and not (unless_hurried and self.hurried) and (left_s := end - time.monotonic()) > 0:
                self._empty.wait(min(left_s, _HURRY_LOOK_S))

    # ---- one message ----

    def handle(self, message: DeliveredMessage) -> None:
        """What a worker's thread does with a message: claim, acknowledge, perform, hand over the verdict."""
        if message.given_back:
            metrics.message_dropped("given_back")
            return
        if not self.threads.enter(message):
            if self.threads.set_aside(message):
                return
            message.given_back = True
            if self.ahead.has(message) or not message.pass_on():
                # What was picked here is not picked again while its type has no room.
                self.give_back([message], 0.0 if self.draining or isinstance(message, PolledMessage) else 1.0)
            return
        try:
            self._handle(message)
        finally:
            self._leave(message)

    def _handle(self, message: DeliveredMessage) -> None:
        try:
            job_id = UUID(message.args[0])
        except (ValueError, IndexError, TypeError, AttributeError):
            message.acknowledge()
            metrics.message_dropped("malformed")
            logger.warning("a message without a job's id was dropped")
            return
        claim = self.ahead.take(message)
        if claim is None and message.given_back:  # just now
            metrics.message_dropped("given_back")
            return
        try:
            running = self.claimer.answer_to(claim or self.claimer.ask(job_id))
        except ClaimAbandoned:
            message.given_back = True
            self.give_back([message], 0.0)
            return
        message.acknowledge()
        if running is None:
            metrics.message_dropped("not_claimable")
            return
        self.threads.claimed()
        self.relay.room_in(running.job.queue)
        self.run(running)

    def run(self, running: Running) -> None:
        """Perform a claimed job and hand over its verdict."""
        job = running.job
        if not registry.known(job.type):  # the head of a line, of a type that only newer workers know
            verdict = Verdict(*running.key, "handback", delay_s=_UNKNOWN_TYPE_S, reason="unknown_type")
            self.settler.put(Ended(verdict, running))
            return
        verdict = self.performing.verdict_of(running)
        with self._lock:
            if running.abandoned:
                return  # settled while this thread was thought to be stuck
            running.settling = True
        self.settler.put(Ended(verdict, running))

    # ---- what is held ----

    def held(self) -> list[Running]:
        with self._lock:
            return list(self._held.values())

    def _hold(self, running: Running) -> None:
        with self._lock:
            self._held[running.key] = running
        self.watchdog.wake()

    def _besides(self, conn: BoundedConnection) -> None:
        self.memory.step(conn)
        self.observer.step(conn)

    def _settled(self, ended: Ended, state: State | None) -> None:
        """A verdict is written, or came too late (None). Called from the settler's thread."""
        verdict, running = ended
        with self._empty:
            self._held.pop((verdict.job_id, verdict.fence), None)
            self._empty.notify_all()
        if running is None:
            return
        if running.began is not None:  # what no thread took up was no work
            seconds = time.monotonic() - running.began
            metrics.job_ended(running.job.type, running.job.queue, state, seconds)
            self.admission.done(running.job, seconds)
            if state == "succeeded":
                self.observer.ended(running.job.type, seconds)
        if state == "failed":
            reporting.failed(running, verdict)
        if state is None:
            metrics.lease_lost()
            logger.warning(
                "the job was taken by somebody else; its outcome here does not count", job_id=str(running.job.id)
            )

    def _after_settle(self, settled: Settled, ended: Sequence[Ended]) -> None:
        publisher = self.system.publisher
        publisher.ring(settled.rings)
        self._room_by_ends(ended)
        if any(0 < e.verdict.delay_s < self.system.settings.worker_polling_interval for e in ended):
            self.relay.wake()  # or it looks when the next one is due, which may be sooner than it knew
        if self._demand() > _GROWN * self._told_demand:
            self.heart.wake()  # which tells it: the window is to grow with the work, not some seconds later
        verdicts = {e.verdict.job_id: e.verdict for e in ended}
        publisher.finished(
            [
                Finished(id_, queue, type_, state, verdicts[id_].result, verdicts[id_].error)
                for id_, queue, type_, state in settled.finished
            ]
        )

    def _room_by_ends(self, ended: Sequence[Ended]) -> None:
        """Where what runs counts in what may be rung for, as with shares and caps: else each claim has made room already."""
        now = self.system.rules.now()
        if now.caps:  # over all queues
            self.relay.wake()
        elif now.shared:
            for queue in {e.running.job.queue for e in ended if e.running is not None}:
                self.relay.room_in(queue)

    def _after_rescue(self, settled: Settled) -> None:
        metrics.rescued(len(settled.states))
        reporting.lost(self.system.database, settled)
        for _, queue, type_, state in settled.finished:
            if state == "failed":
                metrics.failed_unseen(type_, queue)
        self.system.publisher.ring(settled.rings)
        self.system.publisher.finished(
            [Finished(id_, queue, type_, state, None, None) for id_, queue, type_, state in settled.finished]
        )
        self.relay.wake()

    def _give_up(self, running: Running, verdict: Verdict) -> None:
        """Settle a job whose thread does not end."""
        with self._lock:
            if running.settling:
                return
            running.abandoned = running.settling = True
        self.settler.put(Ended(verdict, running))

    # ---- messages ----

    def _ring(self, rings: Sequence[Ring]) -> None:
        """For jobs that the relay has picked: what this process has threads for need not go by the broker."""
        mine = [ring for ring in rings if self.threads.takes(ring.type)]
        others = [ring for ring in rings if not self.threads.takes(ring.type)]
        self.system.publisher.ring([*others, *self.system.broker.take(mine)])

    def _deliver(self, rings: Sequence[Ring]) -> None:
        """Put jobs that were picked for this process before its threads."""
        self.threads.expect(rings)
        for ring in rings:
            message = PolledMessage(ring, self.system.settings.job_queue_name)
            self.ahead.expect(message)
            self._enqueue(message)

    def give_back(self, messages: Sequence[DeliveredMessage], delay_s: float) -> None:
        """Acknowledge messages that nobody here can claim; the relay rings another for each after `delay_s`. What was claimed
        for them is handed back."""
        ids = []
        for message in messages:
            message.acknowledge()
            if self.ahead.hand_back(message, delay_s):
                continue
            try:
                ids.append(UUID(message.args[0]))
            except (ValueError, IndexError, TypeError, AttributeError):
                continue
        try:
            with self.system.database.connection() as conn:
                dispatch.take_back(conn, ids, delay_s)
        except Unavailable:
            self.relay.owe(ids)

    def _connected_to(self, fingerprint: str) -> None:
        if self.system.is_another_broker(fingerprint):
            self._ring_everything_again()

    def _ring_everything_again(self) -> None:
        self.system.ring_everything_again()
        self.relay.wake()

    def _leave(self, message: DeliveredMessage) -> None:
        next_one = self.threads.leave(message)
        if next_one is not None:
            self._enqueue(next_one)
        self.system.broker.nudge()
        self.relay.room_made()

    def _demand(self) -> int:
        """Messages that this process uses up in 100 ms, as measured, and until the next ones come: its part of a window."""
        in_100_ms = int(self.threads.claims_per_s() * 0.1)
        return min(1000, max(self.threads.count, in_100_ms) + self.threads.on_the_way())

    def _facts(self) -> dict[str, Any]:
        self._told_demand = self._demand()
        return {
            "kind": self.kind,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "version": __version__,
            "queues": list(self.queues),
            "threads": self.threads.count,
            "demand": dict.fromkeys(self.queues, self._told_demand),
            "memory_bytes": container.resident_bytes() or None,
            "busy": self.threads.busy,
        }

    # ---- replacing the process ----

    def _replace_process(self, running: Running) -> None:
        """A thread ignores its end: record that, drain the others, and let a fresh process take over."""
        job = running.job
        logger.error("a job does not stop: the process is replaced", job_id=str(job.id), job_type=job.type)
        self._give_up(running, performing.verdict_for_stop(running))
        self.drain(self.system.settings.shutdown_grace)
        if (young_s := _REPLACED_AT_MOST_EVERY_S - (time.monotonic() - self._started)) > 0:
            logger.error("replaced less than a minute ago: staying down until then", seconds=round(young_s))
            time.sleep(young_s)
        time.sleep(random.uniform(0, 2.0))  # so that a bad input does not take all processes down in step
        sentry.stop(_REPORT_S)
        self._replace()
