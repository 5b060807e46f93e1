"""A Kommo account whose things change and vanish while it is mirrored, by workers that are killed, with hints that get lost.

For the test at a small size, and for ops/bench/kommo.py at a large one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from agentflow.jobs.requests import NewJob
from agentflow.jobs.unique import Unique
from agentflow.kommo import syncing, touched
from agentflow.kommo.accounts import Account
from agentflow.system import System
from tests.core_support import ORGANIZATION
from tests.kommo_server import Account as Server
from tests.processes import Process, eventually, worker

_FIRST = 1_600_000_000


def fill(server: Server, leads: int, contacts: int) -> None:
    """Leads a minute apart, but for a tenth of them that were imported in one second; contacts twenty in each second."""
    for n in range(leads):
        at = _FIRST if n < leads // 10 else _FIRST + 60 * n
        server.add("leads", at=at, name=f"Lead {n}", price=n, pipeline_id=7, status_id=142)
    for n in range(contacts):
        server.add("contacts", at=_FIRST + n // 20, name=f"Contact {n}")
    for n in range(leads // 10):
        server.add("tasks", at=_FIRST + 30 * n, text=f"Task {n}", complete_till=_FIRST)
        server.add("leads/notes", at=_FIRST + 30 * n, entity_id=n, note_type="common", params={"text": str(n)})


class Life:
    """`stirs_per_s` changes come from the beginning of `going_on` to its end; of their hints (webhooks) `lost` do not arrive."""

    def __init__(
        self, system: System, server: Server, account: Account, *, stirs_per_s: float, lost: float, seed: int
    ) -> None:
        self._system = system
        self._server = server
        self._account = account
        self._stirs_per_s = stirs_per_s
        self._lost = lost
        self._chance = random.Random(seed)
        self.stirs = 0
        self.hints = 0

    @contextmanager
    def going_on(self, *, due_every_s: float | None = None) -> Iterator[None]:
        """With `due_every_s` the account is due so often, more often than settings allow."""
        ended = threading.Event()
        threads = [
            threading.Thread(target=self._stir, args=(ended,), daemon=True),
            threading.Thread(target=self._schedule, args=(ended, due_every_s), daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join(60)

    def _stir(self, ended: threading.Event) -> None:
        while not ended.wait(self._chance.expovariate(self._stirs_per_s)):
            path = self._chance.choice(("leads", "leads", "contacts", "contacts", "tasks", "leads/notes"))
            kind = self._chance.random()
            id_ = self._one(path)
            self.stirs += 1
            if kind < 0.25 or id_ is None:
                id_ = self._server.add(path, name="new", entity_id=1, note_type="common", params={})
            elif kind < 0.4:
                # Half of the deletions leave a line in the account's log, the others not a trace.
                self._server.remove(path, id_, event=self._chance.random() < 0.5)
            else:
                self._server.change(path, id_, name=f"changed {self.stirs}")
            if self._chance.random() > self._lost and "/" not in path:
                self._hint(path, id_)

    def _one(self, path: str) -> int | None:
        with self._server.lock:
            things = self._server.things[path]
            return self._chance.choice(list(things)) if things else None

    def _hint(self, path: str, id_: int) -> None:
        """What the handler of a webhook does: it names the thing, and asks for a re-read of what was named."""
        self.hints += 1
        payload = {"account_id": str(self._account.id), "touched": True}
        soon = Unique(f"{self._account.id}:touched", "debounce", period_s=0.5, max_wait_s=2.0)
        with self._system.transaction() as transaction:
            touched.note(transaction.conn, ORGANIZATION, self._account.id, [(path, id_)])
            transaction.submit(ORGANIZATION, NewJob("sync_crm", payload, unique=soon))

    def _schedule(self, ended: threading.Event, due_every_s: float | None) -> None:
        while not ended.wait(due_every_s or 1.0):
            with self._system.transaction() as transaction:
                if due_every_s is not None:
                    transaction.conn.execute(
                        "update agentflow.crm_accounts set next_sync_at = now() where organization_id = %s",
                        (ORGANIZATION,),
                    )
                for each in syncing.due(transaction.conn):
                    syncing.submit_due(transaction, each)

    # ---- jobs ----

    def sync(self, mode: Any) -> UUID:
        with self._system.transaction() as transaction:
            return syncing.submit(transaction, ORGANIZATION, self._account.id, mode).job.id

    def finish(self, conn: psycopg.Connection, *, within_s: float) -> None:
        """After the last change: whatever waits, and then a walk over everything."""
        for mode in ("incremental", "reconcile"):
            wait_ended(conn, self.sync(mode), within_s=within_s)


def wait_ended(conn: psycopg.Connection, job_id: UUID, *, within_s: float) -> None:
    def state() -> bool:
        row = conn.execute("select state, error from agentflow.jobs where id = %s", (job_id,)).fetchone()
        assert row is not None and row[0] not in ("failed", "cancelled"), row
        return bool(row[0] == "succeeded")

    eventually(state, within_s=within_s, every_s=0.2)


class Crew:
    """Two workers, of which now and then one is killed and replaced."""

    def __init__(self, environment: dict[str, str], folder: Path, seed: int) -> None:
        self._environment = {"JOB_LEASE": "4", "JOB_LEASE_RENEW": "1", "JOB_MAX_CRASHES": "100", **environment}
        self._folder = folder
        self._chance = random.Random(seed)
        self._stack = ExitStack()
        self._workers: list[Process] = []
        self.kills = 0

    def __enter__(self) -> Crew:
        for _ in range(2):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        log = self._folder / f"worker-{self.kills}-{len(self._workers)}.log"
        self._workers.append(self._stack.enter_context(worker(self._environment, log)))

    def kill_one(self) -> None:
        self._workers.pop(self._chance.randrange(2)).kill()
        self.kills += 1
        self._start()

    def kill_now_and_then(self, until: Any, *, every_s: tuple[float, float], within_s: float) -> None:
        """Until `until()` is true."""
        end = time.monotonic() + within_s
        while not until():
            assert time.monotonic() < end, "it did not come to its end"
            next_kill = time.monotonic() + self._chance.uniform(*every_s)
            while time.monotonic() < next_kill and not until():
                time.sleep(0.2)
            if not until():
                self.kill_one()
