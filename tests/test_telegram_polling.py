"""Where updates come from: asked for, or sent; by the commands, which never print what opens the bot."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import psycopg
import pytest

from agentflow.telegram.polling import Polling, Stopped, WebhookSet
from tests.cli_support import Command, agentflow
from tests.core_support import rows, value
from tests.one_database import database_url, original
from tests.processes import BIN, eventually, started
from tests.telegram_jobs import picture
from tests.telegram_server import BotApi
from tests.telegram_support import ANN, Talk, bot, emptied, quick, talk
from tests.telegram_updates import User

__all__ = ["agentflow", "bot", "database_url", "emptied", "original", "quick", "talk"]

RED = picture(0xFF0000, "JPEG")


def polls(talk: Talk, stopped: threading.Event | None = None) -> Polling:
    return Polling(talk.system, talk.door, stopped or threading.Event())


def test_an_update_is_stored_before_it_is_confirmed_and_is_once_however_often_it_comes(talk: Talk) -> None:
    talk.ann.photo(RED, caption="make it snow")
    killed = polls(talk)
    assert killed.step(0) == 1
    # It dies here: nothing was confirmed, and Telegram gives the update again.
    again = polls(talk)
    assert again.step(0) == 1
    assert [update["update_id"] for update in talk.bot.updates.pending] == [again._next - 1]

    assert again.step(0) == 0

    assert talk.bot.updates.pending == []
    (event,) = rows(talk.conn, "select verdict, duplicates from agentflow.webhook_events")
    assert (event.verdict, event.duplicates) == ("verified", 1)
    talk.work()
    assert len(talk.results) == 1


def test_an_update_that_could_not_be_stored_is_not_confirmed(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        talk.ann.text("hello")
    mine = polls(talk)
    store, seen = mine._store, []

    def once(update: dict[str, object]) -> None:
        seen.append(update["update_id"])
        if len(seen) == 2:
            raise psycopg.OperationalError("the database is away")
        store(update)

    monkeypatch.setattr(mine, "_store", once)
    with pytest.raises(psycopg.OperationalError):
        mine.step(0)
    mine.step(0)
    mine.step(0)

    assert seen == [seen[0], seen[1], seen[1]]
    assert value(talk.conn, "select count(*) from agentflow.webhook_events") == 2


def test_a_webhook_is_named_where_one_is_set(talk: Talk) -> None:
    talk.bot.updates.set_webhook({"url": "http://127.0.0.1:9/webhooks/telegram/x"})

    with pytest.raises(WebhookSet, match="webhook is active"):
        polls(talk).step(0)


def test_a_long_poll_ends_when_it_is_told_to(talk: Talk) -> None:
    stopped = threading.Event()
    stopped.set()

    with pytest.raises(Stopped):
        polls(talk, stopped).step(25)


# ---- the commands ----


def test_set_webhook_makes_the_endpoint_and_tells_telegram_and_prints_nothing_that_opens_it(
    bot: BotApi, emptied: None, agentflow: Command, conn: psycopg.Connection
) -> None:
    addresses = []
    for _ in range(2):
        said = agentflow("telegram", "set-webhook", "http://agent.test/")
        assert (said.status, said.err) == (0, "")
        assert "@test_bot sends its updates to http://agent.test/webhooks/telegram/…" in said.out
        asked = bot.called("setWebhook")[-1].parameters
        addresses.append(asked["url"])
        for secret in (bot.token, asked["secret_token"], asked["url"].rpartition("/")[2]):
            assert secret not in said.out

    assert asked["allowed_updates"] == ["message", "callback_query"]
    assert len(set(addresses)) == 2
    assert value(conn, "select count(*) from agentflow.webhook_endpoints where source = 'telegram'") == 1
    refused = agentflow("telegram", "poll")
    assert refused.status == 1 and "a webhook is set, to agent.test" in refused.err
    assert agentflow("telegram", "delete-webhook").status == 0
    assert bot.updates.webhook_info()["url"] == ""


@pytest.mark.parametrize(
    "url", ["http://agent.test", "https://agent.test:8000", "agent.test", "https://agent.test/?a=b"]
)
def test_an_address_that_telegram_would_not_go_to_is_refused(bot: BotApi, agentflow: Command, url: str) -> None:
    said = agentflow("telegram", "set-webhook", url, TELEGRAM_API_URL="")

    assert said.status == 2 and said.err.count("\n") == 1


def test_a_wrong_token_is_one_line_without_it(bot: BotApi, agentflow: Command) -> None:
    said = agentflow("telegram", "poll", TELEGRAM_BOT_TOKEN="123456789:" + "B" * 35)

    assert (said.status, said.err) == (1, "agentflow: getMe: Telegram does not know TELEGRAM_BOT_TOKEN\n")


def test_doctor_says_how_updates_come(bot: BotApi, agentflow: Command) -> None:
    assert "@test_bot; no webhook is set" in agentflow("doctor").out

    bot.updates.set_webhook({"url": "http://127.0.0.1:9/webhooks/telegram/x"})
    assert "@test_bot sends its updates to 127.0.0.1:9" in agentflow("doctor").out
    User(bot, ANN, {}).text("hello")
    eventually(lambda: "last_error_message" in bot.updates.webhook_info())
    said = agentflow("doctor")
    assert said.status == 1 and "the last try failed: Wrong response from the webhook" in said.out


def test_a_bot_is_one_organizations(talk: Talk, agentflow: Command) -> None:
    agentflow("orgs", "create", "acme")

    said = agentflow("telegram", "poll", "--org", "acme")

    assert (said.status, said.err) == (2, "agentflow: @test_bot is the bot of another organization\n")


def test_the_poller_is_killed_and_goes_on_where_it_was(talk: Talk, environment: dict[str, str], tmp_path: Path) -> None:
    arguments = [str(BIN / "agentflow"), "telegram", "poll"]

    def stored() -> int:
        return int(value(talk.conn, "select count(*) from agentflow.webhook_events"))

    for n in (1, 2):
        talk.ann.text(f"hello {n}")
        with started(arguments, environment, tmp_path / f"poll{n}.log") as process:
            eventually(lambda n=n: stored() == n)
            if n == 1:
                process.kill()
            else:
                assert process.terminate() == 0
        assert talk.bot.token not in process.text()

    bodies = [
        json.loads(bytes(row.body)) for row in rows(talk.conn, "select body from agentflow.webhook_events order by id")
    ]
    assert [body["message"]["text"] for body in bodies] == ["hello 1", "hello 2"]
    assert value(talk.conn, "select count(*) from agentflow.webhook_events where verdict = 'verified'") == 2
