"""What somebody did, out of updates as Telegram writes them, and out of those that it would not."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentflow.telegram import texts, updates
from agentflow.telegram.updates import Message, Picture, Press, Sender

ANN = {"id": 111, "is_bot": False, "first_name": "Ann", "language_code": "en"}
PRIVATE = {"id": 111, "type": "private"}
SIZES = [
    {"file_id": "AgAC-x", "file_unique_id": "x", "file_size": 96000, "width": 1280, "height": 960},
    {"file_id": "AgAC-s", "file_unique_id": "s", "file_size": 1200, "width": 90, "height": 67},
]


def message(**more: Any) -> Any:
    return updates.read({"update_id": 1, "message": {"message_id": 55, "from": ANN, "chat": PRIVATE, **more}})


def test_a_photo_is_its_largest_size_with_its_caption_and_album() -> None:
    assert message(photo=SIZES, caption=" make it snow ", media_group_id="130") == Message(
        Sender(111, 111, "en"), 55, "make it snow", None, None, Picture("AgAC-x", 96000), "130"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/edit make it snow", ("edit", None, "make it snow")),
        ("/Edit@Test_Bot  make it\nsnow", ("edit", "Test_Bot", "make it\nsnow")),
        ("/start", ("start", None, "")),
        ("make it /snow", (None, None, "make it /snow")),
        ("/path/to make", (None, None, "/path/to make")),
        ("", (None, None, "")),
    ],
)
def test_a_command_stands_in_front_of_the_text(text: str, found: tuple[Any, ...]) -> None:
    said = message(text=text)

    assert (said.command, said.addressee, said.text) == found


def test_a_document_is_a_picture_where_it_calls_itself_one() -> None:
    file = {"file_id": "BQAC", "file_unique_id": "u", "mime_type": "image/png", "file_name": "a.png"}

    assert message(document=file).picture == Picture("BQAC", None)
    assert message(document={**file, "mime_type": "application/pdf"}).picture is None
    assert message(document={**file, "file_id": "../../etc"}).picture is None


def test_a_press_names_its_request_and_fits_into_what_telegram_takes() -> None:
    request_id = uuid4()
    (row,) = texts.buttons(request_id, "ru", "again", "cancel", "file")["inline_keyboard"]
    for button, action in zip(row, ("again", "cancel", "file"), strict=True):
        assert len(button["callback_data"].encode()) <= 64
        query = {
            "id": "4382",
            "from": ANN,
            "data": button["callback_data"],
            "message": {"message_id": 9, "chat": PRIVATE},
        }
        said = updates.read({"update_id": 2, "callback_query": query})
        assert said == Press(Sender(111, 111, "en"), "4382", 9, action, request_id.hex)


def test_a_group_is_no_private_chat_and_its_number_is_negative_and_long() -> None:
    group = {"id": -1001234567890, "type": "supergroup"}

    said = message(chat=group, photo=SIZES)

    assert said.sender.chat_id == -1001234567890 and not said.sender.is_private


@pytest.mark.parametrize(
    "update",
    [
        None,
        [],
        {"update_id": 1},
        {"update_id": 1, "my_chat_member": {"chat": PRIVATE, "from": ANN}},
        {"update_id": 1, "channel_post": {"message_id": 5, "chat": {"id": -100, "type": "channel"}}},
        {"update_id": 1, "message": {"message_id": 5, "chat": PRIVATE, "from": {**ANN, "is_bot": True}}},
        {"update_id": 1, "message": {"message_id": 5, "chat": {"id": 1 << 60}, "from": ANN}},
        {"update_id": 1, "message": {"message_id": True, "chat": PRIVATE, "from": ANN}},
        {"update_id": 1, "callback_query": {"id": "1", "from": ANN, "data": "again:x", "message": {"chat": PRIVATE}}},
        {"update_id": 1, "callback_query": {"id": "1", "from": ANN, "data": f"again:{'0' * 32}"}},
    ],
)
def test_everything_else_is_nothing_to_us(update: Any) -> None:
    assert updates.read(update) is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "message",
                    "callback_query",
                    "from",
                    "chat",
                    "id",
                    "message_id",
                    "photo",
                    "document",
                    "caption",
                    "text",
                    "data",
                ]
            ),
            below,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(_JSON)
def test_no_update_breaks_it(update: Any) -> None:
    said = updates.read(update)
    if isinstance(said, Message):
        assert "\x00" not in said.text and not any("\ud800" <= each <= "\udfff" for each in said.text)


def test_both_languages_say_everything_with_the_same_values() -> None:
    for name, pair in texts._SAID.items():
        said = [texts.say(name, language, n=3) for language in ("en", "ru")]  # type: ignore[arg-type]
        assert all(said) and said[0] != said[1], name
        assert ("3" in said[0]) == ("3" in said[1]) == ("{n}" in pair[0]), name
