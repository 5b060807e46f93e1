"""The client for language models against a server that answers, and fails, as OpenRouter and the local ones do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from agentflow import settings
from agentflow.errors import Permanent, Transient, Wait
from agentflow.models import Image, Message, Models, NotConfigured
from agentflow.models.structured import portable_schema
from tests import openrouter_server as faults
from tests.openrouter_server import KEY, ModelServer, model_server
from tests.processes import eventually

PROMPT = "the very secret prompt of a customer"


class Purse:
    """Somebody who asks, counts what it cost, and may be told to stop."""

    def __init__(self) -> None:
        self.measures: dict[str, float] = {}
        self.stopped = threading.Event()

    def check(self) -> None:
        if self.stopped.is_set():
            raise StopHere

    def spent(self, **measures: float) -> None:
        for name, value in measures.items():
            self.measures[name] = self.measures.get(name, 0.0) + value


class StopHere(BaseException):
    pass


class Verdict(BaseModel):
    ok: bool
    score: float = Field(ge=0, le=1)


@pytest.fixture
def vendor() -> Iterator[ModelServer]:
    with model_server() as server:
        yield server


@pytest.fixture
def local() -> Iterator[ModelServer]:
    with model_server(openrouter=False) as server:
        yield server


@pytest.fixture
def purse() -> Purse:
    return Purse()


def models(vendor: ModelServer, **environment: str) -> Models:
    if vendor.openrouter:
        named = {"OPENROUTER_API_KEY": KEY, "OPENROUTER_BASE_URL": vendor.url}
    else:
        named = {"LLM_BASE_URL": vendor.url, "LLM_MODEL": "qwen3"}
        named |= {"EMBEDDINGS_BASE_URL": vendor.url, "EMBEDDINGS_MODEL": "e5"}
    return Models(settings.load({**named, **environment}))


def ask(models: Models, purse: Purse, text: str = PROMPT, **options: Any) -> str:
    return models.chat(purse, [Message("user", text)], **options).text


# ---- answers ----


def test_a_question_with_a_picture_carries_the_picture_itself_and_its_cost_comes_back(vendor, purse):
    vendor.reply = lambda asked: "a cat"

    answer = models(vendor).chat(purse, [Message("user", "what is it?", (Image(b"\x89PNG...", "image/png"),))])

    assert answer.text == "a cat"
    assert vendor.asked[0].images == (b"\x89PNG...",)
    assert vendor.asked[0].body["model"] == "openai/gpt-4o-mini"
    assert purse.measures == {"model_calls": 1, "tokens_in": 88, "tokens_out": 2, "usd": 0.0001}


def test_openrouter_is_told_who_asks_and_others_are_not(vendor, local, purse):
    ask(models(vendor, OPENROUTER_REFERER="https://example.com", OPENROUTER_TITLE="Ours"), purse)
    ask(models(local), purse)
    ask(models(local, LLM_API_KEY="local-key"), purse)

    theirs, plain, keyed = (asked.headers for asked in (*vendor.asked, *local.asked))
    assert theirs["http-referer"] == "https://example.com"
    assert theirs["x-openrouter-title"] == "Ours"
    assert theirs["authorization"] == f"Bearer {KEY}"
    assert theirs["user-agent"].startswith("AgentFlow/")
    assert not {"http-referer", "x-openrouter-title", "authorization"} & set(plain)
    assert keyed["authorization"] == "Bearer local-key"


def test_a_local_server_never_gets_openrouters_key_nor_its_words(local, purse):
    local.reply = lambda asked: {"ok": True, "score": 1}

    models(local, OPENROUTER_API_KEY=KEY).structured(purse, [Message("user", "?")], Verdict)

    (asked,) = local.asked
    assert "authorization" not in asked.headers
    assert not {"provider", "plugins", "models"} & set(asked.body)
    assert asked.body["model"] == "qwen3"
    assert purse.measures.keys() == {"model_calls", "tokens_in", "tokens_out"}  # a cost that is unknown is not 0


def test_connections_are_used_again(vendor, purse):
    asking = models(vendor)

    for _ in range(5):
        ask(asking, purse)

    assert vendor.server.connections == 1


def test_a_stream_is_handed_over_piece_by_piece_and_counted(vendor, purse):
    vendor.reply = lambda asked: "one two three"
    pieces: list[str] = []

    answer = ask(models(vendor), purse, on_text=pieces.append)

    assert pieces == ["one ", "two ", "three"]
    assert answer == "one two three"
    assert purse.measures["tokens_out"] == 3


@pytest.mark.parametrize(
    "text",
    ['{"ok": true, "score": 0.5}', '```json\n{"ok": true, "score": 0.5}\n```', 'Sure! {"ok": true, "score": 0.5} Bye.'],
)
def test_json_of_the_right_shape_is_found(vendor, purse, text):
    vendor.reply = lambda asked: text

    assert models(vendor).structured(purse, [Message("user", "?")], Verdict) == Verdict(ok=True, score=0.5)
    assert len(vendor.asked) == 1
    assert vendor.asked[0].body["provider"] == {"require_parameters": True}


def test_json_of_a_wrong_shape_goes_back_once_with_what_is_wrong(vendor, purse):
    vendor.reply = lambda asked: {"ok": True, "score": 0.5}
    vendor.fault(faults.says('{"ok": "perhaps", "score": 7}'))

    assert models(vendor).structured(purse, [Message("user", "?")], Verdict).ok

    repair = vendor.asked[1].body["messages"]
    assert repair[1] == {"role": "assistant", "content": '{"ok": "perhaps", "score": 7}'}
    assert "ok: Input should be a valid boolean" in repair[2]["content"]
    assert "score: Input should be less than or equal to 1" in repair[2]["content"]
    assert purse.measures["model_calls"] == 2


def test_a_second_answer_of_a_wrong_shape_is_an_error_that_may_pass_and_both_are_paid(vendor, purse):
    vendor.fault(faults.broken_json(), times=2)

    with pytest.raises(Transient) as raised:
        models(vendor).structured(purse, [Message("user", "?")], Verdict)

    assert raised.value.code == "model_bad_answer"
    assert len(vendor.asked) == 2
    assert purse.measures == {"model_calls": 2, "tokens_in": 14, "tokens_out": 6, "usd": 0.0002}


def test_an_answer_cut_at_its_length_is_asked_for_shorter(vendor, purse):
    vendor.reply = lambda asked: {"ok": True, "score": 0.5}
    vendor.fault(faults.says('{"ok": tr', finish_reason="length"))

    models(vendor).structured(purse, [Message("user", "?")], Verdict)

    assert "it was cut off; say less" in vendor.asked[1].text


@pytest.mark.parametrize(("way", "sent"), [("json_object", {"type": "json_object"}), ("none", None)])
def test_how_json_is_asked_for_is_a_setting(local, purse, way, sent):
    local.reply = lambda asked: {"ok": True, "score": 0.5}

    models(local, LLM_STRUCTURED_OUTPUT=way).structured(purse, [Message("user", "?")], Verdict)

    assert local.asked[0].body.get("response_format") == sent


class Part(BaseModel):
    title: str = Field("x", max_length=10)
    format: Literal["a", "b"]


class Whole(BaseModel):
    parts: list[Part] = Field(min_length=1, description="all")
    note: str | None = None


def test_schemas_keep_to_what_every_server_takes():
    assert portable_schema(Whole) == {
        "type": "object",
        "properties": {
            "parts": {
                "description": "all",
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"title": {"type": "string"}, "format": {"enum": ["a", "b"], "type": "string"}},
                    "required": ["title", "format"],
                    "additionalProperties": False,
                },
            },
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["parts", "note"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize("kind", ["vendor", "local"])
def test_embeddings_come_in_the_order_of_the_texts_over_several_batches(request, purse, kind):
    vendor = request.getfixturevalue(kind)
    texts = [f"text {n}" for n in range(230)]

    vectors = models(vendor).embed(purse, texts)

    assert vectors == [faults.vector(text) for text in texts]
    assert [len(asked.body["input"]) for asked in vendor.asked] == [100, 100, 30]
    assert purse.measures["tokens_in"] == 460


@pytest.mark.parametrize(
    "data",
    [
        [],
        [{"index": 0, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0}, {"index": 1}],
        "none",
    ],
)
def test_embeddings_that_do_not_fit_the_texts_are_refused(vendor, purse, data):
    vendor.fault(faults.body({"data": data}))

    with pytest.raises(Transient, match="embeddings") as raised:
        models(vendor).embed(purse, ["a", "b"])
    assert raised.value.code == "model_bad_answer"


def test_speech_is_sent_as_a_file_and_comes_back_with_the_times_of_words(vendor, purse, tmp_path):
    sound = tmp_path / "chunk.wav"
    sound.write_bytes(b"RIFF....WAVE")
    vendor.transcribe = lambda asked: {
        "text": " Hello there. ",
        "language": "en",
        "segments": [{"id": 0, "start": 0.1, "end": 1.0, "text": " Hello there."}],
        "words": [{"word": "Hello", "start": 0.1, "end": 0.4}, {"word": "there.", "start": 0.5, "end": 1.0}],
        "usage": {"seconds": 12.5, "cost": 0.001},
    }

    heard = models(vendor).transcribe(purse, sound, language="en")

    assert (heard.text, heard.language) == ("Hello there.", "en")
    assert [(w.text, w.start_s, w.end_s) for w in heard.words] == [("Hello", 0.1, 0.4), ("there.", 0.5, 1.0)]
    assert vendor.asked[0].sound == b"RIFF....WAVE"
    assert vendor.asked[0].body["model"] == "openai/whisper-1"
    assert vendor.asked[0].body["timestamp_granularities[]"] == ["word", "segment"]
    assert purse.measures == {"model_calls": 1, "audio_s": 12.5, "usd": 0.001}


# ---- faults ----

PERMANENT = {
    "model_bad_request": faults.status(400, "bad parameter", error_type="invalid_request"),
    "model_key": faults.status(401, "No auth credentials found"),
    "model_no_credit": faults.no_credit(),
    "model_refused": faults.refused("sexual/minors"),
    "model_forbidden": faults.status(403, "not for this key"),
    "model_unknown": faults.status(404, 'model "x" not found, try pulling it first'),
    "model_too_large": faults.status(413, "too large"),
}
TRANSIENT = {
    ("model_timeout", "408"): faults.status(408, "timeout"),
    ("model_timeout", "524"): faults.html(524),
    ("model_failed", "500"): faults.status(500),
    ("model_failed", "502"): faults.status(502, raw="upstream said no", provider_name="Poolside"),
    ("model_failed", "503"): faults.html(503),
    ("model_failed", "529"): faults.status(529),
    ("model_limit", "429"): faults.busy(),
    ("model_failed", "in a 200"): faults.error_in_200(502),
    ("model_failed", "in a 200, a word"): faults.error_in_200("server_error"),
    ("model_failed", "in a choice"): faults.error_in_choice(),
    ("model_bad_answer", "no choices"): faults.body({"choices": []}),
    ("model_bad_answer", "a list"): faults.body([]),
    ("model_bad_answer", "html"): faults.html(200),
    ("model_empty", "null"): faults.says(None),
    ("model_cut", "cut"): faults.cut(),
}


@pytest.mark.parametrize("code", PERMANENT)
def test_what_will_never_succeed_is_permanent(vendor, purse, code):
    vendor.fault(PERMANENT[code])

    with pytest.raises(Permanent) as raised:
        ask(models(vendor), purse)

    assert raised.value.code == code
    assert purse.measures == {}


@pytest.mark.parametrize("case", TRANSIENT, ids="-".join)
def test_what_may_pass_is_transient(vendor, purse, case):
    vendor.fault(TRANSIENT[case])

    with pytest.raises(Transient) as raised:
        ask(models(vendor), purse)

    assert raised.value.code == case[0]
    assert ask(models(vendor), purse) == "pong"


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (faults.error_in_200(402), Permanent, "model_no_credit"),
        (faults.error_in_200("402"), Permanent, "model_no_credit"),
        (faults.error_in_200("context_length_exceeded"), Permanent, "model_bad_request"),
        (faults.says("", finish_reason="content_filter"), Permanent, "model_refused"),
        (faults.body({"error": "model not loaded"}), Transient, "model_failed"),
        (
            faults.body({"error": {"message": "x", "type": "insufficient_quota", "code": None}}),
            Permanent,
            "model_no_credit",
        ),
    ],
)
def test_an_error_inside_an_answer_of_200_means_what_its_status_would(vendor, purse, fault, kind, code):
    vendor.fault(fault)

    with pytest.raises(kind) as raised:
        ask(models(vendor), purse)
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("fault", "least", "most"),
    [
        (faults.busy("7"), 7, 8.1),
        (faults.busy("7", status=503), 7, 8.1),
        (faults.limited(reset_in_s=42), 41, 43.2),
        (faults.limited(reset_in_s=-5), 0, 1.1),
        (faults.busy("Thu, 01 Jan 2099 00:00:00 GMT"), 25 * 3600, 25 * 3600),
    ],
)
def test_a_limit_with_a_time_parks_until_then(vendor, purse, fault, least, most):
    vendor.fault(fault)

    with pytest.raises(Wait) as raised:
        ask(models(vendor), purse)

    assert raised.value.reason == "model_limit"
    assert least <= raised.value.seconds <= most


def test_the_daily_quota_parks_until_midnight(vendor, purse):
    vendor.fault(faults.daily_quota())
    before = time.time()

    with pytest.raises(Wait) as raised:
        ask(models(vendor), purse)

    midnight = before - before % 86400 + 86400
    assert -1 <= before + raised.value.seconds - midnight <= 5 or raised.value.seconds > 86390  # it struck meanwhile


def test_openais_own_word_for_an_empty_account_is_no_limit_to_wait_for(local, purse):
    error = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}
    local.fault(lambda asked: faults.Reply(429, json.dumps({"error": error}).encode()))

    with pytest.raises(Permanent) as raised:
        ask(models(local), purse)
    assert raised.value.code == "model_no_credit"


@pytest.mark.parametrize(
    ("status", "document", "kind", "code"),
    [
        (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, Wait, "model_loading"),
        (
            404,
            {"error": {"message": 'model "x" not found', "type": "not_found_error", "code": None}},
            Permanent,
            "model_unknown",
        ),
        (400, {"object": "error", "message": "too long", "type": "BadRequestError"}, Permanent, "model_bad_request"),
        (500, {"error": "llama runner process has terminated"}, Transient, "model_failed"),
    ],
)
def test_the_local_servers_own_errors_are_understood(local, purse, status, document, kind, code):
    local.fault(lambda asked: faults.Reply(status, json.dumps(document).encode()))

    with pytest.raises(kind) as raised:
        ask(models(local), purse)
    assert raised.value.code == code


@pytest.mark.parametrize("fault", [faults.slow(60), faults.trickling(0.05)], ids=["silent", "trickling"])
def test_a_slow_answer_ends_at_the_time_limit(vendor, purse, fault):
    vendor.fault(fault)

    with pytest.raises(Transient) as raised:
        ask(models(vendor, LLM_TIMEOUT="0.4"), purse)
    assert raised.value.code == "model_timeout"


def test_nobody_at_the_address(purse, vendor):
    asking = models(vendor, OPENROUTER_BASE_URL="http://127.0.0.1:1/v1")

    with pytest.raises(Transient) as raised:
        ask(asking, purse)
    assert raised.value.code == "model_unreachable"


def test_a_stop_is_heard_while_an_answer_is_waited_for(vendor, purse):
    vendor.fault(faults.slow(120))
    ended: list[type[BaseException]] = []

    def run() -> None:
        try:
            ask(models(vendor), purse)
        except BaseException as error:  # noqa: BLE001 - what it is is the question
            ended.append(type(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    eventually(lambda: vendor.asked)
    purse.stopped.set()
    thread.join(60)

    assert ended == [StopHere]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (faults.stream_error(), "model_failed"),
        (faults.stream_error("timeout"), "model_timeout"),
        (faults.stream_cut(reset=True), "model_cut"),
        (faults.stream_cut(reset=False), "model_cut"),
        (faults.status(500), "model_failed"),
    ],
)
def test_an_error_in_the_middle_of_a_stream_is_one(vendor, purse, fault, code):
    vendor.fault(fault)

    with pytest.raises(Transient) as raised:
        ask(models(vendor), purse, on_text=lambda piece: None)
    assert raised.value.code == code


def test_a_redirect_is_not_followed_because_the_key_would_travel_along(vendor, purse):
    elsewhere = vendor.server.url("/elsewhere/chat/completions")
    vendor.fault(lambda asked: faults.Reply(307, headers={"Location": elsewhere}))

    with pytest.raises(Permanent):
        ask(models(vendor), purse)
    assert [asked.path for asked in vendor.asked] == ["/api/v1/chat/completions"]


# ---- secrets and settings ----


@pytest.mark.parametrize(
    "fault",
    [
        faults.refused(),
        faults.status(400, f"the prompt {PROMPT!r} is not allowed", raw=PROMPT),
        faults.status(401, f"Incorrect API key provided: {KEY}"),
        faults.status(500, PROMPT),
        faults.error_in_200(502, PROMPT),
        faults.says(f"not json {PROMPT}"),
        faults.cut(),
    ],
)
def test_neither_prompt_nor_key_is_in_a_log_or_an_error(vendor, purse, fault, caplog, capfd):
    caplog.set_level("DEBUG")
    vendor.fault(fault, times=2)

    with pytest.raises(Exception) as raised:
        models(vendor).structured(purse, [Message("user", PROMPT)], Verdict)

    said = caplog.text + "".join(capfd.readouterr()) + str(raised.value)
    assert "very secret" not in said
    assert "0123456789abcdef" not in said


@pytest.mark.parametrize("kind", ["chat", "vision", "embeddings", "transcription"])
def test_without_a_model_it_is_said_what_to_set(kind):
    with pytest.raises(NotConfigured, match=r"^not configured: set OPENROUTER_API_KEY or LLM_BASE_URL$"):
        Models(settings.load({})).endpoint(kind)


def test_one_local_server_does_what_it_has_a_model_for():
    one = {"LLM_BASE_URL": "http://127.0.0.1:4000/v1", "LLM_MODEL": "qwen3", "LLM_API_KEY": "k"}

    asking = Models(settings.load({**one, "TRANSCRIPTION_MODEL": "whisper"}))

    heard = asking.endpoint("transcription")
    assert (heard.base_url, heard.model, heard.key) == ("http://127.0.0.1:4000/v1", "whisper", "k")
    with pytest.raises(NotConfigured, match=r"^not configured: set EMBEDDINGS_MODEL to one that LLM_BASE_URL has"):
        asking.endpoint("embeddings")


def test_each_kind_of_question_has_its_server_and_model():
    read = settings.load(
        {
            "OPENROUTER_API_KEY": KEY,
            "LLM_BASE_URL": "http://127.0.0.1:11434/v1/",
            "LLM_MODEL": "qwen3",
            "VISION_MODEL": "qwen3-vl",
            "EMBEDDINGS_MODEL": "openai/text-embedding-3-large",
        }
    )
    asking = Models(read)

    found = {kind: asking.endpoint(kind) for kind in ("chat", "vision", "embeddings", "transcription")}

    assert {kind: (e.base_url, e.model, e.openrouter) for kind, e in found.items()} == {
        "chat": ("http://127.0.0.1:11434/v1", "qwen3", False),
        "vision": ("http://127.0.0.1:11434/v1", "qwen3-vl", False),
        "embeddings": ("https://openrouter.ai/api/v1", "openai/text-embedding-3-large", True),
        "transcription": ("https://openrouter.ai/api/v1", "openai/whisper-1", True),
    }
    assert (found["chat"].key, found["embeddings"].key) == (None, KEY)


def test_a_server_without_the_name_of_its_model_is_refused():
    with pytest.raises(settings.SettingsError, match="LLM_MODEL: must be set where LLM_BASE_URL is"):
        settings.load({"LLM_BASE_URL": "http://127.0.0.1:11434/v1"})


def test_a_file_of_sound_that_is_not_there(vendor, purse):
    with pytest.raises(FileNotFoundError):
        models(vendor).transcribe(purse, Path("/nowhere.wav"))
