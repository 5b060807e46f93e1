"""Whatever happens in whatever order, each accepted job ends once: a random walk over the job core on a real Postgres.

Two connections work at the same time, inside transactions of their own; where one has to wait for the other's lock it does,
while the other goes on. Messages are lost, doubled and overtaken, workers die, commits are not heard of. After each commit the
invariants are checked in SQL; at the end nothing is lost any more, and everything has to come to its end.
The second half plants faults, and expects the same walk to find each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from agentflow import embedded
from agentflow.jobs import batches, claims, dispatch, intake, leases, records, settlement
from agentflow.jobs.leases import Held
from agentflow.jobs.model import Job, Outcome, Ring, Verdict
from tests import core_support
from tests.core_support import BROKEN, LEASE_S, MAX_CRASHES, ORGANIZATION, PASS_TIME, audit, child, prepared
from tests.mutations import mutate_function

URL = "http://caller.example/done"
KEYS = {"one": 1, "two": 2, "three": 3}
#: Not faults of the core but answers to a caller who locks in an order of his own, in one long transaction.
GIVEN_UP = (psycopg.errors.DeadlockDetected, psycopg.errors.LockNotAvailable)

WRITTEN_BY_ANOTHER = """
select 'an outcome that its holder did not write', id from agentflow.jobs where state in ('succeeded', 'failed')
    and coalesce(result, error) ->> 'worker' <> finished_by::text || ' ' || fence
union all
select 'an attempt that its holder did not write', job_id from agentflow.attempts
    where error ->> 'worker' <> worker::text || ' ' || fence
"""
ENDS = """
select id, state, (select count(*) from audit.changes c where c.id = j.id and new_state in ('succeeded', 'failed', 'cancelled'))
from agentflow.jobs j
"""


class Violated(AssertionError):
    """An invariant does not hold."""


Op = Callable[[psycopg.Connection, Callable[..., None]], None]


@dataclass
class Session:
    """One of the two connections, and what hangs on its transaction. An effect is what its client does once it has heard of
    the commit; some of them are `known` (true as soon as it is committed) even if nobody hears of it."""

    conn: psycopg.Connection
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    open: bool = False
    pending: Future[None] | None = None
    effects: list[tuple[bool, Callable[[], None]]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)

    def clear(self) -> None:
        self.open, self.pending, self.effects, self.undo = False, None, [], []


@dataclass
class World:
    """The database, with its connections. Lasts over all runs."""

    watcher: psycopg.Connection
    sessions: tuple[Session, Session]
    rescuer: UUID

    def reset(self) -> None:
        for session in self.sessions:
            if session.pending is not None:
                wait([session.pending])
            if session.conn.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                session.conn.execute("rollback")
            session.clear()
        self.watcher.execute(
            "delete from agentflow.jobs; delete from agentflow.idempotency_keys; delete from agentflow.batches;"
            " delete from agentflow.concurrency_keys; delete from audit.changes"
        )


@dataclass
class Worker:
    id: UUID
    held: dict[tuple[UUID, int], Job] = field(default_factory=dict)
    orphans: set[tuple[UUID, int]] = field(default_factory=set)


Draw = Callable[[st.SearchStrategy[Any]], Any]
WHICH = st.integers(0, 1)  # of the two connections, of the two workers
MANY = st.integers(0, 60)
# Hypothesis draws the first of a list more often than the others: that is what keeps the walk going.
OUTCOMES = ["handback", "retry", "succeeded", "succeeded", "failed", "wait", "cancelled"]
#: One rule that draws an action, not a rule for each: Hypothesis leaves out about half of the rules in each run, and little
#: happens where nobody claims or nobody submits. What is drawn never depends on the database, so that a run can be repeated.
ACTIONS = [
    *["settle"] * 5,
    *["claim"] * 4,
    *["submit"] * 3,
    "submit_batch",
    *["begin"] * 3,
    *["end"] * 3,
    *["time_passes"] * 3,
    *["rescue"] * 3,
    *["finish_as_a_zombie"] * 3,
    *["cancel"] * 3,
    *["disturb"] * 3,
    *["heartbeat"] * 2,
    *["crash"] * 2,
    *["relay", "give_back"],
]


class JobMachine(RuleBasedStateMachine):
    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.world.reset()
        self.accepted: list[UUID] = []
        self.keys: dict[str, UUID] = {}
        self.messages: list[UUID] = []
        self.workers = [Worker(UUID(int=n + 1)) for n in range(2)]
        self.born = 2
        self.zombies: list[tuple[UUID, UUID, int]] = []
        self.over = False

    # ---- two connections ----

    def run(self, number: int, op: Op, undo: Callable[[], None] = lambda: None) -> None:
        """Let a session do something: in its open transaction, else by itself. It may have to wait, and go on later."""
        session, other = self._both(number)
        if session.pending is not None:
            session, other = other, session
        session.undo.append(undo)

        def note(effect: Callable[[], None], *, known: bool = False) -> None:
            session.effects.append((known, effect))

        if not other.open and other.pending is None:  # nobody to wait for
            done: Future[None] = Future()
            try:
                done.set_result(op(session.conn, note))
            except BaseException as error:  # noqa: BLE001 - judged in _ended
                done.set_exception(error)
        else:
            done = session.thread.submit(op, session.conn, note)
        session.pending = done
        self._let_run()

    def _let_run(self) -> None:
        """Until no session runs: each is idle or waits for the other. Where both wait, the server ends the deadlock."""
        running = True
        while running:
            running = False
            for session in self.world.sessions:
                if session.pending is None:
                    continue
                if not session.pending.done():
                    wait([session.pending], 0.002)
                if session.pending.done():
                    running = True
                    self._ended(session)
                elif not (any(s.pending is None for s in self.world.sessions) and self._waits(session)):
                    running = True
        self.check()

    def _waits(self, session: Session) -> bool:
        row = self.world.watcher.execute(
            "select cardinality(pg_blocking_pids(%s)) > 0", (session.conn.info.backend_pid,)
        ).fetchone()
        return bool(row and row[0])

    def _ended(self, session: Session) -> None:
        assert session.pending is not None
        error, session.pending = session.pending.exception(), None
        if error is None:
            if not session.open:
                self._committed(session)
        elif isinstance(error, GIVEN_UP):
            if session.open:
                session.conn.execute("rollback")
                session.effects = []
            # What a claim of two statements did in the first stays done.
            undo = session.undo
            self._committed(session)
            for back in undo:
                back()
        else:
            self.over = True
            raise Violated(f"refused: {error!r}") from error

    def _committed(self, session: Session, *, heard: bool = True) -> None:
        effects, undo = session.effects, session.undo
        session.clear()
        for known, effect in effects:
            if heard or known:
                effect()
        if not heard:
            for back in undo:
                back()

    def check(self) -> None:
        found = self.world.watcher.execute(f"{BROKEN} union all {WRITTEN_BY_ANOTHER}", prepare=True).fetchall()
        if found:
            self.over = True
            raise Violated(str(found))

    def _both(self, number: int) -> tuple[Session, Session]:
        return self.world.sessions[number], self.world.sessions[1 - number]

    def _finish_transactions(self) -> None:
        while any(session.open or session.pending for session in self.world.sessions):
            self._end(0, "commit")

    def begin(self, draw: Draw) -> None:
        session = self.world.sessions[draw(WHICH)]
        if session.pending is None and not session.open:
            session.conn.execute("begin")
            session.open = True

    def end(self, draw: Draw) -> None:
        self._end(draw(WHICH), draw(st.sampled_from(["commit", "commit", "commit", "unheard", "rollback"])))

    def _end(self, number: int, how: str) -> None:
        session = next((s for s in self._both(number) if s.open and not s.pending), None)
        if session is None:
            return
        if how == "rollback":
            session.conn.execute("rollback")
            undo = session.undo
            session.clear()
            for back in undo:
                back()
        else:
            session.conn.execute("commit")
            self._committed(session, heard=how == "commit")
        self._let_run()

    # ---- clients ----

    def submit(self, draw: Draw) -> None:
        kinds = ["plain", "key", "key", "key", "plain", "later", "then", "callback", "all", "twice"]
        number, kind, key = draw(WHICH), draw(st.sampled_from(kinds)), draw(st.sampled_from(sorted(KEYS)))
        request: dict[str, Any] = {"max_attempts": 2}
        if kind in ("key", "all"):
            request |= {"key": key, "slots": KEYS[key]}
        if kind == "later":
            request["run_at"] = datetime.now(UTC) + timedelta(seconds=45)
        if kind in ("then", "all"):
            request["then"] = [child(callback_url=URL), child(then=[child()])]
        if kind in ("callback", "all"):
            request["callback_url"] = URL
        if kind == "twice":
            request["idempotency_key"] = key
        new = prepared(**request)

        def op(conn: psycopg.Connection, note: Callable[..., None]) -> None:
            submitted = intake.submit(conn, ORGANIZATION, new)
            note(lambda: self._accepted(submitted.job.id, new.new.idempotency_key), known=True)
            note(lambda: self._publish(submitted.rings))

        self.run(number, op)

    def submit_batch(self, draw: Draw) -> None:
        number, how_many = draw(WHICH), draw(st.integers(1, 3))
        key = draw(st.sampled_from([None, *sorted(KEYS)]))
        new = [
            prepared(max_attempts=2, key=key, slots=KEYS[key] if key else 1, callback_url=URL) for _ in range(how_many)
        ]

        def op(conn: psycopg.Connection, note: Callable[..., None]) -> None:
            batch = batches.submit(conn, ORGANIZATION, new)
            note(lambda: [self._accepted(id_, None) for id_ in batch.ids], known=True)
            note(lambda: self._publish(batch.rings))

        self.run(number, op)

    def _accepted(self, job_id: UUID, key: str | None) -> None:
        if key is not None and self.keys.setdefault(key, job_id) != job_id:
            self.over = True
            raise Violated(f"two jobs of the idempotency key {key}")
        if job_id not in self.accepted:
            self.accepted.append(job_id)

    def cancel(self, draw: Draw) -> None:
        number, which, of = draw(WHICH), draw(MANY), draw(st.sampled_from(["running", "running", "all"]))
        running = [job_id for worker in self.workers for job_id, _ in worker.held]
        choice = running if of == "running" else self.accepted
        if not choice:
            return
        job_id = choice[which % len(choice)]

        def op(conn: psycopg.Connection, note: Callable[..., None]) -> None:
            _, ids = records.cancel(conn, ORGANIZATION, job_id)
            rings = records.rings_for(conn, ids)
            note(lambda: self._publish(rings))

        self.run(number, op)

    # ---- the broker ----

    def _publish(self, rings: Any) -> None:
        self.messages.extend(ring.job_id if isinstance(ring, Ring) else ring for ring in rings)

    def disturb(self, draw: Draw) -> None:
        which, what = draw(MANY), draw(st.sampled_from(["double", "double", "double", "lose", "overtake", "wipe"]))
        if not self.messages:
            return
        message = self.messages.pop(which % len(self.messages))
        if what == "double":
            self.messages += [message, message]
        elif what == "overtake":
            self.messages.insert(0, message)
        elif what == "wipe":
            self.messages.clear()

    def _take(self, how_many: int) -> list[UUID]:
        taken, self.messages = self.messages[:how_many], self.messages[how_many:]
        return taken

    # ---- workers ----

    def claim(self, draw: Draw) -> None:
        self._claim(draw(WHICH), self.workers[draw(WHICH)], draw(st.integers(1, 4)))

    def _claim(self, number: int, worker: Worker, how_many: int) -> None:
        if not self.messages:
            self._relay(number)
            return
        ids = self._take(how_many)

        def op(conn: psycopg.Connection, note: Callable[..., None]) -> None:
            found, keyed = claims.claim(conn, ids, worker.id, LEASE_S)
            note(lambda: worker.held.update({(job.id, job.fence): job for job in found}))
            if keyed:
                more = claims.claim_keyed(conn, keyed, worker.id, LEASE_S)
                note(lambda: worker.held.update({(job.id, job.fence): job for job in more}))

        self.run(number, op, undo=lambda: self.messages.extend(ids))

    def heartbeat(self, draw: Draw) -> None:
        number, worker = draw(WHICH), self.workers[draw(WHICH)]
        held = [Held(*key, progress=0.5) for key in worker.held]

        def heard(answers: dict[tuple[UUID, int], Any]) -> None:
            for key, answer in answers.items():
                if answer == "lost" and worker.held.pop(key, None):
                    self.zombies.append((worker.id, *key))
            orphans = {key for key, answer in answers.items() if answer == "orphan" and key not in worker.held}
            # Seen twice in a row: handed back by the next settle, as of a job that it holds.
            worker.held.update(dict.fromkeys(orphans & worker.orphans))  # type: ignore[misc]
            worker.orphans = orphans

        def op(conn: psycopg.Connection, note: Callable[..., None]) -> None:
            answers = leases.renew(conn, worker.id, held, LEASE_S)
            note(lambda: heard(answers))

        self.run(number, op)

    def settle(self, draw: Draw) -> None:
        number, worker = draw(WHICH), self._busy(draw(WHICH))
        outcomes: list[Outcome] = draw(st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=3))
        doubled = draw(st.booleans())
        if not worker.held:
            self._claim(number, worker, 2)
            return
        verdicts = [
            _verdict(worker.id, key, "handback" if job is None else outcome)
            for outcome, (key, job) in zip(outcomes, worker.held.items(), strict=False)
        ]
        self._settle(number, worker, verdicts * (1 + doubled))

    def _busy(self, who: int) -> Worker:
        return self.workers[who] if self.workers[who].held else self.workers[1 - who]

    def _settle(self, number: int, worker: Worker, verdicts: list[Verdict]) -> None:
        def op(conn: psycopg.Connection, note: Callable[..., None]) -> None:
            settled = settlement.settle(conn, verdicts, worker.id, lease_s=LEASE_S, max_crashes=MAX_CRASHES)

            def heard() -> None:
                for verdict in verdicts:
                    worker.held.pop((verdict.job_id, verdict.fence), None)
                self._publish(settled.rings)

            note(heard)

        self.run(number, op)

    def crash(self, draw: Draw) -> None:
        worker = self._busy(draw(WHICH))
        self.zombies += [(worker.id, *key) for key in worker.held]
        self.born += 1
        self.workers[self.workers.index(worker)] = Worker(UUID(int=self.born))

    def finish_as_a_zombie(self, draw: Draw) -> None:
        number, which, outcome = draw(WHICH), draw(MANY), draw(st.sampled_from(OUTCOMES))
        if not self.zombies:
            return
        # Those whose job has a new holder are the dangerous ones.
        now_held = {job_id for worker in self.workers for job_id, _ in worker.held}
        choice = [zombie for zombie in self.zombies if zombie[1] in now_held] or self.zombies
        worker_id, job_id, fence = choice[which % len(choice)]
        self._settle(number, Worker(worker_id), [_verdict(worker_id, (job_id, fence), outcome)])

    def give_back(self, draw: Draw) -> None:
        number, how_many = draw(WHICH), draw(st.integers(1, 3))
        ids = self._take(how_many)
        self.run(number, lambda conn, note: dispatch.take_back(conn, ids, 1.0))

    # ---- chores ----

    def relay(self, draw: Draw) -> None:
        self._relay(draw(WHICH))

    def _relay(self, number: int) -> None:
        def op(conn: psycopg.Connection, note: Callable[..., None]) -> None:
            rings, _ = dispatch.pick_due(conn, "default")
            note(lambda: self._publish(rings))

        self.run(number, op)

    def rescue(self, draw: Draw) -> None:
        self._rescue(draw(WHICH))

    def _rescue(self, number: int) -> None:
        def op(conn: psycopg.Connection, note: Callable[..., None]) -> None:
            settled = leases.rescue(conn, self.world.rescuer, limit=50, lease_s=LEASE_S, max_crashes=MAX_CRASHES)
            note(lambda: self._publish(settled.rings))

        self.run(number, op)

    def time_passes(self, draw: Draw) -> None:
        self._pass(draw(st.sampled_from([31, 31, 3, 130])))

    def _pass(self, seconds: int) -> None:
        self._finish_transactions()
        self.world.watcher.execute(PASS_TIME, (seconds,), prepare=True)

    @initialize(data=st.data())
    def some_work(self, data: st.DataObject) -> None:
        for _ in range(4):
            self.submit(data.draw)

    @rule(data=st.data(), action=st.sampled_from(ACTIONS))
    def step(self, data: st.DataObject, action: str) -> None:
        getattr(self, action)(data.draw)

    # ---- the end ----

    def teardown(self) -> None:
        try:
            if not self.over:
                self._come_to_rest()
        finally:
            self.world.reset()

    def _come_to_rest(self) -> None:
        """The faults stop. All leases run out, all times come; from then on no time passes, and everything has to end."""
        for _ in range(2):  # the rescued are tried again with a pause
            self._pass(400)
            self._rescue(0)
        worker = self.workers[0]
        worker.held.clear()
        for _ in range(200):
            if not self.messages:
                self._relay(0)
            if not self.messages:
                break
            self._claim(0, worker, 5)
            if worker.held:
                self._settle(0, worker, [_verdict(worker.id, key, "succeeded") for key in worker.held])
        self._everything_has_ended()

    def _everything_has_ended(self) -> None:
        ends = {row[0]: row[1:] for row in self.world.watcher.execute(ENDS, prepare=True).fetchall()}
        open_ = {id_: state for id_, (state, _) in ends.items() if state in ("queued", "running")}
        if open_:
            raise Violated(f"still open when nothing happens any more: {open_}")
        if lost := set(self.accepted) - ends.keys():
            raise Violated(f"accepted, and gone: {lost}")
        if wrong := {id_: times for id_, (_, times) in ends.items() if times != 1}:
            raise Violated(f"did not end once: {wrong}")
        roots = self.world.watcher.execute("select id from agentflow.jobs where parent_id is null").fetchall()
        if unknown := {row[0] for row in roots} - set(self.accepted):
            raise Violated(f"nobody submitted {unknown}")
        unfinished = self.world.watcher.execute("select id from agentflow.batches where finished_at is null").fetchall()
        if unfinished:
            raise Violated(f"batches that are not finished: {unfinished}")


def _verdict(worker: UUID, key: tuple[UUID, int], outcome: Outcome) -> Verdict:
    """It says who wrote it."""
    said = json.dumps({"worker": f"{worker} {key[1]}"})
    delay_s = 5.0 if outcome in ("retry", "wait") else 0.0
    succeeded = outcome == "succeeded"
    return Verdict(*key, outcome, delay_s, None, said if succeeded else None, None if succeeded else said)


# ---- the walk, and the faults that it has to find ----

WALK = settings(
    max_examples=90,
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


@pytest.fixture
def world(stack: embedded.Embedded) -> Iterator[World]:
    with core_support.database(stack) as url:
        # Nothing here has to survive a crash of the server; a deadlock is to be found soon.
        options = "-c synchronous_commit=off -c deadlock_timeout=20ms -c lock_timeout=10s"
        opened = [psycopg.connect(url, autocommit=True, options=options) for _ in range(3)]
        audit(opened[0])
        world = World(opened[0], (Session(opened[1]), Session(opened[2])), core_support.rescuer(opened[0]))
        yield world
        world.reset()
        for session in world.sessions:
            session.thread.shutdown()
        for conn in opened:
            conn.close()


def walk(world: World, how: settings) -> None:
    machine = type("Walk", (JobMachine,), {"world": world})
    run_state_machine_as_test(machine, settings=how)  # type: ignore[no-untyped-call]


@pytest.mark.flaky(reruns=0)  # a job lost once is lost
def test_every_accepted_job_ends_once_whatever_happens(world: World) -> None:
    walk(world, WALK)


FAULTS: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "a claim takes running jobs, too": (
        "claim_1",
        [("state || '' = 'queued'", "state || '' in ('queued', 'running')")],
        "a state left by an edge|a fence that moved",
    ),
    "a finish is not fenced": (
        "settle_1",
        [("and v.fence = j.fence", ""), ("else j.worker = p_worker end", "else true end")],
        "that its holder did not write",
    ),
    "nobody relays": ("relay_5", [("if not pg_try", "if true or not pg_try")], "still open"),
    "nobody rescues": ("rescue_2", [("if not pg_try", "if true or not pg_try")], "still open"),
    # The safety time stays as it is: where nothing is lost a line moves without it.
    "a freed slot wakes nobody": ("wake_line_1", [("where k.key = any (p_keys)", "where false")], "still open"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_walk_finds_a_planted_fault(world: World, fault: str) -> None:
    where, changes, sign = FAULTS[fault]
    mutate_function(world.watcher, where, *changes)

    with pytest.raises((Violated, FlakyFailure)) as caught:
        walk(world, settings(WALK, max_examples=600, derandomize=True, phases=[Phase.generate], print_blob=False))

    found = [caught.value]
    if isinstance(caught.value, FlakyFailure):  # its second run took another turn: the clock is real
        found = [error for error in caught.value.exceptions if isinstance(error, Violated)]
    assert any(word in str(error) for error in found for word in sign.split("|")), found
