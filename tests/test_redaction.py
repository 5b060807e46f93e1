"""What opens something is taken out of texts, and what does not stays."""

from __future__ import annotations

import pytest

from agentflow import redaction, settings
from agentflow.redaction import Redactor, is_secret, secrets_in

R = redaction.REDACTED


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("db_password=abc def", f"db_password={R} def"),
        ("{'api_key': 'a b', \"clientSecret\": \"q\"}", f"{{'api_key': {R}, \"clientSecret\": {R}}}"),
        ("Authorization: Bearer abc.def.ghi", f"Authorization: {R}"),
        ("sent Bearer abcdefghijklmnop", f"sent Bearer {R}"),
        ("postgresql://me:pw@db.example.com/x", f"postgresql://{R}@db.example.com/x"),
        ("GET /maps?zoom=3&key=AIzaSy&x=1", f"GET /maps?zoom=3&key={R}&x=1"),
        ("https://example.com/a?X-Amz-Signature=00ff&b=1", f"https://example.com/a?X-Amz-Signature={R}&b=1"),
        (f"https://api.telegram.org/bot123456789:{'A' * 35}/getMe", f"https://api.telegram.org/bot{R}/getMe"),
        ("POST /webhooks/kommo/tok3n?x=1", f"POST /webhooks/kommo/{R}?x=1"),
        (f"with sk-{'a1' * 12}", f"with {R}"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln is no more", f"{R} is no more"),
        ("-----BEGIN PRIVATE KEY-----\nMII\n-----END PRIVATE KEY-----.", f"{R}."),
    ],
)
def test_what_opens_something_is_taken_out(text: str, left: str) -> None:
    assert Redactor().text(text) == left
    assert Redactor().text(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "tokens_in=7, max_tokens: 5",
        "unique key: orders",
        "KeyError: 'token'",
        "the secret of the sea",
        "sessions: 3, author: Melville",
        "at 12:30:45 in https://example.com/token/7",
    ],
)
def test_what_opens_nothing_stays(text: str) -> None:
    assert Redactor().text(text) == text


def test_secrets_of_the_settings_are_known_wherever_they_stand() -> None:
    read = settings.load(
        {"DATABASE_URL": "postgresql://me:p%40ssword@db/x", "ADMIN_API_KEY": "operators-own-key", "LLM_API_KEY": "x"}
    )

    said = redaction.of(read).text("p@ssword and p%40ssword and operators-own-key, xylophone")

    assert said == f"{R} and {R} and {R}, xylophone"


def test_data_is_copied_without_what_stands_under_a_secrets_name() -> None:
    data = {
        "deep": [{"client_secret": "a", "at": "https://me:pw@h/"}],
        "n": 1,
        "token": None,
        "usage": {"tokens_out": 3},
    }

    said = Redactor().value(data)

    assert said == {
        "deep": [{"client_secret": R, "at": f"https://{R}@h/"}],
        "n": 1,
        "token": None,
        "usage": {"tokens_out": 3},
    }
    assert data["deep"] == [{"client_secret": "a", "at": "https://me:pw@h/"}]


def test_what_a_payload_holds_is_taken_out_of_texts_that_quote_it() -> None:
    found = secrets_in({"login": {"password": "hunter2"}, "urls": ["https://me:hunter3@h/"], "name": "hunter"})

    assert found == {"hunter2", "hunter3"}
    assert Redactor().also(found).text("a hunter said hunter2, hunter3") == f"a hunter said {R}, {R}"


def test_names_of_secrets() -> None:
    assert all(map(is_secret, ("token", "access_token", "X-Api-Key", "Set-Cookie", "db.password", "session_id", "DSN")))
    assert not any(map(is_secret, ("key", "tokens_in", "max_tokens", "author", "status")))


def test_data_without_end_has_one() -> None:
    endless: list[object] = []
    endless.append(endless)

    assert str(Redactor().value(endless)).count("[") < 30
    assert secrets_in(endless) == set()
