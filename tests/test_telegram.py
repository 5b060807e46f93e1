"""The bot's conversation, step by step, with everything at Telegram that can go wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentflow.calls import Service
from agentflow.errors import Wait
from agentflow.limits import Bucket, Window
from agentflow.telegram import requests
from agentflow.webhooks import events, replays
from agentflow.webhooks.events import Filter
from tests.core_support import ORGANIZATION, rows, value
from tests.one_database import database_url, original
from tests.telegram_jobs import picture
from tests.telegram_support import ANN, Talk, bot, emptied, quick, talk
from tests.telegram_updates import User

__all__ = ["bot", "database_url", "emptied", "original", "quick", "talk"]

RED = picture(0xFF0000, "JPEG")


# ---- from the picture to the result ----


def test_a_picture_becomes_its_render_in_the_message_that_said_how_far_it_was(talk: Talk, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    update = talk.ann.photo(RED, caption=f"/edit away until {gate}")
    talk.says(update, update)
    assert talk.texts == ["The renderer is away. Your picture is kept: it will be rendered as soon as it is back."]

    gate.touch()
    talk.says(update)

    (message,) = talk.bot.chat(ANN)
    (render,) = talk.jobs("comfy_render")
    assert (message.kind, message.text, message.content) == ("photo", "Ready.", talk.stored(render))
    assert [data.partition(":")[0] for data in message.buttons] == ["again", "file"]
    assert render.payload["workflow"] == "qwen-image-edit"
    assert render.payload["parameters"] == {"prompt": f"away until {gate}"}
    key = render.payload["images"]["image"]["artefact"]
    assert key.startswith("o/1/telegram/") and b"".join(talk.system.storage.read(key)) == RED
    assert talk.states() == ["delivered"]
    assert len(talk.bot.called("sendMessage")) == 1


def test_what_stands_there_already_is_not_sent_again(talk: Talk, tmp_path: Path) -> None:
    talk.says(talk.ann.photo(RED, caption=f"away until {tmp_path / 'gate'}"))
    before = len(talk.bot.calls)

    assert "telegram_follow" in talk.work(but=("comfy_render",))
    assert len(talk.bot.calls) == before

    (follow,) = talk.jobs("telegram_follow")
    assert (follow.state, follow.attempt) == ("queued", 0)


def test_the_place_in_the_queue_is_said(talk: Talk) -> None:
    for n in range(2):
        talk.says(talk.ann.photo(RED, caption=f"number {n}"), then=False)
    # Nobody serves the queue here; what is said then is another test's.
    talk.conn.execute(
        "insert into agentflow.workers (id, kind, host, pid, version, queues, threads, seen_at, well_since)"
        " values (gen_random_uuid(), 'worker', 'h', 1, '0', '{gpu}', 1, clock_timestamp(), '-infinity')"
    )

    talk.work(but=("comfy_render",))

    assert sorted(talk.texts) == ["In the queue, place 1.", "In the queue, place 2."]


@pytest.mark.parametrize("backwards", [False, True])
def test_an_album_is_one_render_whatever_order_its_parts_come_in(talk: Talk, backwards: bool) -> None:
    contents = [picture(colour, "JPEG") for colour in (0xFF0000, 0x00FF00, 0x0000FF)]
    updates = talk.ann.album(contents, caption="put them together")
    talk.says(*(reversed(updates) if backwards else updates), *updates)

    (render,) = talk.jobs("comfy_render")
    keys = [render.payload["images"][name]["artefact"] for name in ("image", "image2", "image3")]
    assert [b"".join(talk.system.storage.read(key)) for key in keys] == contents
    assert talk.results == [talk.stored(render)]


def test_of_an_album_as_many_are_taken_as_the_workflow_has_places(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    of_one = talk.system.settings.model_copy(update={"telegram_workflow": "smoke"})
    monkeypatch.setattr(talk.system, "settings", of_one)
    talk.says(*talk.ann.album([RED, RED], caption="both"))

    assert [list(job.payload["images"]) for job in talk.jobs("comfy_render")] == [["image"]]
    assert "Of an album I take the first pictures, no more than 1." in talk.texts


def test_an_album_waits_for_a_moment_of_quiet(talk: Talk) -> None:
    first, second = talk.ann.album([RED, RED], caption="both")
    talk.says(first, then=False)
    while (job_id := talk._next(())) is not None:
        assert talk.run(job_id) == "handle_webhook"
    (begin,) = rows(
        talk.conn, "select run_at > clock_timestamp() as later from agentflow.jobs where type = 'telegram_begin'"
    )
    assert begin.later

    talk.says(second)

    assert [len(job.payload["images"]) for job in talk.jobs("comfy_render")] == [2]


def test_a_picture_without_words_is_asked_about_and_the_next_text_is_the_answer(talk: Talk) -> None:
    talk.says(talk.ann.document(picture(0x00FF00)))
    assert talk.texts == ["What shall I do with it? Write it to me, please."]

    talk.says(talk.ann.text("make it blue"))
    assert [job.payload["parameters"] for job in talk.jobs("comfy_render")] == [{"prompt": "make it blue"}]
    assert len(talk.results) == 1

    talk.says(talk.ann.text("and again"))
    assert talk.texts[-1].startswith("Send me a picture")
    assert len(talk.jobs("comfy_render")) == 1


def test_a_newer_picture_takes_the_place_of_one_that_was_asked_about(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED))
    talk.says(talk.ann.photo(picture(0x00FF00, "JPEG")))
    for text in ("make it blue", "and this one"):
        talk.says(talk.ann.text(text))

    assert [job.payload["parameters"]["prompt"] for job in talk.jobs("comfy_render")] == ["make it blue"]
    assert talk.states() == ["dropped", "delivered"]


def test_an_update_that_is_handled_once_more_makes_nothing_new(talk: Talk) -> None:
    talk.says(*talk.ann.album([RED, RED], caption="both"))
    before = (talk.texts, len(talk.jobs("comfy_render")))

    with talk.system.transaction() as transaction:
        for event in events.search(transaction.conn, ORGANIZATION, Filter(), limit=10):
            replays.one(transaction, event)
    talk.work()

    assert (talk.texts, len(talk.jobs("comfy_render"))) == before
    assert value(talk.conn, "select count(*) from agentflow.telegram_pictures") == 2


def test_an_album_without_words_is_asked_about_once(talk: Talk) -> None:
    talk.says(*talk.ann.album([RED, RED]))
    assert talk.texts == ["What shall I do with it? Write it to me, please."]

    talk.says(talk.ann.text("mix"))

    assert [len(job.payload["images"]) for job in talk.jobs("comfy_render")] == [2]


def test_a_question_can_be_cancelled(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED))
    talk.says(talk.ann.text("/cancel"))
    talk.says(talk.ann.text("make it blue"))

    assert talk.texts[1].startswith("Forgotten") and talk.texts[2].startswith("Send me a picture")
    assert talk.states() == ["dropped"] and not talk.jobs("comfy_render")


def test_who_has_telegram_in_russian_is_answered_in_russian(talk: Talk) -> None:
    talk.bot.user(222)
    ivan = User(talk.bot, 222, {"language_code": "ru-RU"})

    talk.says(ivan.text("/start"))
    talk.says(ivan.photo(RED, caption="пусть пойдёт снег"))

    texts = [message.text for message in talk.bot.chat(222)]
    assert texts[0].startswith("Пришлите картинку") and texts[1] == "Готово."


# ---- buttons ----


def test_again_renders_the_same_pictures_once_more_however_often_the_press_comes(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED, caption="make it snow"))
    (message,) = talk.bot.chat(ANN)

    press = talk.ann.press(message.id, message.buttons[0])
    talk.says(press, press)

    first, second = talk.jobs("comfy_render")
    assert first.payload == second.payload
    assert talk.results == [talk.stored(first), talk.stored(second)]
    assert [each["text"] for each in talk.bot.answered] == ["Once more, with another seed."]
    assert len(talk.bot.called("getFile")) == 1


def test_a_render_is_cancelled_by_its_button_and_can_be_had_again(talk: Talk, tmp_path: Path) -> None:
    talk.says(talk.ann.photo(RED, caption=f"away until {tmp_path / 'gate'}"))
    (message,) = talk.bot.chat(ANN)

    talk.says(talk.ann.press(message.id, message.buttons[0]))

    assert talk.texts == ["Cancelled."] and talk.states() == ["cancelled"]
    assert [job.state for job in talk.jobs("comfy_render")] == ["cancelled"]
    (message,) = talk.bot.chat(ANN)
    assert [data.partition(":")[0] for data in message.buttons] == ["again"]


def test_the_result_comes_as_a_file_when_it_is_asked_for(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED, caption="make it snow"))
    (message,) = talk.bot.chat(ANN)

    press = talk.ann.press(message.id, message.buttons[1])
    talk.says(press, press)

    (render,) = talk.jobs("comfy_render")
    documents = [each.content for each in talk.bot.chat(ANN) if each.kind == "document"]
    assert documents == [talk.stored(render)]
    assert len(talk.results) == 1


def test_nobody_presses_anothers_buttons(talk: Talk, tmp_path: Path) -> None:
    talk.says(talk.ann.photo(RED, caption=f"away until {tmp_path / 'gate'}"))
    (message,) = talk.bot.chat(ANN)
    press = talk.ann.press(message.id, message.buttons[0])
    press["callback_query"]["from"]["id"] = 222

    talk.says(press)

    assert [each["text"] for each in talk.bot.answered] == ["This is somebody else's picture."]
    assert [job.state for job in talk.jobs("comfy_render")] == ["queued"]


def test_a_press_that_is_too_old_to_be_answered_does_what_it_says(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED, caption="make it snow"))
    (message,) = talk.bot.chat(ANN)
    press = talk.ann.press(message.id, message.buttons[0])
    talk.bot.expire_queries()

    talk.says(press)

    assert len(talk.results) == 2 and [job.state for job in talk.jobs("telegram_press")] == ["succeeded"]


# ---- what is not taken, and what goes wrong ----


def test_nobody_has_more_pictures_in_work_than_allowed(talk: Talk, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    for _ in range(3):
        talk.says(talk.ann.photo(RED, caption=f"away until {gate}"))
    talk.says(*talk.ann.album([RED, RED, RED], caption="one more"))

    assert talk.texts[3:] == [
        "I am working on 3 of your pictures already. Send me this one again when one of them is ready, please."
    ]
    gate.touch()
    talk.work()
    assert len(talk.results) == len(talk.jobs("comfy_render")) == 3
    talk.says(talk.ann.photo(RED, caption="make it snow"))
    assert len(talk.results) == 4


def test_a_file_that_telegram_does_not_give_to_bots_is_refused_at_once(talk: Talk) -> None:
    talk.says(talk.ann.document(RED, caption="make it snow", size=(20 << 20) + 1))

    assert talk.texts == ["This file is larger than the 20 MB that Telegram gives to bots. A smaller one, please."]
    assert not talk.bot.called("getFile")


def test_what_calls_itself_a_picture_and_is_none_is_refused(talk: Talk) -> None:
    talk.says(talk.ann.document(b"%PDF-1.7 and what follows", name="x.png", caption="make it snow"))

    assert talk.texts == ["This is no picture that I can read. I take JPEG, PNG and WebP."]
    assert talk.states() == ["failed"] and not list(talk.system.storage.list())


def test_a_render_that_fails_says_what_can_be_done_about_it(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED, caption="fail render_out_of_memory"))

    (message,) = talk.bot.chat(ANN)
    assert message.text == "The renderer had too little memory for this. A smaller picture may work."
    assert [data.partition(":")[0] for data in message.buttons] == ["again"]
    assert talk.states() == ["failed"]


def test_after_429_nobody_calls_until_telegram_allows_it(talk: Talk) -> None:
    talk.bot.fault("too_many", path="sendMessage", seconds=60, times=1)
    talk.says(talk.ann.text("hello"), then=False)

    talk.work()
    assert [job.state for job in talk.jobs("telegram_say")] == ["queued"]
    row = rows(talk.conn, "select wait_reason, attempt from agentflow.jobs where type = 'telegram_say'")[0]
    assert (row.wait_reason, row.attempt) == ("limit", 0)
    talk.says(talk.ann.photo(RED, caption="make it snow"))

    assert not talk.bot.calls  # the refused one was not done, and no other was sent


def test_who_waits_for_one_chat_holds_up_no_other(talk: Talk) -> None:
    service = Service("telegram", "test", (Window(30, 1.0),))
    one, another = (Bucket(name, (Window(1, 60.0),)) for name in ("one", "another"))
    calls = talk.system.calls
    calls.permit(service, ORGANIZATION, "a", [one])
    for holder in ("b", "c"):
        with pytest.raises(Wait):
            calls.permit(service, ORGANIZATION, holder, [one])

    calls.permit(service, ORGANIZATION, "d", [another])


def test_who_has_blocked_the_bot_gets_no_render(talk: Talk, tmp_path: Path) -> None:
    talk.says(talk.ann.photo(RED, caption=f"away until {tmp_path / 'gate'}"))
    talk.bot.blocked.add(ANN)
    talk.system.telegram.shown.remember(
        value(talk.conn, "select id from agentflow.telegram_requests"), "something else"
    )

    talk.work()

    assert [job.state for job in talk.jobs("comfy_render")] == ["cancelled"]
    assert talk.states() == ["unreachable"]
    assert [job.state for job in talk.jobs("telegram_follow")] == ["succeeded"]


def test_a_result_for_who_has_blocked_the_bot_is_tried_once(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED, caption="make it snow"), then=False)
    talk.work(but=("telegram_deliver",))
    talk.bot.blocked.add(ANN)
    before = len(talk.bot.calls)

    talk.work()

    assert len(talk.bot.calls) == before + 1
    assert [job.state for job in talk.jobs("telegram_deliver")] == ["succeeded"]


@pytest.mark.parametrize("fault", ["lose_answer", "answer_500"])
def test_a_lost_answer_leaves_one_stray_at_the_most_and_one_result(talk: Talk, fault: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    talk.bot.fault(fault, path="sendMessage", times=1)
    talk.bot.fault(fault, path="editMessageMedia", times=2)
    talk.says(talk.ann.photo(RED, caption=f"away until {gate}"))
    talk.work()
    assert len(talk.texts) == 2 and len(set(talk.texts)) == 1

    gate.touch()
    talk.work()

    (render,) = talk.jobs("comfy_render")
    assert talk.results == [talk.stored(render)]
    assert len(talk.bot.chat(ANN)) == 2


def test_progress_is_not_sent_a_third_time_and_the_result_is_there_all_the_same(talk: Talk, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    talk.bot.fault("lose_answer", path="sendMessage", times=2)
    talk.says(talk.ann.photo(RED, caption=f"away until {gate}"))
    for _ in range(3):
        talk.work()
    assert len(talk.bot.called("sendMessage")) == 2

    gate.touch()
    talk.work()

    assert len(talk.results) == 1 and talk.states() == ["delivered"]


def test_a_failure_is_said_where_progress_was_lost(talk: Talk) -> None:
    talk.bot.fault("lose_answer", path="sendMessage", times=2)
    talk.says(talk.ann.photo(RED, caption="fail render_timeout"))
    talk.work()

    last = talk.bot.chat(ANN)[-1]
    assert last.text == "This took too long, and was stopped."
    assert [data.partition(":")[0] for data in last.buttons] == ["again"]
    assert talk.states() == ["failed"]


def test_a_message_that_was_not_sent_is_no_stray(talk: Talk) -> None:
    talk.bot.fault("lose_request", path="sendMessage", times=1)
    talk.bot.fault("fail_request", path="editMessageMedia", times=1)
    talk.says(talk.ann.photo(RED, caption="make it snow"))
    talk.work()

    assert len(talk.bot.chat(ANN)) == len(talk.results) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_message_that_somebody_deleted_is_sent_anew_once(talk: Talk, times: int, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    talk.says(talk.ann.photo(RED, caption=f"away until {gate}"))
    gate.touch()
    talk.work(but=("telegram_deliver", "telegram_follow"))
    for message in talk.bot.chat(ANN):
        message.deleted = True
    if times == 2:
        talk.conn.execute("update agentflow.telegram_requests set answers_lost = 1")

    talk.work()

    assert len(talk.results) == (1 if times == 1 else 0)
    assert talk.states() == ["delivered" if times == 1 else "unreachable"]


def test_a_repeated_delivery_is_the_same_message(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED, caption="make it snow"))
    talk.conn.execute("update agentflow.telegram_requests set state = 'rendering', ended_at = null")
    talk.conn.execute(
        "update agentflow.jobs set state = 'queued', finished_at = null, finished_by = null, result = null,"
        " wake_at = now() where type = 'telegram_deliver'"
    )

    assert "telegram_deliver" in talk.work()

    assert len(talk.bot.chat(ANN)) == len(talk.results) == 1


def test_a_photo_that_telegram_does_not_take_as_one_goes_as_a_file(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED, caption="make it snow"), then=False)
    talk.work(but=("telegram_deliver",))
    talk.conn.execute(
        "update agentflow.jobs set result = jsonb_set(result, '{outputs,0,width}', '9999') where type = 'comfy_render'"
    )

    talk.work()

    (message,) = talk.bot.chat(ANN)
    assert message.kind == "document" and message.text == "Ready."


def test_what_the_bot_kept_goes_with_its_request_but_not_what_a_newer_one_repeats(talk: Talk) -> None:
    talk.says(talk.ann.photo(RED, caption="make it snow"))
    (message,) = talk.bot.chat(ANN)
    talk.says(talk.ann.press(message.id, message.buttons[0]))
    day = "update agentflow.telegram_requests set created_at = created_at - interval '2 d'"
    talk.conn.execute(f"{day} where origin like 'message:%'")

    with talk.system.database.connection() as conn:
        assert requests.delete_old(conn, days=1) == 1
    assert not rows(talk.conn, "select key from agentflow.doomed_files")

    talk.conn.execute(day)
    with talk.system.database.connection() as conn:
        assert requests.delete_old(conn, days=1) == 1
    (doomed,) = rows(talk.conn, "select key from agentflow.doomed_files")
    assert doomed.key == talk.jobs("comfy_render")[0].payload["images"]["image"]["artefact"]


def test_another_bots_token_hears_nobody(talk: Talk) -> None:
    talk.conn.execute("update agentflow.telegram_bots set bot_id = 1")
    talk.says(talk.ann.text("/start"))

    (event,) = rows(talk.conn, "select outcome, detail from agentflow.webhook_events")
    assert (event.outcome, event.detail) == ("failed", "TELEGRAM_BOT_TOKEN is another bot's")
    assert not talk.bot.calls
