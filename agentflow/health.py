"""What `/health`, `/health/live` and `/health/ready` say, for every process.

live   200 unless this process says of itself that it is stuck: restarting it would help
ready  503 when it should get no traffic: the database is away or older than this version, or the process is draining
whole  200 always, `ok` or `degraded`: for people, and for platforms whose one check would restart a healthy process
       while its database is down
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import psycopg
import redis

from agentflow import log, metrics, schema
from agentflow.database import Unavailable

if TYPE_CHECKING:
    from agentflow.system import System

logger = log.get(__name__)

#: An answer is reused for so long, so that any number of askers cost one look.
CACHE_S: Final = 2.0
#: A check that takes longer counts as failed; it goes on in its thread and its answer is used when it comes.
PATIENCE_S: Final = 1.5

#: A loop is stuck when one round of it takes so many times as long as the database may take for one answer: a restart would not
#: help against a database that is slow or away, and each of a round's few waits for it has an end.
STUCK_ANSWERS: Final = 10

NOT_CONFIGURED: Final = "not configured"


@dataclass(frozen=True, slots=True)
class Connection:
    connected: bool
    last_error: str | None = None  # of the last failure, also after it has passed

    def view(self) -> dict[str, Any]:
        return {"connected": self.connected, "lastError": self.last_error}


class Check:
    """Runs `look` in a thread of its own, one at a time. `look` returns nothing when all is well and raises otherwise."""

    def __init__(self, name: str, look: Callable[[], None]) -> None:
        self._name = name
        self._look = look
        self._changed = threading.Condition()
        self._known = Connection(False, "not checked yet")
        self._known_at: float | None = None
        self._looking_since: float | None = None
        self._error: str | None = None

    def begin(self) -> None:
        """Look anew where what is known is too old; does not wait."""
        with self._changed:
            fresh = self._known_at is not None and time.monotonic() - self._known_at < CACHE_S
            if not fresh and self._looking_since is None:
                self._looking_since = time.monotonic()
                threading.Thread(target=self._run, name=f"check-{self._name}", daemon=True).start()

    def result(self) -> Connection:
        """What is known, at most `CACHE_S` old, within `PATIENCE_S`."""
        self.begin()
        with self._changed:
            began = self._looking_since
            if began is None:
                return self._known
            while self._looking_since == began and (left := began + PATIENCE_S - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._looking_since == began:
                return Connection(False, self._error or f"no answer within {PATIENCE_S:g} s")
            return self._known

    def _run(self) -> None:
        error = None
        try:
            self._look()
        except (*Unavailable, redis.RedisError, OSError, schema.SchemaError, psycopg.Error) as err:
            error = " ".join(str(err).split()) or type(err).__name__
        except Exception as err:  # a check must never take its process down, nor end without an answer
            logger.exception("a health check failed in a way that is not foreseen", check=self._name)
            error = type(err).__name__
        with self._changed:
            if error is not None and self._error != error and (self._known.connected or self._known_at is None):
                logger.warning("health check failed", check=self._name, error=error)
            self._error = error or self._error
            self._known = Connection(error is None, self._error)
            self._known_at = time.monotonic()
            self._looking_since = None
            self._changed.notify_all()


class Health:
    """The health of one process. Who knows that it is stuck says so in a sentence: by `stuck`, or when asked (`watch`)."""

    def __init__(self, system: System) -> None:
        self.draining = False
        self.stuck: str | None = None
        self.started = time.monotonic()
        self._system = weakref.ref(system)
        self._schema_checked = False
        self._redis: redis.Redis | None = None
        self._watched: list[Callable[[], str | None]] = []
        self._also: list[Callable[[], Iterable[str]]] = []
        self.database = Check("database", self._look_at_database)
        self.redis = Check("redis", self._look_at_redis)
        self.rabbitmq = Check("rabbitmq", self._look_at_rabbitmq)

    def also(self, ask: Callable[[], Iterable[str]]) -> None:
        """From now on `ask` is asked, too: for sentences on what does not go well, none when all does."""
        self._also.append(ask)

    def watch(self, ask: Callable[[], str | None]) -> None:
        """From now on `ask` is asked whether something is stuck that a restart would help: a sentence, or None."""
        self._watched.append(ask)

    def why_stuck(self) -> str | None:
        return self.stuck or next((said for ask in self._watched if (said := ask())), None)

    def complaints(self) -> list[str]:
        return [sentence for ask in self._also for sentence in ask()]

    @property
    def uses_redis(self) -> bool:
        system = self._system()
        return system is not None and system.settings.uses_redis

    @property
    def uses_rabbitmq(self) -> bool:
        system = self._system()
        return system is not None and system.settings.rabbitmq_url is not None

    def connections(self) -> dict[str, Connection]:
        """redis, rabbitmq, database."""
        self.database.begin()  # all look at the same time
        if self.uses_rabbitmq:
            self.rabbitmq.begin()
        return {
            "redis": self.redis.result() if self.uses_redis else Connection(False, NOT_CONFIGURED),
            "rabbitmq": self.rabbitmq.result() if self.uses_rabbitmq else Connection(False, NOT_CONFIGURED),
            "database": self.database.result(),
        }

    def _look_at_database(self) -> None:
        system = self._system()
        if system is None:
            return
        answered = False
        try:
            self._ask_database(system)
            answered = True
        finally:
            metrics.database_connected(answered)

    def _ask_database(self, system: System) -> None:
        if self.database._known.connected:
            with system.database.connection() as conn:
                conn.execute("select 1")
            return
        # After a failure not through the pool: it says only that it has no connection, and takes 5 s to say it.
        with system.database.connect(answer_timeout_s=PATIENCE_S) as conn:
            if not self._schema_checked:
                schema.check(conn)
                self._schema_checked = True
            else:
                conn.execute("select 1")

    def _look_at_redis(self) -> None:
        system = self._system()
        if system is None:
            return
        if self._redis is None:
            self._redis = system.redis_client(PATIENCE_S, PATIENCE_S, "health")
        try:
            self._redis.ping()
        except redis.RedisError:
            metrics.redis_connected(False)
            raise
        metrics.redis_connected(True)

    def _look_at_rabbitmq(self) -> None:
        """By the connection that this process publishes by: one for the check alone would count against the plan."""
        system = self._system()
        if system is None:
            return
        try:
            system.broker.check(PATIENCE_S)
        except OSError:
            metrics.rabbitmq_connected(False, system.broker.reconnects)
            raise
        metrics.rabbitmq_connected(True, system.broker.reconnects)


_of_systems: weakref.WeakKeyDictionary[System, Health] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # a signal's handler may come in the middle


def of(system: System) -> Health:
    with _lock:
        if system not in _of_systems:
            _of_systems[system] = Health(system)
        return _of_systems[system]


def report(system: System, service: str) -> tuple[dict[str, Any], bool]:
    """The document of /health, and whether this process should get traffic. Takes 1.5 s at most and raises nothing."""
    health = of(system)
    connections = health.connections()
    complaints, stuck = health.complaints(), health.why_stuck()
    wrong = [name for name, each in connections.items() if not each.connected and each.last_error != NOT_CONFIGURED]
    status = "ok"
    if stuck:
        status = "stuck"
    elif health.draining:
        status = "draining"
    elif wrong or complaints:
        status = "degraded"
    document = {
        "status": status,
        "service": service,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "uptime": round(time.monotonic() - health.started, 1),
        **{name: each.view() for name, each in connections.items()},
        "jobs": metrics.jobs(),
        "degraded": [
            *([stuck] if stuck else []),
            *(f"{name}: {connections[name].last_error}" for name in wrong),
            *complaints,
        ],
    }
    return document, connections["database"].connected and not health.draining and not stuck


def answer(system: System, service: str, path: str) -> tuple[int, dict[str, Any]] | None:
    """Status and document for `/health`, `/health/live`, `/health/ready`; None for any other path."""
    health = of(system)
    if path == "/health/live":
        stuck = health.why_stuck()
        return (503, {"status": "stuck", "reason": stuck}) if stuck else (200, {"status": "live"})
    if path == "/health/ready":
        document, ready = report(system, service)
        return (200 if ready else 503), {"ready": ready, **document}
    if path == "/health":
        return 200, report(system, service)[0]
    return None
