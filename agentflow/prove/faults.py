"""What is done to the system, and how each part comes back. One lane hurts one part; the lanes run side by side."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import psutil
import psycopg
import redis

from agentflow.broker import BrokerAway
from agentflow.jobs.model import Ring
from agentflow.prove import plan
from agentflow.prove.crew import Crew, Member
from agentflow.prove.rabbitmq import Rabbit, RabbitError
from agentflow.prove.servers import Servers, send_all, until
from agentflow.system import System

#: Longer than a lease by so much, so that the frozen worker's jobs are taken over and ended before it wakes.
_FREEZE_PAST_LEASE_S: Final = (2.5, 6.0)
_CLOCK_S: Final = (-600.0, 900.0)
_FAKETIME: Final = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib*/faketime/libfaketimeMT.so.1")
_DISK_MB: Final = 48
_IN_HAND_S: Final = 1.0
_RECONNECTED_S: Final = 2.5
#: Between a fault and the next one of its lane, in any case: or nothing would ever be well.
_BREATH_S: Final = 1.0


@dataclass
class Fault:
    """One fault. Unix times: `began`; `back`, when the part was there again. `victims`: jobs that ran in what was killed."""

    kind: str
    began: float
    back: float | None = None
    victims: list[tuple[UUID, int]] = field(default_factory=list)
    note: str | None = None


class Disk:
    """A file system of its own, small, where storage lies: it can be full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        done = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m,mode=0755", "tmpfs", str(folder)],
                capture_output=True,
                check=False,
            )
            if os.geteuid() == 0 and shutil.which("mount")
            else None
        )
        self.mounted = done is not None and done.returncode == 0

    def fill(self) -> None:
        with suppress(OSError), (self.folder / "filler").open("wb") as file:
            while True:
                file.write(b"\0" * (1 << 20))
                file.flush()

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)


class Faults:
    """`start` begins the lanes; `stop` waits until each has mended what it hurt. `done` is the record."""

    def __init__(
        self,
        *,
        kinds: Sequence[str],
        seed: int,
        seconds: float,
        lease_s: float,
        servers: Servers,
        crew: Crew,
        rabbit: Rabbit | None,
        disk: Disk,
        system: System,
        say: Callable[[str], None],
    ) -> None:
        self.done: list[Fault] = []
        self.unavailable: dict[str, str] = {}
        self._seed = seed
        self._seconds = seconds
        self._lease_s = lease_s
        self._servers = servers
        self._crew = crew
        self._rabbit = rabbit
        self._disk = disk
        self._system = system
        self._say = say
        self._stop = threading.Event()
        self._kinds = [kind for kind in kinds if self._is_possible(kind)]
        self._lanes = [
            threading.Thread(target=self._run, args=(lane,), name=f"faults-{lane}", daemon=True) for lane in plan.LANES
        ]

    def start(self) -> None:
        self._began = time.monotonic()
        for lane in self._lanes:
            lane.start()

    def stop(self) -> None:
        self._stop.set()
        for lane in self._lanes:
            lane.join(300)

    @property
    def kinds(self) -> list[str]:
        return list(self._kinds)

    def _is_possible(self, kind: str) -> bool:
        if kind == "fill_disk" and not self._disk.mounted:
            self.unavailable[kind] = "a small file system for storage can only be mounted by root"
        elif kind == "skew_clock" and _faketime() is None:
            self.unavailable[kind] = "libfaketime is not installed"
        elif kind in plan.LANES["rabbitmq"] and kind != "stray_messages" and self._rabbit is None:
            self.unavailable[kind] = "the broker is Redis"
        return kind not in self.unavailable

    def _run(self, lane: str) -> None:
        chance = random.Random(f"{self._seed} {lane} chances")
        for at, kind in plan.schedule(lane, self._kinds, self._seed, self._seconds):
            if self._stop.wait(max(0.0, self._began + at - time.monotonic())):
                return
            if time.monotonic() - self._began > self._seconds:
                return
            fault = Fault(kind, time.time())
            self._say(kind)
            try:
                getattr(self, f"_{kind}")(fault, chance)
            except (OSError, RabbitError, psycopg.Error, redis.RedisError, psutil.Error, ValueError) as error:
                fault.note = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            fault.back = fault.back or time.time()
            self.done.append(fault)
            self._stop.wait(_BREATH_S)

    def _hold(self, seconds: float) -> None:
        """For so long it stays broken; less when the run ends."""
        self._stop.wait(seconds)

    # ---- workers ----

    def _kill_worker(self, fault: Fault, chance: random.Random) -> None:
        """The whole group: master, child, and the children of that."""
        member = chance.choice(self._crew.workers())
        with member.lock:
            members = member.family()
            fault.victims = self._running_in(members)
            fault.began = time.time()
            send_all(members, signal.SIGKILL)
        self._wait_started_again(member)

    def _kill_process(self, fault: Fault, chance: random.Random) -> None:
        """Dramatiq's child alone: its master ends, too, and the platform starts both again."""
        member = chance.choice(self._crew.workers())
        children = [p for p in member.family()[1:] if p.ppid() == member.pid and not _is_tracker(p)]
        fault.victims = self._running_in(children)
        fault.began = time.time()
        send_all(children[:1], signal.SIGKILL)
        until(lambda: not member.popen or member.popen.poll() is not None or not member.ready(), within_s=20)
        self._wait_started_again(member)

    def _freeze_worker(self, fault: Fault, chance: random.Random) -> None:
        """Asleep for longer than its leases; when it wakes its jobs are somebody else's."""
        member = chance.choice(self._crew.workers())
        with member.lock:  # the crew must not take it for dead
            members = member.family()
            fault.victims = self._running_in(members)
            fault.began = time.time()
            send_all(members, signal.SIGSTOP)
            time.sleep(self._lease_s + chance.uniform(*_FREEZE_PAST_LEASE_S))  # all of it, also when the run ends
            send_all(members, signal.SIGCONT)

    def _deploy(self, fault: Fault, chance: random.Random) -> None:
        """A successor, then SIGTERM."""
        self._crew.relieve(chance.choice(self._crew.workers()), 40.0)

    def _kill_child(self, fault: Fault, chance: random.Random) -> None:
        """A child process in which a job does native work."""

        def children() -> list[psutil.Process]:
            found = [p for m in self._crew.workers() for p in m.family()]
            return [p for p in found if "agentflow.worker.child" in _command(p)]

        if victims := until(children, within_s=15.0):
            fault.began = time.time()
            send_all([chance.choice(victims)], signal.SIGKILL)
        else:
            fault.note = "none was there"

    def _skew_clock(self, fault: Fault, chance: random.Random) -> None:
        """A worker whose wall clock is minutes off, until it is started anew. Its monotonic clock goes as it should."""
        member = chance.choice(self._crew.workers())
        library = _faketime()
        seconds = chance.uniform(*_CLOCK_S)
        fault.note = f"{seconds:+.0f} s"
        skewed = {"LD_PRELOAD": str(library), "FAKETIME": f"{seconds:+.0f}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        self._crew.relieve(member, 40.0, **skewed)

    # ---- web, scheduler, disk ----

    def _kill_web(self, fault: Fault, chance: random.Random) -> None:
        self._kill_member(fault, self._crew.members["web"])

    def _kill_scheduler(self, fault: Fault, chance: random.Random) -> None:
        self._kill_member(fault, self._crew.members["scheduler"])

    def _fill_disk(self, fault: Fault, chance: random.Random) -> None:
        self._disk.fill()
        try:
            self._hold(chance.uniform(3, 8))
        finally:
            self._disk.free()

    # ---- RabbitMQ ----

    def _restart_rabbitmq(self, fault: Fault, chance: random.Random) -> None:
        node = self._node()
        node.kill()
        self._hold(chance.uniform(0, 3))
        node.start()

    def _freeze_rabbitmq(self, fault: Fault, chance: random.Random) -> None:
        node = self._node()
        node.freeze()
        try:
            self._hold(chance.uniform(3, 9))
        finally:
            node.thaw()

    def _wipe_rabbitmq(self, fault: Fault, chance: random.Random) -> None:
        self._node().wipe()
        until(self._node().answers, within_s=30)

    def _refuse_publishes(self, fault: Fault, chance: random.Random) -> None:
        node = self._node()
        node.refuse_publishes()
        try:
            self._hold(chance.uniform(3, 8))
        finally:
            node.accept_publishes()

    def _cut_rabbitmq(self, fault: Fault, chance: random.Random) -> None:
        """While the workers have messages in their hands: somebody's lock on the table holds the claims up."""
        assert self._rabbit is not None  # noqa: S101 - see _is_possible
        with suppress(psycopg.Error), self._servers.connect() as conn, conn.transaction():
            conn.execute("set local lock_timeout = '3s'")
            conn.execute("set local idle_in_transaction_session_timeout = '8s'")
            conn.execute("lock table agentflow.jobs in exclusive mode")
            time.sleep(_IN_HAND_S)
            self._rabbit.cut()
            time.sleep(_RECONNECTED_S)  # they are connected again by the time the claims are answered
            return
        self._rabbit.cut()  # Postgres is away

    def _kill_node(self, fault: Fault, chance: random.Random) -> None:
        """One of a cluster; the next one goes when all its queues have all their copies again."""
        assert self._rabbit is not None  # noqa: S101 - see _is_possible
        node = chance.choice(self._rabbit.nodes)
        node.kill()
        self._hold(chance.uniform(0, 4))
        node.start()
        if not until(self._rabbit.whole, within_s=120, every_s=1.0):
            fault.note = "the cluster was not whole again within two minutes"

    def _stray_messages(self, fault: Fault, chance: random.Random) -> None:
        """Messages doubled and stale: for jobs that wait, run, have ended, or never were."""
        with self._servers.connect() as conn:
            picked = conn.execute(
                "(select id, queue, type, priority from agentflow.jobs where state = 'queued' limit 40) union all"
                " (select id, queue, type, priority from agentflow.jobs where state = 'running' limit 40) union all"
                " (select id, queue, type, priority from agentflow.jobs where state in ('succeeded', 'failed', 'cancelled')"
                "  order by id desc limit 40)"
            ).fetchall()
        rings = [Ring(*row) for row in picked] + [Ring(uuid4(), "default", "ping") for _ in range(5)]
        chance.shuffle(rings)
        fault.began = time.time()
        for _ in range(2):
            if not until(lambda: self._rang(rings), within_s=20, every_s=0.5):
                fault.note = "the broker was away"

    def _rang(self, rings: Sequence[Ring]) -> bool:
        with suppress(BrokerAway, OSError, redis.RedisError):  # another lane may have it in its hands
            self._system.broker.ring(rings)
            return True
        return False

    # ---- Redis ----

    def _restart_redis(self, fault: Fault, chance: random.Random) -> None:
        """kill -9: it keeps nothing on disk, so this empties it, too."""
        self._servers.stop("valkey", signal.SIGKILL)
        time.sleep(0.2)
        until(self._servers.redis_answers, within_s=60)

    def _freeze_redis(self, fault: Fault, chance: random.Random) -> None:
        self._servers.freeze("valkey")
        try:
            self._hold(chance.uniform(3, 9))
        finally:
            self._servers.thaw("valkey")

    def _wipe_redis(self, fault: Fault, chance: random.Random) -> None:
        with self._servers.redis() as client:
            client.flushall()

    def _cut_redis(self, fault: Fault, chance: random.Random) -> None:
        with self._servers.redis() as client:
            for kind in ("pubsub", "normal"):
                client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

    # ---- Postgres ----

    def _restart_postgres(self, fault: Fault, chance: random.Random) -> None:
        self._servers.stop("postgres", signal.SIGQUIT)
        time.sleep(0.2)
        until(self._servers.postgres_answers, within_s=90)

    def _freeze_postgres(self, fault: Fault, chance: random.Random) -> None:
        self._servers.freeze("postgres")
        try:
            # Shorter and longer than a lease: nobody who lives may lose a job by it.
            self._hold(chance.choice((1.5, 3.0, self._lease_s + 2.0)))
        finally:
            self._servers.thaw("postgres")
        until(self._servers.postgres_answers, within_s=60)

    def _cut_postgres(self, fault: Fault, chance: random.Random) -> None:
        with self._servers.connect() as conn:
            conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name like 'agentflow%' and application_name <> 'agentflow prove'"
            )

    # ---- how ----

    def _node(self) -> Any:
        assert self._rabbit is not None  # noqa: S101 - see _is_possible
        return self._rabbit.node

    def _kill_member(self, fault: Fault, member: Member) -> None:
        with member.lock:
            fault.began = time.time()
            send_all(member.family(), signal.SIGKILL)
        self._wait_started_again(member)

    def _wait_started_again(self, member: Member) -> None:
        time.sleep(0.5)
        until(member.ready, within_s=90, every_s=0.1)

    def _running_in(self, processes: Sequence[psutil.Process]) -> list[tuple[UUID, int]]:
        """(id, fence) of what these processes hold."""
        with suppress(psycopg.Error), self._servers.connect() as conn:
            conn.execute("set statement_timeout = '3s'")
            return conn.execute(
                "select j.id, j.fence from agentflow.jobs j join agentflow.workers w on w.id = j.worker"
                " where j.state = 'running' and w.pid = any (%s)",
                ([process.pid for process in processes],),
            ).fetchall()
        return []


def _faketime() -> Path | None:
    found = [path for pattern in _FAKETIME for path in sorted(Path("/").glob(pattern[1:]))]
    return found[0] if found else None


def _is_tracker(process: psutil.Process) -> bool:
    """multiprocessing's own helper, which is no worker."""
    return "resource_tracker" in _command(process)


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
