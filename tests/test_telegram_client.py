"""What Telegram's answers mean, and that nothing which is said of them holds the token."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from agentflow import settings
from agentflow.connections import NoAnswer
from agentflow.errors import JobError, Transient, Wait
from agentflow.prove.ports import free_port
from agentflow.settings import SettingsError
from agentflow.telegram.client import Refused, Telegram
from tests.http_server import Reply, Server, serve

TOKEN = "123456789:AAF0123456789abcdef0123456789abcdef"


def client(url: str) -> Telegram:
    system: Any = SimpleNamespace(settings=settings.load({"TELEGRAM_BOT_TOKEN": TOKEN, "TELEGRAM_API_URL": url}))
    return Telegram(system)


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


def refusal(code: int, description: str, **parameters: Any) -> Reply:
    document = {"ok": False, "error_code": code, "description": description, "parameters": parameters}
    return Reply(code, json.dumps(document).encode())


@pytest.mark.parametrize(
    ("code", "description", "kind"),
    [
        (400, "Bad Request: message is not modified: specified new message content …", "not_modified"),
        (400, "Bad Request: message to edit not found", "gone"),
        (400, "Bad Request: message can't be edited", "gone"),
        (400, "Bad Request: MESSAGE_ID_INVALID", "gone"),
        (400, "Bad Request: there is no text in the message to edit", "no_text"),
        (400, "Bad Request: file is too big", "too_large"),
        (413, "Request Entity Too Large", "too_large"),
        (400, "Bad Request: query is too old and response timeout expired or query ID is invalid", "expired"),
        (400, "Bad Request: PHOTO_INVALID_DIMENSIONS", "picture"),
        (400, "Bad Request: IMAGE_PROCESS_FAILED", "picture"),
        (400, "Bad Request: chat not found", "blocked"),
        (403, "Forbidden: bot was blocked by the user", "blocked"),
        (403, "Forbidden: user is deactivated", "blocked"),
        (409, "Conflict: can't use getUpdates method while webhook is active", "conflict"),
        (400, "Bad Request: message text is empty", "other"),
    ],
)
def test_a_refusal_is_told_by_what_its_description_says(server: Server, code: int, description: str, kind: str) -> None:
    server.on("/", refusal(code, description))

    with pytest.raises(Refused) as refused:
        client(server.url("")).ask("sendMessage", {"chat_id": 1, "text": "hello"})

    assert refused.value.kind == kind


def test_a_group_that_became_another_one_says_its_new_number(server: Server) -> None:
    server.on("/", refusal(400, "Bad Request: group chat was upgraded", migrate_to_chat_id=-1001234567890))

    with pytest.raises(Refused) as refused:
        client(server.url("")).ask("sendMessage", {})

    assert (refused.value.kind, refused.value.moved_to) == ("moved", -1001234567890)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (refusal(500, "Internal Server Error"), "telegram_busy"),
        (Reply(502, b"<html>Bad Gateway</html>"), "telegram_busy"),
        (Reply(200, b"[]"), "telegram_busy"),
        (refusal(401, "Unauthorized"), "telegram_unauthorized"),
        (refusal(404, "Not Found"), "telegram_unauthorized"),
    ],
)
def test_what_may_pass_is_tried_again(server: Server, reply: Reply, code: str) -> None:
    server.on("/", reply)

    with pytest.raises(Transient) as error:
        client(server.url("")).ask("getMe", {})

    assert error.value.code == code


def test_the_wait_is_the_one_that_telegram_names(server: Server) -> None:
    server.on("/", refusal(429, "Too Many Requests: retry after 7", retry_after=7))

    with pytest.raises(Wait) as wait:
        client(server.url("")).ask("getMe", {})

    assert wait.value.seconds == 7


def test_no_error_and_no_traceback_holds_the_token(server: Server) -> None:
    errors: list[JobError] = []
    for url, reply in (
        (f"http://127.0.0.1:{free_port()}", None),
        (server.url(""), Reply(raw=[])),
        (server.url(""), Reply(raw=[b"nonsense\r\n\r\n"])),
        (server.url(""), Reply(302, headers={"Location": "http://elsewhere.test/"})),
        (server.url(""), refusal(400, "Bad Request: something")),
    ):
        if reply is not None:
            server.on("/", reply)
        with pytest.raises(JobError) as error:
            client(url).ask("getMe", {})
        errors.append(error.value)

    assert [each.sent for each in errors if isinstance(each, NoAnswer)] == [False, True, True]
    said = "".join("".join(traceback.format_exception(each)) for each in errors)
    assert TOKEN.partition(":")[2] not in said


@pytest.mark.parametrize("path", ["/var/lib/bot/file.jpg", "photos/../../x", "http://elsewhere.test/x", "", None])
def test_a_file_is_fetched_from_telegrams_own_place_alone(server: Server, path: str | None) -> None:
    server.on("/", Reply(200, json.dumps({"ok": True, "result": {"file_path": path}}).encode()))
    context: Any = SimpleNamespace(permit=lambda *_: None, check=lambda: None)

    with pytest.raises(Transient), client(server.url("")).file(context, "AgAC"):
        raise AssertionError("it was fetched")

    assert [request.path for request in server.requests] == [f"/bot{TOKEN}/getFile"]


def test_a_file_that_is_larger_than_telegram_says_ends_at_the_limit(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentflow.telegram.client.MAX_FILE_BYTES", 1000)
    server.on(f"/bot{TOKEN}/getFile", Reply(200, json.dumps({"ok": True, "result": {"file_path": "a/b.jpg"}}).encode()))
    server.on(f"/file/bot{TOKEN}/a/b.jpg", Reply(200, b"x" * 1001))
    context: Any = SimpleNamespace(permit=lambda *_: None, check=lambda: None)

    with pytest.raises(Refused) as refused, client(server.url("")).file(context, "AgAC") as pieces:
        list(pieces)

    assert refused.value.kind == "too_large"


@pytest.mark.parametrize("token", ["AAF0123456789", "12:AA/BB0123456789", "12:AA BB0123456789", "x12:AAF0123456789"])
def test_what_would_not_be_a_part_of_an_address_is_no_token(token: str) -> None:
    with pytest.raises(SettingsError) as error:
        settings.load({"TELEGRAM_BOT_TOKEN": token})

    assert error.value.variable == "TELEGRAM_BOT_TOKEN" and token not in str(error.value)
