"""The whole conversation: Telegram, gunicorn, workers; every update delivered twice, and workers killed where it hurts most."""

from __future__ import annotations

import itertools
from pathlib import Path

import psycopg

from agentflow.telegram.shown import EVERY_S
from tests.comfyui_server import comfyui
from tests.core_support import rows, value
from tests.processes import BIN, Process, eventually, worker
from tests.telegram_jobs import picture
from tests.telegram_server import BotApi, Message
from tests.telegram_support import ANN, bot
from tests.telegram_updates import User
from tests.web_support import gunicorn

__all__ = ["bot"]

TYPES = "tests.telegram_worker"


def photos(bot: BotApi) -> list[Message]:
    return [message for message in bot.chat(ANN) if message.kind == "photo"]


def killed_at(process: Process, bot: BotApi, method: str) -> None:
    """When Telegram has done what was asked for, and before its answer is heard."""
    eventually(lambda: bot.called(method))
    process.kill()


def set_webhook(url: str, environment: dict[str, str], folder: Path) -> None:
    process = Process([str(BIN / "agentflow"), "telegram", "set-webhook", url], environment, folder / "webhook.log")
    assert process.popen.wait(60) == 0, process.text()


def test_one_result_message_whatever_is_delivered_twice_and_whoever_dies(
    bot: BotApi, environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    environment |= {"JOB_LEASE": "3", "JOB_LEASE_RENEW": "1", "WORKER_LOG_LEVEL": "DEBUG"}
    gate = tmp_path / "gate"
    ann = User(bot, ANN, {})
    bot.updates.times = 2
    logs = [tmp_path / f"worker{n}.log" for n in range(4)]
    with gunicorn(environment, tmp_path) as web:
        set_webhook(web.url, environment, tmp_path)
        ann.photo(picture(0xFF0000, "JPEG"), caption=f"half way until {gate}")

        with worker(environment, logs[0], types=TYPES) as first:
            bot.fault("stall", path="sendMessage", seconds=90.0, times=1)
            killed_at(first, bot, "sendMessage")
        assert not photos(bot)

        with worker(environment, logs[1], types=TYPES) as second:
            eventually(lambda: any("50 %" in message.text for message in bot.chat(ANN)), within_s=90)
            bot.fault("stall", path="editMessageMedia", seconds=90.0, times=1)
            gate.touch()
            killed_at(second, bot, "editMessageMedia")
        (render,) = rows(conn, "select state, result from agentflow.jobs where type = 'comfy_render'")
        assert render.state == "succeeded"

        with worker(environment, logs[2], types=TYPES) as third:
            eventually(lambda: value(conn, "select state from agentflow.telegram_requests") == "delivered", within_s=90)
            (result,) = photos(bot)
            ann.press(result.id, result.buttons[0])
            eventually(lambda: len(photos(bot)) == 2, within_s=60)
            assert not bot.updates.pending
            assert third.terminate() == 0

    # The one that nobody heard the number of stands there too: a word of progress, and no result.
    texts = [message for message in bot.chat(ANN) if message.kind == "text"]
    assert len(texts) == 1 and not texts[0].before
    assert value(conn, "select count(*) from agentflow.jobs where type = 'comfy_render'") == 2
    for result in photos(bot):
        states = [*result.before[1:], result.now]
        of_progress = [at for at, state in zip(result.edited_at, states, strict=True) if "text" in state]
        assert all(later - earlier >= EVERY_S - 0.1 for earlier, later in itertools.pairwise(of_progress))
    assert value(conn, "select sum(duplicates) from agentflow.webhook_events") == len(bot.updates.delivered) / 2
    everything = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    for table in ("jobs", "job_attempts", "webhook_events", "webhook_endpoints", "telegram_requests"):
        everything += str(rows(conn, f"select to_jsonb(t) from agentflow.{table} t"))  # noqa: S608
    assert "Worker process is ready" in everything and bot.token.partition(":")[2] not in everything


def test_the_products_own_render_comes_once_though_its_worker_dies_between_render_and_message(
    bot: BotApi, environment: dict[str, str], conn: psycopg.Connection, tmp_path: Path
) -> None:
    """Nothing is stood in for but Telegram and the GPU."""
    environment |= {"JOB_LEASE": "3", "JOB_LEASE_RENEW": "1"}
    ann = User(bot, ANN, {})
    bot.updates.times = 2
    with comfyui(tmp_path / "comfyui") as comfy, gunicorn(environment, tmp_path) as web:
        environment["COMFYUI_URL"] = comfy.with_qwen().url
        set_webhook(web.url, environment, tmp_path)
        ann.photo(picture(0x00FF00, "JPEG"), caption="make it blue")

        with worker(environment, tmp_path / "first.log") as first:
            bot.fault("stall", path="editMessageMedia", seconds=90.0, times=1)
            eventually(lambda: bot.called("editMessageMedia"), within_s=90)
            first.kill()
        with worker(environment, tmp_path / "second.log"):
            eventually(lambda: value(conn, "select state from agentflow.telegram_requests") == "delivered", within_s=90)

        assert len(comfy.runs) == 1, "the same picture was rendered twice"
        (sent,) = photos(bot)
        assert (
            value(conn, "select result -> 'outputs' -> 0 ->> 'kind' from agentflow.jobs where type = 'comfy_render'")
            == "image"
        )
        assert sent.content in [file.read_bytes() for file in comfy.files.folder.rglob("*.png")]
        assert sent.buttons and not [message for message in bot.chat(ANN) if message.kind == "text"]
