"""The tests' Bot API answers as Telegram documents it, and keeps what a chat would show."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.http_server import Reply, serve
from tests.processes import eventually
from tests.telegram_server import TOKEN, BotApi, telegram

ANN = 111


@pytest.fixture
def bot() -> Iterator[BotApi]:
    with telegram() as bot:
        bot.user(ANN)
        yield bot


def call(bot: BotApi, method: str, files: dict[str, Any] | None = None, **asked: Any) -> Any:
    """The result, or (code, description)."""
    url = f"{bot.url}/bot{TOKEN}/{method}"
    if files:
        flat = {name: value if isinstance(value, str) else json.dumps(value) for name, value in asked.items()}
        answer = httpx2.post(url, data=flat, files=files).json()
    else:
        answer = httpx2.post(url, json=asked, timeout=60).json()
    return answer["result"] if answer["ok"] else (answer["error_code"], answer["description"])


def picture(width: int = 8, height: int = 8, color: str = "red") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), color).save(content, "PNG")
    return content.getvalue()


def keyboard(data: str) -> dict[str, Any]:
    return {"inline_keyboard": [[{"text": "Again", "callback_data": data}]]}


def test_a_message_becomes_a_picture_and_keeps_its_history(bot: BotApi) -> None:
    sent = call(bot, "sendMessage", chat_id=ANN, text="<b>queued</b> &lt;1&gt;", parse_mode="HTML", reply_markup=keyboard("c"))
    where = {"chat_id": ANN, "message_id": sent["message_id"]}
    call(bot, "editMessageText", **where, text="50 %", reply_markup=keyboard("c"))
    media = {"type": "photo", "media": "attach://out", "caption": "done"}
    call(bot, "editMessageMedia", {"out": ("o.png", picture())}, **{**where, "chat_id": str(ANN)}, media=media)

    [message] = bot.chat(ANN)
    assert [state["text"] for state in message.before] == ["queued <1>", "50 %"]
    assert (message.kind, message.text, message.buttons, message.content) == ("photo", "done", [], picture())
    file_id = message.now["photo"][-1]["file_id"]
    again = {"type": "photo", "media": file_id, "caption": "done"}
    assert call(bot, "editMessageMedia", **where, media=again)[1].startswith("Bad Request: message is not modified")
    assert call(bot, "editMessageText", **where, text="x")[1] == "Bad Request: there is no text in the message to edit"
    assert call(bot, "sendDocument", {"document": ("o.png", picture())}, chat_id=str(ANN))["document"]["file_size"] > 0
    assert call(bot, "deleteMessage", **where) is True
    assert call(bot, "editMessageReplyMarkup", **where) == (400, "Bad Request: message to edit not found")


@pytest.mark.parametrize(
    ("method", "asked", "answer"),
    [
        ("sendMessage", {"chat_id": 5, "text": "x"}, (400, "Bad Request: chat not found")),
        ("sendMessage", {"chat_id": 222, "text": "x"}, (403, "Forbidden: bot was blocked by the user")),
        ("sendMessage", {"chat_id": ANN, "text": " "}, (400, "Bad Request: message text is empty")),
        ("sendMessage", {"chat_id": ANN, "text": "x" * 4097}, (400, "Bad Request: message is too long")),
        ("sendMessage", {"chat_id": ANN, "text": "x", "reply_markup": keyboard("x" * 65)}, (400, "Bad Request: BUTTON_DATA_INVALID")),
        ("sendPhoto", {"chat_id": ANN, "photo": "AgACno"}, (400, "Bad Request: wrong file identifier/HTTP URL specified")),
        ("getFile", {"file_id": "no"}, (400, "Bad Request: wrong file_id or the file is temporarily unavailable")),
        ("noSuchMethod", {}, (404, "Not Found")),
    ],
)  # fmt: skip
def test_refusals(bot: BotApi, method: str, asked: dict[str, Any], answer: tuple[int, str]) -> None:
    bot.user(222)
    bot.blocked.add(222)

    assert call(bot, method, **asked) == answer


def test_bad_entities_pictures_and_tokens_are_refused(bot: BotApi) -> None:
    for text in ("<b>open", "a < b", "</i>"):
        assert "can't parse entities" in call(bot, "sendMessage", chat_id=ANN, text=text, parse_mode="HTML")[1]
    for content, told in (
        (picture(9000, 1001), "PHOTO_INVALID_DIMENSIONS"),
        (b"no picture", "IMAGE_PROCESS_FAILED"),
        (b"x" * ((10 << 20) + 1), "Request Entity Too Large"),
    ):
        assert told in call(bot, "sendPhoto", {"photo": ("o.png", content)}, chat_id=str(ANN))[1]
    assert httpx2.get(f"{bot.url}/bot{TOKEN}x/getMe").status_code == 401


def test_files_of_users_are_fetched_and_too_large_ones_are_not(bot: BotApi) -> None:
    ann = bot.user(ANN)
    small = ann.photo(picture(), caption="snow")["message"]
    huge = ann.document(b"x", size=20_000_001 + (1 << 20))["message"]

    found = call(bot, "getFile", file_id=small["photo"][-1]["file_id"])
    assert httpx2.get(f"{bot.url}/file/bot{TOKEN}/{found['file_path']}").content == picture()
    assert call(bot, "getFile", file_id=huge["document"]["file_id"]) == (400, "Bad Request: file is too big")


def test_an_album_is_updates_of_one_group_and_one_caption(bot: BotApi) -> None:
    bot.user(ANN).album([picture(), picture(), picture()], caption="snow")

    updates = call(bot, "getUpdates")
    assert len({update["message"]["media_group_id"] for update in updates}) == 1
    assert [update["message"].get("caption") for update in updates] == ["snow", None, None]


def test_a_long_poll_waits_confirms_by_offset_and_stands_alone(bot: BotApi) -> None:
    ann = bot.user(ANN)
    results: list[Any] = []
    poller = threading.Thread(target=lambda: results.append(call(bot, "getUpdates", timeout=50)))
    poller.start()
    eventually(lambda: bot.called("getUpdates"))
    first = ann.text("/start")
    poller.join(30)
    ann.text("two")

    assert results == [[first]]
    assert [update["message"]["text"] for update in call(bot, "getUpdates", offset=first["update_id"] + 1)] == ["two"]
    call(bot, "getUpdates", offset=-1)
    call(bot, "getUpdates", offset=first["update_id"] + 2)
    older = threading.Thread(target=lambda: results.append(call(bot, "getUpdates", timeout=50)))
    older.start()
    eventually(lambda: len(bot.called("getUpdates")) == 5)
    call(bot, "getUpdates")
    older.join(30)
    assert results[1][0] == 409
    call(bot, "setWebhook", url="https://example.com/hook")
    assert call(bot, "getUpdates")[0] == 409


def test_a_webhook_gets_the_secret_and_an_update_until_it_is_taken(bot: BotApi) -> None:
    with serve() as hook:
        hook.on("/hook", Reply(500), Reply(200))
        bot.updates.retry_s = 0.01
        call(bot, "setWebhook", url=hook.url("/hook"), secret_token="s_1", allowed_updates=["message"])
        update = bot.user(ANN).text("hello")
        eventually(lambda: call(bot, "getWebhookInfo")["pending_update_count"] == 0)

        assert [status for _, status in bot.updates.delivered] == [500, 200]
        assert bot.updates.post(update) == 200
        assert {json.loads(request.body)["update_id"] for request in hook.requests} == {update["update_id"]}
        assert hook.requests[0].headers["x-telegram-bot-api-secret-token"] == "s_1"
        assert call(bot, "setWebhook", url="ftp://x")[0] == 400
        assert call(bot, "deleteWebhook", drop_pending_updates=True) is True


def test_updates_come_twice_and_backwards_on_order(bot: BotApi) -> None:
    with serve() as hook:
        hook.on("/hook", Reply(200))
        bot.updates.times, bot.updates.backwards = 2, True
        ids = [bot.user(ANN).text(text)["update_id"] for text in ("a", "b")]
        call(bot, "setWebhook", url=hook.url("/hook"))
        eventually(lambda: len(bot.updates.delivered) == 4)

    assert [id_ for id_, _ in bot.updates.delivered] == [ids[1], ids[1], ids[0], ids[0]]


def test_a_press_can_be_answered_once_and_not_too_late(bot: BotApi) -> None:
    ann = bot.user(ANN)
    sent = call(bot, "sendMessage", chat_id=ANN, text="x", reply_markup=keyboard("job:1:again"))
    query, late = (ann.press(sent["message_id"], "job:1:again")["callback_query"]["id"] for _ in range(2))

    assert call(bot, "answerCallbackQuery", callback_query_id=query) is True
    bot.expire_queries()
    assert "query is too old" in call(bot, "answerCallbackQuery", callback_query_id=late)[1]


def test_faults_strike_before_and_after_the_effect(bot: BotApi) -> None:
    for kind in ("lose_request", "fail_request", "too_many", "lose_answer", "answer_500"):
        bot.fault(kind, path="sendMessage", times=1, seconds=7)

    seen: list[Any] = []
    for n in range(6):
        try:
            seen.append(call(bot, "sendMessage", chat_id=ANN, text=str(n)))
        except httpx2.TransportError:
            seen.append(None)

    assert [each[0] if isinstance(each, tuple) else each for each in seen[:5]] == [None, 500, 429, None, 502]
    assert [message.text for message in bot.chat(ANN)] == ["3", "4", "5"]
    assert call(bot, "sendChatAction", chat_id=ANN, action="typing") is True
    bot.fault("too_many", times=1, seconds=3)
    answer = httpx2.post(f"{bot.url}/bot{TOKEN}/getMe")
    assert (answer.json()["parameters"], answer.headers["retry-after"]) == ({"retry_after": 3}, "3")
