"""The bot in tests: a Bot API server, its updates taken in, and jobs run in this process as a worker does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import actors  # noqa: F401 - declares the product's types
from agentflow import settings
from agentflow.jobs import registry, settlement
from agentflow.limits import Window
from agentflow.system import System
from agentflow.telegram import bots, client, polling, shown
from agentflow.webhooks import intake
from agentflow.webhooks.sources.delivery import Delivery
from agentflow.worker.middleware import layers, perform
from agentflow.worker.running import JobContext, Running
from tests import telegram_jobs
from tests.core_support import ORGANIZATION, claim, rows
from tests.telegram_server import BotApi, telegram
from tests.telegram_updates import Update, User

ANN = 111
#: What tests do not wait for.
_AT_ONCE = (Window(100_000, 1.0),)


@pytest.fixture
def bot(environment: dict[str, str]) -> Iterator[BotApi]:
    """Telegram, with one person who talks to the bot."""
    with telegram() as server:
        server.user(ANN)
        environment |= {"TELEGRAM_BOT_TOKEN": server.token, "TELEGRAM_API_URL": server.url}
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders of the tests, and no limits of chats."""
    monkeypatch.setattr(registry, "_types", dict(registry._types))
    telegram_jobs.install()
    monkeypatch.setattr(client, "_IN_A_CHAT", _AT_ONCE)
    monkeypatch.setattr(client, "_OVERALL", _AT_ONCE)
    monkeypatch.setattr(shown, "EVERY_S", 0.0)


@pytest.fixture
def emptied(conn: psycopg.Connection) -> Iterator[None]:
    """The bot's tables end empty, in an order that their keys allow: the module's database is put in order in any."""
    yield
    conn.execute("truncate agentflow.telegram_bots, agentflow.webhook_endpoints cascade")


@pytest.fixture
def talk(
    bot: BotApi, quick: None, emptied: None, environment: dict[str, str], conn: psycopg.Connection
) -> Iterator[Talk]:
    system = System(settings.load(environment), "test")
    yield Talk(system, bot, conn)
    system.close()


class Talk:
    """A conversation, step by step."""

    def __init__(self, system: System, bot: BotApi, conn: psycopg.Connection) -> None:
        self.system = system
        self.bot = bot
        self.conn = conn
        self.ann = User(bot, ANN, {})
        with system.database.transaction() as own:
            bot_id = int(bot.token.partition(":")[0])
            self.endpoint = bots.open_endpoint(own, ORGANIZATION, bot_id, "test_bot", system.sealer).endpoint
        self.door = polling.door_of(system, ORGANIZATION, self.endpoint.id)

    def post(self, update: Update) -> None:
        """As Telegram does: the web process hands on what comes."""
        headers = {"content-type": "application/json", "x-telegram-bot-api-secret-token": self.door.secrets[0]}
        intake.receive(self.system, self.door, Delivery(headers, json.dumps(update).encode(), time.time()))

    def says(self, *updates: Update, then: bool = True) -> None:
        """Everything that comes of it, up to the next thing that is waited for."""
        for update in updates:
            self.post(update)
        if then:
            self.work()

    def work(self, *, but: tuple[str, ...] = ()) -> list[str]:
        """Run what is due, the earliest first; then, three times, what waits. Returns the types of what ran."""
        ran: list[str] = []
        for round_ in range(4):
            if round_:
                self.conn.execute(
                    "update agentflow.jobs set run_at = now(), wake_at = now() where state = 'queued' and type <> all (%s)",
                    (list(but),),
                )
            while (job_id := self._next(but)) is not None:
                ran.append(self.run(job_id))
        return ran

    def _next(self, but: tuple[str, ...]) -> Any:
        row = self.conn.execute(
            "select id from agentflow.jobs where state = 'queued' and run_at <= clock_timestamp() and type <> all (%s)"
            " order by run_at, id limit 1",
            (list(but),),
        ).fetchone()
        return row[0] if row else None

    def run(self, job_id: Any) -> str:
        """One attempt, its end written. Returns the job's type."""
        (job,) = claim(self.conn, uuid4(), job_id)
        assert job.worker is not None
        running = Running(job, float("inf"))
        verdict = perform(layers(self.system), running, JobContext(running, self.system))
        settlement.settle(self.conn, [verdict], job.worker, lease_s=30.0)
        return job.type

    # ---- what there is ----

    @property
    def texts(self) -> list[str]:
        return [message.text for message in self.bot.chat(ANN)]

    @property
    def results(self) -> list[bytes | None]:
        """What the messages with a picture show."""
        return [message.content for message in self.bot.chat(ANN) if message.kind == "photo"]

    def jobs(self, type_: str) -> list[Any]:
        query = "select state, attempt, payload, result, error from agentflow.jobs where type = %s order by id"
        return rows(self.conn, query, type_)

    def states(self) -> list[str]:
        return [row.state for row in rows(self.conn, "select state from agentflow.telegram_requests order by id")]

    def stored(self, job: Any) -> bytes:
        return b"".join(self.system.storage.read(job.result["outputs"][0]["key"]))
