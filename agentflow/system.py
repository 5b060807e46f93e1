"""What a process of AgentFlow holds: settings, database, broker, publisher, live state, storage. Made once, in each process."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import redis
from dramatiq.middleware import Middleware

from agentflow import embedded, log, metrics, redis_client, schema
from agentflow.broker import BellBroker, Doorbell, PollingBroker, RabbitBroker
from agentflow.calls import Calls
from agentflow.comfyui.clients import Clients
from agentflow.connections import Connections
from agentflow.database import Connection, Database, Unavailable
from agentflow.jobs import dispatch, inserting, intake, records, requests, rules, statistics
from agentflow.jobs.intake import Submitted
from agentflow.jobs.model import Job, Ring, State
from agentflow.jobs.requests import NewJob, Prepared
from agentflow.kept import Kept
from agentflow.knowledge.embedding import Embeddings
from agentflow.limits import Limits
from agentflow.links import Links
from agentflow.live import Live, Rows
from agentflow.models import Models
from agentflow.outlook import Outlooks
from agentflow.presence import Presence
from agentflow.publisher import Publisher
from agentflow.secrets import Sealer
from agentflow.settings import Settings
from agentflow.storage import Storage
from agentflow.storage.supabase import SupabaseStorage
from agentflow.telegram.client import Telegram
from agentflow.webhooks import endpoints

logger = log.get(__name__)

_LOOK_AGAIN_S: Final = 0.5

WAIT_MOST_S: Final = 25.0


@dataclass
class Transaction:
    """A transaction of the caller's: its own statements on `conn`, jobs by `submit`; rung after the commit."""

    system: System
    conn: Connection
    rings: list[Ring] = field(default_factory=list)

    def submit(self, organization_id: int, new: NewJob, *, public_only: bool = False) -> Submitted:
        """Raises InvalidJob, UnknownType, IdempotencyConflict."""
        prepared = self.system.prepare(organization_id, new, public_only=public_only)
        return self.submit_prepared(organization_id, prepared)

    def submit_prepared(self, organization_id: int, prepared: Prepared) -> Submitted:
        hours = self.system.settings.retain_idempotency_hours
        ring = self.system.broker.can_publish()
        submitted = intake.submit(self.conn, organization_id, prepared, idempotency_hours=hours, ring=ring)
        self.rings.extend(submitted.rings)
        return submitted

    def submit_with(self, stored: str, values: Mapping[str, Any], organization_id: int, prepared: Prepared) -> bool:
        """A row of the caller's and the job for it, by one statement: see inserting.one_of_stored. Whether they were inserted."""
        ring = self.system.broker.can_publish()
        rings = inserting.one_of_stored(self.conn, stored, values, organization_id, prepared, ring)
        self.rings.extend(rings or ())
        return rings is not None

    def submit_many(self, organization_id: int, prepared: list[Prepared], *, batch_id: UUID | None = None) -> list[Job]:
        ring = self.system.broker.can_publish()
        jobs, rings = intake.submit_many(self.conn, organization_id, prepared, batch_id=batch_id, ring=ring)
        self.rings.extend(rings)
        return jobs


class System:
    """`System.start` for a process that works; `System(settings, kind)` connects to nothing until it is used."""

    def __init__(self, settings: Settings, kind: str) -> None:
        self.settings = settings
        self.kind = kind
        self.home = settings.agentflow_home
        self._embedded: embedded.Embedded | None = None
        self._lock = threading.Lock()
        #: Set when the process is about to end: long work stops at its next step.
        self.closing = False

    @classmethod
    def start(cls, settings: Settings, kind: str) -> System:
        """Start the embedded servers where they are used, check the schema (embedded: bring it up to date).

        Raises SchemaError, EmbeddedError, psycopg.OperationalError.
        """
        system = cls(settings, kind)
        for warning in settings.warnings():
            logger.warning(warning)
        system.join_embedded()
        system.check_schema()
        return system

    def join_embedded(self) -> None:
        if self._embedded is None and self.settings.embedded_database:
            self._embedded = embedded.join(self.home)

    def check_schema(self) -> None:
        """A connection that is cut in the middle of it, by a server that starts anew, is made once more."""
        for is_last in (False, False, True):
            with self.database.connect() as conn:
                try:
                    if self.settings.embedded_database:
                        schema.migrate(conn)
                    schema.check(conn)
                    return
                except Unavailable:
                    if is_last or not conn.closed:
                        raise
            time.sleep(_LOOK_AGAIN_S)

    @property
    def application_name(self) -> str:
        return f"agentflow {self.kind} {socket.gethostname()} {os.getpid()}"[:63]

    @property
    def database_url(self) -> str:
        url = self.settings.database_url
        return url.get_secret_value() if url else embedded.database_url(self.home)

    @property
    def redis_url(self) -> str:
        """Not to be asked where `settings.uses_redis` is false."""
        url = self.settings.redis_url
        return url.get_secret_value() if url else embedded.redis_url(self.home)

    @cached_property
    def database(self) -> Database:
        return Database(
            self.database_url,
            application_name=self.application_name,
            pool_size=self.settings.database_pool_size,
            direct=self.settings.embedded_database,
            trust=self.settings.trust,
        )

    @cached_property
    def broker(self) -> Doorbell:
        """A broker to publish by. A worker's, with its middleware, is made in agentflow/worker/ and put here."""
        broker = self.new_broker([])
        broker.on_emptied = self.ring_everything_again
        return broker

    def new_broker(self, middleware: list[Middleware]) -> Doorbell:
        """The broker that the settings name, connected to nothing yet."""
        settings, prefix = self.settings, self.settings.job_queue_name
        if settings.rabbitmq_url is not None:
            return RabbitBroker(
                settings.rabbitmq_url.get_secret_value(),
                prefix=prefix,
                middleware=middleware,
                client_name=self.application_name,
                quorum=settings.rabbitmq_quorum,
                trust=settings.trust,
            )
        if settings.uses_redis:
            return BellBroker(self.redis_client(answer_timeout_s=5.0), prefix=prefix, middleware=middleware)
        return PollingBroker(prefix=prefix, middleware=middleware)

    def ring_everything_again(self) -> None:
        """The broker is another, a new or an emptied one: whatever was sent to its predecessor is due now."""
        try:
            with self.database.connection() as conn:
                if rung := dispatch.ring_everything_again(conn):
                    logger.info("the broker is new or was emptied: what was sent before is rung again", jobs=rung)
        except Unavailable:
            logger.debug("not rung again: the relay finds the jobs when they are due")

    def is_another_broker(self, fingerprint: str) -> bool:
        """Whether messages went to another one so far; this one is remembered. False when the database is away."""
        try:
            with self.database.connection() as conn:
                return (
                    conn.execute(
                        "insert into agentflow.installation as i (name, value) values ('broker', %s)"
                        " on conflict (name) do update set value = excluded.value where i.value <> excluded.value",
                        (fingerprint,),
                    ).rowcount
                    > 0
                )
        except Unavailable:
            return False

    @cached_property
    def redis_presence(self) -> Presence:
        return redis_client.presence_of(
            self.redis_url,
            self.settings.trust,
            on_change=metrics.redis_connected,
            on_retry=metrics.redis_reconnect,
        )

    def redis_client(
        self, answer_timeout_s: float = 10.0, connect_timeout_s: float | None = None, purpose: str = ""
    ) -> redis.Redis:
        return redis_client.connect(
            self.redis_url,
            connect_timeout_s=connect_timeout_s or self.settings.redis_connect_timeout,
            client_name=f"{self.application_name} {purpose}".strip(),
            answer_timeout_s=answer_timeout_s,
            presence=self.redis_presence,
            trust=self.settings.trust,
        )

    @cached_property
    def live(self) -> Live:
        if not self.settings.uses_redis:
            return Rows()
        # Of their own and quick to give up: a status request must not hang on Redis. Waiting blocks for a second.
        client, waiting = (
            self.redis_client(answer_timeout_s=answer_s, connect_timeout_s=2.0) for answer_s in (2.0, 3.0)
        )
        return Live(client, waiting, prefix=self.settings.job_queue_name)

    @cached_property
    def rules(self) -> rules.Known:
        return rules.Known(self.database)

    @cached_property
    def kept(self) -> Kept:
        return Kept(self.database)

    @cached_property
    def outlooks(self) -> Outlooks:
        return Outlooks(self.database, self.rules, self.settings)

    @cached_property
    def limits(self) -> Limits:
        client = self.redis_client(answer_timeout_s=2.0, connect_timeout_s=2.0) if self.settings.uses_redis else None
        return Limits(client, self.settings.job_queue_name, workers=self._live_workers)

    @cached_property
    def calls(self) -> Calls:
        return Calls(self.database, self.rules, self.limits)

    def _live_workers(self) -> int:
        """For who has to take a share because Redis is away. Without Postgres as well it takes all: nobody gets work then."""
        try:
            with self.database.connection() as conn:
                return len(statistics.workers(conn))
        except Unavailable:
            return 1

    @cached_property
    def publisher(self) -> Publisher:
        return Publisher(self.broker, self.live, self.database)

    @cached_property
    def storage(self) -> Storage:
        settings = self.settings
        if settings.supabase_key is not None and settings.supabase_url is not None:
            return SupabaseStorage(settings.supabase_url, settings.supabase_key, settings.supabase_bucket)
        url = settings.storage_url or (self.home / "storage").resolve().as_uri()
        return Storage.open(url)

    @cached_property
    def models(self) -> Models:
        return Models(self.settings)

    @cached_property
    def comfyui(self) -> Clients:
        return Clients(self.settings.comfyui_servers)

    @cached_property
    def crm_connections(self) -> Connections:
        return Connections("Kommo", "crm")

    @cached_property
    def telegram(self) -> Telegram:
        return Telegram(self)

    @cached_property
    def embeddings(self) -> Embeddings:
        # A worker's other threads renew leases: they come first.
        return Embeddings(self.settings, nice=0 if self.kind == "web" else 5)

    @cached_property
    def links(self) -> Links:
        return Links(self.settings.link_secret or self._installation_secret("links"))

    @cached_property
    def sealer(self) -> Sealer:
        return Sealer(self.settings.link_secret, self.settings.old_keys)

    @cached_property
    def webhook_doors(self) -> endpoints.Known:
        return endpoints.Known(self.database, self.sealer)

    @cached_property
    def installation_id(self) -> str:
        """Made once per database; no secret."""
        return self._installation_secret("id").hex()[:32]

    def prepare(self, organization_id: int, new: NewJob, *, public_only: bool = True) -> Prepared:
        """Check a request for a job, without the database. Raises InvalidJob, UnknownType."""
        return requests.prepare(
            new,
            organization_id=organization_id,
            max_payload_bytes=self.settings.job_payload_bytes,
            public_only=public_only,
        )

    @contextmanager
    def transaction(self, *, one_statement: bool = False) -> Iterator[Transaction]:
        """A transaction whose jobs are rung after its commit. Raises psycopg.OperationalError when the database is away.

        `one_statement` spares what is a transaction by itself the two round trips of BEGIN and COMMIT.
        """
        with self.database.connection() if one_statement else self.database.transaction() as conn:
            transaction = Transaction(self, conn)
            yield transaction
        if transaction.rings:
            self.publisher.ring(transaction.rings)
        elif not self.broker.can_publish():
            self.broker.on_unrung()

    def submit(self, organization_id: int, new: NewJob, *, public_only: bool = False) -> Submitted:
        """One job in a transaction of its own."""
        prepared = self.prepare(organization_id, new, public_only=public_only)
        with self.transaction(one_statement=intake.is_one_statement(prepared)) as transaction:
            return transaction.submit_prepared(organization_id, prepared)

    def cancel(self, organization_id: int, job_id: UUID) -> State | None:
        """Cancel a queued job, ask for the end of a running one. Returns its state now, None when there is no such job."""
        with self.database.transaction() as conn:
            state, ids = records.cancel(conn, organization_id, job_id)
            rings = records.rings_for(conn, ids)
        self.publisher.ring(rings)
        if state == "running":
            self.publisher.cancel()
        return state

    def wait_finished(self, job: Job, timeout_s: float) -> Job | None:
        """The job when it has ended, or as it is after `timeout_s` (25 s at most). None: it was cleaned up."""

        def reread() -> Job | None:
            with self.database.connection() as conn:
                return records.get(conn, job.organization_id, job.id)

        return self.live.wait_finished(job, min(timeout_s, WAIT_MOST_S), reread)

    def admin_key(self) -> str:
        """ADMIN_API_KEY, or the key in `admin.key` in the home, made at the first call."""
        if self.settings.admin_api_key is not None:
            return self.settings.admin_api_key.get_secret_value()
        return admin_key(self.home)

    def heartbeat(self) -> None:
        """Called every few seconds by long-lived processes: see that the embedded servers have their keeper."""
        if self._embedded is not None:
            self._embedded.ensure()

    def close(self, *, wait_stopped_s: float = 0.0) -> None:
        self.closing = True
        if "publisher" in self.__dict__:
            self.publisher.close()
        if "broker" in self.__dict__:
            self.broker.close()
        if "models" in self.__dict__:
            self.models.close()
        if "comfyui" in self.__dict__:
            self.comfyui.close()
        if "crm_connections" in self.__dict__:
            self.crm_connections.close()
        if "telegram" in self.__dict__:
            self.telegram.close()
        if "embeddings" in self.__dict__:
            self.embeddings.close()
        if "database" in self.__dict__:
            self.database.close()
        if self._embedded is not None:
            self._embedded.leave()
            if wait_stopped_s:
                self._embedded.wait_stopped(wait_stopped_s)
            self._embedded = None

    def _installation_secret(self, name: str) -> bytes:
        """Made once per database, so that all web processes sign alike."""
        with self.database.transaction() as conn:
            conn.execute(
                "insert into agentflow.installation (name, value) values (%s, %s) on conflict do nothing",
                (f"secret.{name}", secrets.token_hex(32)),
            )
            row = conn.execute(
                "select value from agentflow.installation where name = %s", (f"secret.{name}",)
            ).fetchone()
        assert row is not None  # noqa: S101 - inserted above
        return bytes.fromhex(row[0])


def admin_key(home: Path) -> str:
    """The operator's key of a home: made by the first process that asks, readable by the owner only."""
    path = home / "admin.key"
    home.mkdir(parents=True, exist_ok=True)
    new = home / f"admin.key.{os.getpid()}.{secrets.token_hex(4)}"
    if not path.exists():
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"af_{secrets.token_urlsafe(32)}\n")
        try:
            os.link(new, path)  # whoever comes second keeps the first one's
        except FileExistsError:
            pass
        finally:
            new.unlink()
    return path.read_text().strip()
